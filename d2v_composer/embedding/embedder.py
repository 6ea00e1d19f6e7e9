"""Embed batches of a table, for engines that run a function over a data set."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2v_composer.config.reference import load_any
from d2v_composer.data import modality_of
from d2v_composer.data.modality import Modality, decoding, read_sample_file
from d2v_composer.embedding.embed_source import EmbeddingOptions, embed_batch, load_batch
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.names import Pooling, PrecisionChoice, Representation, Weights
from d2v_composer.models.precision import check_precision, name_precision
from d2v_composer.system.errors import errors_of


@dataclass(unsafe_hash=True)
class Embedder:
    """Embed the images or clips of a table's column; an engine such as Ray Data calls the embedder with batches.

    Each process loads the model at its first batch. The new columns of all Arrow batches have the same types.

    Args:
        model: MODEL of ``d2v embed``; every machine must be able to read it.
        column: Name of the column of samples. A sample is a file's bytes or path, or a dict with the key ``bytes`` or
            ``path``; an image may also be an array, (height, width, 3) uint8, or a PIL image. Default: ``image`` or
            ``audio``.
        batch_size: Number of samples that the model takes at once; default: 256 images, or 4 clips.
        pooling: This argument and the following ones are options of ``d2v embed``.

    Example:
        >>> from d2v_composer import Embedder
        >>> embed = Embedder("student.safetensors", column="image", batch_size=64)
        >>> columns = embed({"image": files})  # with the new columns "embedding", (N, P), and "error"
    """

    model: str
    column: str | None = None
    batch_size: int | None = None
    pooling: Pooling | None = None
    representation: Representation | None = None
    precision: PrecisionChoice = "fp32"
    normalize: bool = False
    dtype: str = "float32"
    weights: Weights = "model"
    teacher: str | None = None
    checkpoint: str | None = None
    first_blocks: int | None = None
    image_size: int | str | None = None
    made: int = field(default_factory=time_ns, init=False)
    """Time of creation, in ns, which makes an embedder equal only to its copies."""

    def __call__(self, batch: Any) -> Any:
        """Add the columns ``embedding`` and ``error`` to a batch.

        Args:
            batch: A dict of columns, or an Arrow table or record batch.

        Returns:
            The same kind of batch. For an unreadable sample, the embedding is null; for a readable sample, the error is
            null. In a dict, the embeddings are an array, (N, P), or a list if a sample is unreadable.

        Raises:
            InputError: The model cannot be used; see :meth:`load`.
        """
        model, modality, options, device = self.load()
        column, size = self.column or modality.name, options.batch_size
        samples, embeddings, errors = [*batch[column]], [], []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            numbers = range(len(part))
            inputs, unreadable = load_batch(partial(_decode, part, column, modality), numbers)
            reasons, rows = dict(unreadable), iter(embed_batch(model, inputs, options, device) if inputs else ())
            embeddings += (None if number in reasons else next(rows) for number in numbers)
            errors += map(reasons.get, numbers)
        if isinstance(batch, Mapping):
            return {**batch, "embedding": embeddings if any(errors) else np.array(embeddings), "error": errors}
        import pyarrow  # an extra

        # Not of a fixed size, which Spark cannot read.
        kind = pyarrow.list_(pyarrow.from_numpy_dtype(options.dtype))
        batch = batch.append_column("embedding", pyarrow.array(embeddings, kind))
        return batch.append_column("error", pyarrow.array(errors, "string"))

    @lru_cache(4)  # noqa: B019  (an engine may ship copies to one process, one with each task; some take turns)
    def load(self) -> tuple[Backbone, Modality, EmbeddingOptions, str]:
        """Load the model in eval mode, onto the GPU if there is one, and choose the embedding.

        Returns:
            The model, the modality of its samples, the settings, and the device: cpu or cuda.

        Raises:
            InputError: The model cannot be loaded or lacks the embedding, or the precision needs a GPU.
        """
        if hasattr(os, "register_at_fork"):  # a child would wait for the parent's threads
            os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision: Any = name_precision(self.precision)
        with errors_of("precision"):
            check_precision(precision)
        model, _ = load_any(self.model, self.checkpoint, self.weights, self.teacher, self.first_blocks, self.image_size)
        modality = modality_of(model.encoder.config)
        embedding = model.choose_embedding(self.pooling, self.representation)
        options = EmbeddingOptions(
            embedding, precision, self.normalize, self.dtype, self.batch_size or modality.batch_size
        )
        return model.eval().to(device), modality, options, device


def _decode(samples: list[Any], column: str, modality: Modality, number: int) -> torch.Tensor:
    sample = samples[number]
    sample = getattr(sample, "as_py", lambda: sample)()  # Arrow's
    if isinstance(sample, Mapping):
        sample = sample.get("bytes") or sample.get("path")
    if isinstance(sample, str):
        sample = read_sample_file(Path(sample))
    if isinstance(sample, np.ndarray):
        with decoding(f"{sample.dtype} {sample.shape}", column, "an image"):
            sample = Image.fromarray(sample)
    return modality.decode(sample, column)

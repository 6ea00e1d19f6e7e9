"""Embed an evaluation set with several models.

Shapes: B samples in a batch, L values in a clip, N samples of a rank, D channels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from d2v_composer.data.modality import collate
from d2v_composer.evaluation.metrics.metric import VIEWS
from d2v_composer.evaluation.rows import find_headline
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.names import EMBEDDING
from d2v_composer.sources.labeled import EvaluationSet
from d2v_composer.system.errors import RunError
from d2v_composer.system.progress import progress_bar

Embed = Callable[..., Tensor | dict[str, Tensor]]
"""A function that returns the embedding of each sample in a batch, (B, D), or a dict of several embeddings by name.

The first argument is images, (B, 3, height, width) uint8, or clips, (B, L) float32, on the model's device. If any clips
are padded, the second argument is the length of each clip without padding, (B,) int64.
"""
EmbeddedSet = dict[str, dict[str, Tensor]]
"""Part of a set (``train``, ``test`` or one of ``VIEWS``) → name of an embedding → embeddings of this rank's samples,
(N, D) float32 on the host."""


def embed_set(
    embeds: Mapping[str, Embed],
    dataset: str,
    labeled: EvaluationSet,
    settings: Settings,
    infos: Mapping[str, EmbeddingInfo] = {},
) -> dict[str, EmbeddedSet]:
    """Embed this rank's share of a set with every model.

    The train samples are embedded only if the set has labels, and the views only if a metric needs views.

    Args:
        embeds: Name of a model → function that embeds a batch.
        dataset: Name of the set in progress bars.
        labeled: The set.
        settings: Settings of the evaluation.
        infos: Name of a model → description of the model's embedding, if known.

    Returns:
        Name of a model → embedded set; without ``settings.needs_all``, only with the embedding that tables show and the
        embedding named ``embedding``.
    """
    parts = ({"train": labeled.train} if labeled.has_labels else {}) | {"test": labeled.test}
    parts |= dict.fromkeys(VIEWS, labeled.test) if settings.needs(labeled, "views") else {}
    embedded: dict[str, EmbeddedSet] = {model: {part: {} for part in parts} for model in embeds}
    for part, (samples, _) in parts.items() if embeds else ():
        mine = settings.ranks.indices_of_rank(len(samples))
        sizes = torch.tensor([samples[i].shape[-1] for i in mine.tolist()])
        batches = sizes.argsort(descending=True, stable=True).split(settings.batch_size)
        shown, is_hidden = f"{settings.progress}{dataset} {part}", settings.progress is None
        for places in progress_bar(batches, desc=shown, unit="batches", disable=is_hidden):
            settings.before_batch()
            numbers = mine[places].tolist()
            batch = [samples[i] for i in numbers]
            if settings.augment is not None and part in VIEWS:
                batch = [settings.augment(samples[i], i, VIEWS.index(part)) for i in numbers]
            inputs = move_batch(collate(batch), settings.to_device)
            for model, embed in embeds.items():
                embeddings, of_part = embed(*inputs), embedded[model][part]
                if isinstance(embeddings, Tensor):
                    embeddings = {"": embeddings}
                needed = {EMBEDDING, find_headline(settings.headline, embeddings, infos.get(model))}
                for name, vectors in embeddings.items():
                    if name not in needed and not settings.needs_all:
                        continue
                    if name not in of_part:
                        of_part[name] = torch.empty(len(mine), vectors.shape[1])
                    of_part[name][places] = vectors.float().cpu()
    return embedded


def check_finite(dataset: str, embedded: Mapping[str, EmbeddedSet]) -> None:
    """Check that all embeddings are finite."""
    for model, parts in embedded.items():
        for part, embeddings in parts.items():
            if not all(vectors.isfinite().all() for vectors in embeddings.values()):
                raise RunError(f"{dataset}, {part}: some embeddings of {model!r} are infinite or NaN")


def move_batch(batch: tuple[Tensor, ...], to_device: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the tensors of a batch from :func:`~d2v_composer.data.modality.collate`, moved to one device."""
    values = to_device(batch[0])
    return [values, *(lengths.to(values.device) for lengths in batch[1:])]

"""Read fairseq's data2vec 2.0 checkpoints, and load and convert teachers."""

import datetime
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_composer.checkpoints.safe_load import Stub, fetch_model, is_trained, load_untrusted
from d2v_composer.checkpoints.student_file import (
    build_loaded,
    is_safetensors,
    read_config,
    read_model_file,
    sha256,
    write_model_file,
)
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.names import Weights
from d2v_composer.models.sizes import Data2Vec2Config
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError, reading

IMAGE = "modality_encoders.IMAGE."
ENCODER = "encoder."
ALIBI_SCALE = f"{IMAGE}alibi_scale"
# Only pre-training uses these: data2vec 2.0's decoder and the heads of its losses.
LEFT = (f"{IMAGE}decoder.", "shared_decoder.", "recon_proj.", "cls_proj.")
LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are CC BY-NC 4.0"
# Fields of our config in cfg["model"], and names in cfg["model"]["modalities"]["image"] → fields of our config.
MODEL_FIELDS = ("embed_dim", "num_heads", "mlp_ratio", "norm_eps", "depth")
IMAGE_FIELDS = {name: name for name in ("prenet_depth", "num_extra_tokens", "patch_size", "in_chans")} | {
    "input_size": "image_size"
}


def read_fairseq_checkpoint(path: str | Path, file: Path, weights: Weights) -> tuple[Data2Vec2, list[str]]:
    """Read and check a fairseq checkpoint, ``file``, without running its code; errors name its address, ``path``.

    Returns:
        The teacher, and the file's names of unused tensors.

    Raises:
        InputError: The file is corrupt, of another format, modality or kind, or lacks a tensor.
    """
    checkpoint = load_untrusted(file)
    stored, sizes = _section(checkpoint, "model"), _section(_section(checkpoint, "cfg"), "model")
    if is_trained(checkpoint):
        raise InputError(
            f"{path}: is a training checkpoint; expected a teacher; its teacher is named in the run.yaml beside it"
        )
    if stored is None or sizes is None:
        raise InputError(f"{path}: not a fairseq data2vec 2.0 checkpoint: it has no dicts 'model' and cfg['model']")
    if weights == "ema":
        stored = _section(stored, "_ema")
        if stored is None:
            raise InputError(f"{path}: has no EMA weights ('_ema'); use weights=model")
    stored = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    image = _section(_section(sizes, "modalities"), "image") or {}
    model, image = _fields(sizes), _fields(image)
    with reading(path):
        config = _read_config(model, image, stored)
    renamed = {f"{ENCODER}{name.removeprefix(IMAGE)}" if name.startswith(IMAGE) else name: name for name in stored}
    used = {ours: stored[name] for ours, name in renamed.items() if not name.startswith(LEFT)}
    provenance = {"source": file_name(path), "sha256": sha256(file), "weights": weights, "licence": LICENCE_NOTE}
    teacher = build_loaded(path, lambda: Data2Vec2(config, provenance), used)
    return teacher, [name for name in stored if name.startswith(LEFT)]


def _section(container: Any, name: str) -> dict[Any, Any] | None:
    """Return a section, a dict or another program's object, as a dict; ``None`` if there is none."""
    # dict's own methods: a pickle may set attributes of an OrderedDict, such as `items`.
    section = dict.get(container, name) if isinstance(container, dict) else None
    section = dict.get(section, "_content", section) if isinstance(section, Stub) else section  # OmegaConf's
    return dict(dict.items(section)) if isinstance(section, dict) else None


def _fields(section: dict[Any, Any]) -> dict[Any, Any]:
    """Return a section's fields that are set, without the interpolated ones, which equal our defaults."""
    values = {name: each.get("_val") if isinstance(each, Stub) else each for name, each in section.items()}
    # Not str(each): a list may hold another one twice, 60 times over.
    return {
        name: each
        for name, each in values.items()
        if each is not None and not (isinstance(each, str) and each.startswith("${"))
    }


def _read_config(model: dict[Any, Any], image: dict[Any, Any], stored: Mapping[str, Tensor]) -> Data2Vec2Config:
    """Read the sizes; fields that the file lacks keep the config's defaults, which are data2vec's.

    Raises:
        ValueError: They are not those of a supported teacher.
    """
    if not any(name.startswith(IMAGE) for name in stored):
        raise ValueError(
            f"not a data2vec 2.0 image checkpoint, or a fine-tuned one; use a pre-trained one, with tensors {IMAGE}*"
        )
    if model.get("layer_norm_first"):
        raise ValueError("pre-norm models (layer_norm_first: true) are not supported; the released ones are post-norm")
    alibi_kind = image.get("alibi_dims", 2), image.get("alibi_distance", "manhattan"), image.get("learned_alibi")
    if image.get("use_alibi_encoder") and (alibi_kind[:2] != (2, "manhattan") or alibi_kind[2]):
        raise ValueError(
            "ALiBi is supported only as image models use it: alibi_dims 2, alibi_distance manhattan, not learned"
        )
    found = {name: model[name] for name in MODEL_FIELDS if name in model}
    found |= {name: image[theirs] for theirs, name in IMAGE_FIELDS.items() if theirs in image}
    # Clamped to the depth, as fairseq's slice does.
    depth = Data2Vec2Config(**found, average_top_k_layers=1).depth
    top_k = model.get("average_top_k_layers", depth)
    found["average_top_k_layers"] = min(top_k, depth) if isinstance(top_k, int) else top_k
    if image.get("use_alibi_encoder"):
        found["num_alibi_heads"] = image.get("num_alibi_heads", Data2Vec2Config(**found).num_heads)
        found["alibi_scale_shape"] = tuple(stored[ALIBI_SCALE].shape)
    return Data2Vec2Config(**found)


def load_data2vec2(path: str | Path, weights: Weights) -> Data2Vec2:
    """Load a frozen teacher; see :func:`~d2v_composer.checkpoints.load.load_teacher`.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        return read_fairseq_checkpoint(path, file, weights)[0]
    stored = read_model_file(file)
    stored.expect(path, "teacher")
    with reading(path):
        found = stored.provenance["weights"]
        config = read_config(Data2Vec2Config, stored.config)
    if found != weights:
        raise InputError(f"{path}: was converted with --weights {found}, and has no {weights} weights")
    return build_loaded(path, lambda: Data2Vec2(config, stored.provenance), stored.tensors)


def convert_teacher(
    source: str | Path,
    out: Path,
    weights: Weights = "model",
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
) -> tuple[Data2Vec2, list[str]]:
    """Convert a fairseq checkpoint to a safetensors file.

    Args:
        source: As :func:`load_data2vec2`'s path.
        out: The file to write.
        weights: The weights to keep.
        dtype: Stored dtype; a loaded teacher is float32 in any case.
        licence: A note on the weights' licence for the metadata.

    Returns:
        As :func:`read_fairseq_checkpoint`.

    Raises:
        InputError: As :func:`load_data2vec2`; or ``out`` cannot be written.
    """
    file = fetch_model(source)
    if is_safetensors(file):
        raise InputError(f"{source}: is already a safetensors file; expected a fairseq checkpoint")
    teacher, left = read_fairseq_checkpoint(source, file, weights)
    teacher.provenance |= {
        "dtype": str(dtype).removeprefix("torch."),
        "licence": licence or LICENCE_NOTE,
        "converted": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in teacher.state_dict().items()}
    write_model_file(out, "teacher", asdict(teacher.config), teacher.provenance, tensors)
    return teacher, left

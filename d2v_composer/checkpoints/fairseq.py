"""Read fairseq's data2vec 2.0 checkpoints, and load and convert teachers."""

import datetime
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_composer.checkpoints.safe_load import fetch_model, is_trained, load_untrusted, plain
from d2v_composer.checkpoints.student_file import (
    check_fits,
    is_safetensors,
    read_config,
    read_model_file,
    sha256,
    write_model_file,
)
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.names import Weights
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.files import check_out_file

IMAGE = "modality_encoders.IMAGE."
ENCODER = "encoder."
ALIBI_SCALE = f"{IMAGE}alibi_scale"
# Only pre-training uses these: data2vec 2.0's decoder and the heads of its losses.
LEFT = (f"{IMAGE}decoder.", "shared_decoder.", "recon_proj.", "cls_proj.")
FINE_TUNED = ("head.", "fc_norm.", "model.")
# Fields of our config and their names in cfg["model"] and in cfg["model"]["modalities"]["image"].
MODEL_FIELDS = {name: name for name in ("embed_dim", "num_heads", "mlp_ratio", "norm_eps", "depth")}
IMAGE_FIELDS = {name: name for name in ("prenet_depth", "num_extra_tokens", "patch_size", "in_chans")} | {
    "image_size": "input_size"
}


class FairseqCheckpoint(NamedTuple):
    """A teacher's part of a checkpoint, and the names of the rest."""

    config: Data2Vec2Config
    tensors: dict[str, Tensor]
    """Named as in :class:`Data2Vec2`, float32."""
    left: list[str]
    """The file's names of unused tensors."""


def read_fairseq_checkpoint(path: Path, weights: Weights = "model") -> FairseqCheckpoint:
    """Read and check a fairseq checkpoint, without running its code.

    Args:
        path: A local file.
        weights: ``model``, or ``ema`` for the moving average, which was the model's own teacher.

    Raises:
        InputError: The file is corrupt, of another format, modality or kind, or lacks a tensor.
    """
    checkpoint = plain(load_untrusted(path))
    stored = _section(checkpoint, "model")
    if is_trained(checkpoint):
        raise InputError(
            f"{path}: is a training checkpoint, expected a teacher; its teacher is named in the run.yaml beside it"
        )
    if stored is None:
        raise InputError(f"{path}: not a fairseq checkpoint: it has no dict 'model'")
    sizes = Sizes(_section(checkpoint, "cfg"))
    if sizes.model is None:
        raise InputError(f"{path}: not a data2vec 2.0 checkpoint: it has no dict cfg['model'] with the sizes")
    if weights == "ema":
        stored = _section(stored, "_ema")
        if stored is None:
            raise InputError(f"{path}: holds no ema weights ('_ema'); allowed here: weights=model")
    stored = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    _check_supported(path, sizes, stored)
    try:
        config = _read_config(sizes, stored)
    except ValueError as error:
        raise InputError(f"{path}: unusable sizes in cfg['model']: {error}") from error

    left = [name for name in stored if name.startswith(LEFT)]
    tensors = {_our_name(name): tensor for name, tensor in stored.items() if not name.startswith(LEFT)}
    check_fits(path, lambda: Data2Vec2(config), tensors)
    return FairseqCheckpoint(config, {name: tensor.float() for name, tensor in tensors.items()}, left)


class Sizes:
    """Reads sizes from a checkpoint's ``cfg``, pickled from any classes.

    Args:
        cfg: The whole ``cfg``, to which OmegaConf's interpolations refer.
    """

    def __init__(self, cfg: dict[Any, Any] | None) -> None:
        self.cfg = cfg
        self.model = _section(cfg, "model")
        self.image = _section(_section(self.model, "modalities"), "image") or {}

    def model_value(self, name: str, default: Any = None) -> Any:
        """Return a field of ``cfg["model"]``; the default if it is missing or null."""
        return self._value(self.model, name, default)

    def image_value(self, name: str, default: Any = None) -> Any:
        """Return a field of ``cfg["model"]["modalities"]["image"]``; the default if it is missing or null."""
        return self._value(self.image, name, default)

    def _value(self, section: dict[Any, Any] | None, name: str, default: Any) -> Any:
        value = plain((section or {}).get(name))
        if isinstance(value, str) and value.startswith("${") and value.endswith("}"):
            *sections, name = value[2:-1].split(".")
            section = self.cfg
            for part in sections:
                section = _section(section, part)
            value = plain((section or {}).get(name))
        return default if value is None else value


def _section(container: Any, name: str) -> dict[Any, Any] | None:
    """Return a dict within a dict, pickled from any class; ``None`` if there is none."""
    # dict's own methods: a pickle may set attributes of an OrderedDict, such as `items`.
    section = plain(dict.get(container, name)) if isinstance(container, dict) else None
    return dict(dict.items(section)) if isinstance(section, dict) else None


def _check_supported(path: Path, sizes: Sizes, stored: Mapping[str, Tensor]) -> None:
    modalities = {name.split(".")[1] for name in stored if name.startswith("modality_encoders.")}
    others = sorted(modalities - {"IMAGE"})
    if others:
        raise InputError(f"{path}: {others[0].lower()} checkpoints are not supported, because only images are")
    if any(name.startswith(FINE_TUNED) for name in stored):
        raise InputError(
            f"{path}: fine-tuned checkpoints are not supported, because a teacher must be self-supervised: use the "
            "pre-trained file"
        )
    if not modalities:
        raise InputError(f"{path}: not a data2vec 2.0 image checkpoint: it has no tensor {IMAGE}*")
    if sizes.model_value("layer_norm_first", False):
        raise InputError(
            f"{path}: pre-norm models (layer_norm_first: true) are not supported, because the released image models "
            "are post-norm"
        )
    if sizes.image_value("use_alibi_encoder", False):
        dims, distance = sizes.image_value("alibi_dims", 2), sizes.image_value("alibi_distance", "manhattan")
        if (dims, distance) != (2, "manhattan"):
            raise InputError(
                f"{path}: ALiBi with alibi_dims {dims} and alibi_distance {distance} is not supported, because images "
                "use 2 and manhattan"
            )
        if sizes.image_value("learned_alibi", False):
            raise InputError(f"{path}: learned_alibi is not supported, because only ALiBi's scale can be learned")


def _read_config(sizes: Sizes, stored: Mapping[str, Tensor]) -> Data2Vec2Config:
    """Return the sizes; fields that the file lacks keep data2vec's defaults, which are the config's."""
    found = {name: sizes.model_value(theirs) for name, theirs in MODEL_FIELDS.items()}
    found |= {name: sizes.image_value(theirs) for name, theirs in IMAGE_FIELDS.items()}
    found = {name: value for name, value in found.items() if value is not None}
    # Clamped to the depth, as fairseq's slice does.
    depth = Data2Vec2Config(**found, average_top_k_layers=1).depth
    top_k = sizes.model_value("average_top_k_layers", depth)
    found["average_top_k_layers"] = min(top_k, depth) if isinstance(top_k, int) else top_k
    if sizes.image_value("use_alibi_encoder", False):
        config = Data2Vec2Config(**found)
        found["num_alibi_heads"] = sizes.image_value("num_alibi_heads", config.num_heads)
        found["alibi_scale_shape"] = _alibi_scale_shape(
            stored, config.prenet_depth + config.depth, found["num_alibi_heads"]
        )
    return Data2Vec2Config(**found)


def _alibi_scale_shape(stored: Mapping[str, Tensor], num_layers: int, num_heads: int) -> tuple[int, ...]:
    """Return the stored scale's shape, which may be per layer, per head, both or neither."""
    if ALIBI_SCALE not in stored:
        raise ValueError(f"ALiBi is on, but tensor {ALIBI_SCALE} is missing")
    shape = tuple(stored[ALIBI_SCALE].shape)
    allowed = [(layers, 1, heads, 1, 1) for layers in (1, num_layers) for heads in (1, num_heads)]
    if shape not in allowed:
        expected = f"({num_layers} or 1, 1, {num_heads} or 1, 1, 1)"
        raise ValueError(f"tensor {ALIBI_SCALE} has shape {shape}, the sizes ask for {expected}")
    return shape


def _our_name(name: str) -> str:
    return ENCODER + name.removeprefix(IMAGE) if name.startswith(IMAGE) else name


LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are CC BY-NC 4.0"


def load_data2vec2(path: str | Path, weights: Weights) -> Data2Vec2:
    """Load a frozen teacher, see :func:`~d2v_composer.checkpoints.load.load_teacher`.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        config, tensors, _ = read_fairseq_checkpoint(file, weights)
        provenance = _provenance(path, file, weights) | {"licence": LICENCE_NOTE}
        return _build_teacher(config, tensors, provenance)
    stored = read_model_file(file)
    stored.expect(path, "teacher")
    with reading(path):
        found = stored.provenance["weights"]
        config = read_config(Data2Vec2Config, stored.config)
    if found != weights:
        raise InputError(f"{path}: was converted with --weights {found}, and holds no {weights} weights")
    check_fits(path, lambda: Data2Vec2(config), stored.tensors)
    return _build_teacher(config, stored.tensors, stored.provenance)


def _provenance(source: str | Path, file: Path, weights: Weights) -> dict[str, Any]:
    return {"source": file_name(source), "sha256": sha256(file), "weights": weights}


def _build_teacher(config: Data2Vec2Config, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Data2Vec2:
    teacher = Data2Vec2(config, provenance)
    teacher.load_state_dict(tensors)
    return teacher


class ConvertedTeacher(NamedTuple):
    """Report of :func:`convert_teacher`."""

    config: Data2Vec2Config
    provenance: dict[str, Any]
    used: list[str]
    left: list[str]


def convert_teacher(
    source: str | Path,
    out: Path,
    weights: Weights = "model",
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
) -> ConvertedTeacher:
    """Convert fairseq's checkpoint to a safetensors file.

    Args:
        source: As :func:`load_data2vec2`'s path.
        out: The file to write.
        weights: The weights to keep.
        dtype: Stored dtype; a loaded teacher is float32 in any case.
        licence: A note on the weights' licence for the metadata.

    Raises:
        InputError: As :func:`load_data2vec2`; or ``out`` cannot be written.
    """
    check_out_file(out)
    file = fetch_model(source)
    if is_safetensors(file):
        raise InputError(f"{source}: is a safetensors file already, expected a fairseq checkpoint")
    checkpoint = read_fairseq_checkpoint(file, weights)
    provenance = _provenance(source, file, weights) | {
        "dtype": str(dtype).removeprefix("torch."),
        "licence": licence or LICENCE_NOTE,
        "converted": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    write_model_file(out, "teacher", asdict(checkpoint.config), provenance, tensors)
    return ConvertedTeacher(checkpoint.config, provenance, list(tensors), checkpoint.left)

"""Reading data2vec 2.0 image checkpoints as fairseq wrote them, without fairseq.

A checkpoint is a dict: ``cfg`` (nested; ``cfg["model"]`` holds the sizes) and ``model`` (name → tensor, plus one
nested dict under ``_ema``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from d2v_composer.errors import InputError
from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.models.safe_pickle import load_untrusted, plain

__all__ = ["FairseqCheckpoint", "Weights", "check_tensors", "read_fairseq_checkpoint"]

Weights = Literal["model", "ema"]

IMAGE = "modality_encoders.IMAGE."
ENCODER = "encoder."
ALIBI_SCALE = f"{IMAGE}alibi_scale"
# What pre-training needed and a teacher does not: data2vec 2.0's decoder and the heads of its losses.
LEFT = (f"{IMAGE}decoder.", "shared_decoder.", "recon_proj.", "cls_proj.")
FINE_TUNED = ("head.", "fc_norm.", "model.")


class FairseqCheckpoint(NamedTuple):
    """What a teacher needs of a checkpoint, and what was left."""

    config: Data2Vec2Config
    tensors: dict[str, Tensor]
    """Named as :class:`Data2Vec2`'s own, float32."""
    left: list[str]
    """The file's names of tensors that are not used."""


def read_fairseq_checkpoint(path: Path, weights: Weights = "model") -> FairseqCheckpoint:
    """Read and check a fairseq checkpoint; no code of the file runs.

    Args:
        path: A local file.
        weights: ``model``, or ``ema`` for the averaged weights that were the model's own teacher.

    Raises:
        InputError: The file is none, is damaged, is of another modality or kind, or lacks a tensor.
    """
    checkpoint = load_untrusted(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{path}: not a fairseq checkpoint: it has no dict 'model'")
    try:
        cfg = plain(checkpoint.get("cfg"))
    except RecursionError:
        raise InputError(f"{path}: 'cfg' refers to itself") from None
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        raise InputError(f"{path}: not a data2vec 2.0 checkpoint: it has no dict cfg['model'] with the sizes")

    stored: Any = checkpoint["model"]
    if weights == "ema":
        stored = stored.get("_ema")
        if not isinstance(stored, dict):
            raise InputError(f"{path}: holds no ema weights ('_ema'); allowed here: weights=model")
    stored = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    _check_supported(path, cfg["model"], stored)
    try:
        config = _read_config(cfg["model"], stored)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: unusable sizes in cfg['model']: {error}") from error

    left = [name for name in stored if name.startswith(LEFT)]
    tensors = {_our_name(name): tensor.float() for name, tensor in stored.items() if name not in set(left)}
    check_tensors(path, expected_shapes(config), tensors, their_name=_their_name)
    return FairseqCheckpoint(config, tensors, left)


def expected_shapes(config: Data2Vec2Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a teacher, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Data2Vec2(config).state_dict().items()}


def check_tensors(
    source: Any, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], their_name: Any = str
) -> None:
    """Refuse tensors that are missing, unknown, of another shape, or not finite.

    Args:
        source: Named in the error.
        expected: Name → shape.
        tensors: Name → what the file holds.
        their_name: Our name → the file's.

    Raises:
        InputError: It names the first such tensor, with both shapes.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: tensor {their_name(name)} {shape} is missing")
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise InputError(f"{source}: tensor {their_name(name)} has shape {found}, the sizes ask for {shape}")
        if not tensors[name].isfinite().all():
            raise InputError(f"{source}: tensor {their_name(name)} has values that are not finite")
    unknown = [their_name(name) for name in tensors if name not in expected]
    if unknown:
        found = tuple(tensors[next(name for name in tensors if name not in expected)].shape)
        raise InputError(f"{source}: {len(unknown)} tensor(s) that no image teacher has, first {unknown[0]} {found}")


def _check_supported(path: Path, model_cfg: dict[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Refuse other modalities and kinds of model in words of their own."""
    modalities = {name.split(".")[1] for name in stored if name.startswith("modality_encoders.")}
    others = sorted(modalities - {"IMAGE"})
    if others:
        raise InputError(
            f"{path}: {others[0].lower()} checkpoints are not supported, because only images are read here"
        )
    if any(name.startswith(FINE_TUNED) for name in stored):
        raise InputError(
            f"{path}: fine-tuned checkpoints are not supported, because the teacher is to be self-supervised: "
            "take the pre-trained file"
        )
    if not modalities:
        raise InputError(f"{path}: not a data2vec 2.0 image checkpoint: it has no tensor {IMAGE}*")
    if model_cfg.get("layer_norm_first", False):
        raise InputError(
            f"{path}: pre-norm models (layer_norm_first: true) are not supported, because the released image models "
            "are post-norm"
        )
    image_cfg = _image_cfg(model_cfg)
    if image_cfg.get("use_alibi_encoder", False):
        if image_cfg.get("alibi_dims", 2) != 2 or image_cfg.get("alibi_distance", "manhattan") != "manhattan":
            raise InputError(
                f"{path}: ALiBi with alibi_dims {image_cfg.get('alibi_dims', 2)} and alibi_distance "
                f"{image_cfg.get('alibi_distance')} is not supported, because images use 2 and manhattan"
            )
        if image_cfg.get("learned_alibi", False):
            raise InputError(f"{path}: learned_alibi is not supported, because only the scale of ALiBi is read")


def _image_cfg(model_cfg: dict[str, Any]) -> dict[str, Any]:
    modalities = model_cfg.get("modalities") or {}
    return modalities.get("image") or {} if isinstance(modalities, dict) else {}


def _read_config(model_cfg: dict[str, Any], stored: Mapping[str, Tensor]) -> Data2Vec2Config:
    """The sizes; what the file does not say takes data2vec's default."""
    image_cfg = _image_cfg(model_cfg)
    sizes: dict[str, Any] = {}
    for ours, section, theirs in (
        ("embed_dim", model_cfg, "embed_dim"),
        ("num_heads", model_cfg, "num_heads"),
        ("depth", model_cfg, "depth"),
        ("average_top_k_layers", model_cfg, "average_top_k_layers"),
        ("prenet_depth", image_cfg, "prenet_depth"),
        ("num_extra_tokens", image_cfg, "num_extra_tokens"),
        ("image_size", image_cfg, "input_size"),
        ("patch_size", image_cfg, "patch_size"),
        ("in_chans", image_cfg, "in_chans"),
    ):
        if section.get(theirs) is not None:
            sizes[ours] = _whole(theirs, section[theirs])
    for name in ("mlp_ratio", "norm_eps"):
        if model_cfg.get(name) is not None:
            sizes[name] = float(model_cfg[name])
    if image_cfg.get("use_alibi_encoder", False):
        default = sizes.get("num_heads", Data2Vec2Config.num_heads)
        sizes["num_alibi_heads"] = _whole("num_alibi_heads", image_cfg.get("num_alibi_heads") or default)
        sizes["alibi_scale_shape"] = _alibi_scale_shape(stored, sizes)
    depth = sizes.get("depth", Data2Vec2Config.depth)
    # As fairseq slices: where more layers are asked for than there are, all of them.
    sizes["average_top_k_layers"] = min(sizes.get("average_top_k_layers", depth), depth)
    return Data2Vec2Config(**sizes)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _alibi_scale_shape(stored: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> tuple[int, ...]:
    """The stored scale's own shape, where it is one of those that data2vec 2.0 writes: per layer and head or not."""
    if ALIBI_SCALE not in stored:
        raise ValueError(f"ALiBi is on, but tensor {ALIBI_SCALE} is missing")
    shape = tuple(stored[ALIBI_SCALE].shape)
    num_layers = sizes.get("prenet_depth", Data2Vec2Config.prenet_depth) + sizes.get("depth", Data2Vec2Config.depth)
    layers, heads = (1, num_layers), (1, sizes["num_alibi_heads"])
    if len(shape) != 5 or shape[0] not in layers or shape[2] not in heads or (shape[1], *shape[3:]) != (1, 1, 1):
        expected = f"({num_layers} or 1, 1, {sizes['num_alibi_heads']} or 1, 1, 1)"
        raise ValueError(f"tensor {ALIBI_SCALE} has shape {shape}, the sizes ask for {expected}")
    return shape


def _our_name(name: str) -> str:
    return ENCODER + name.removeprefix(IMAGE) if name.startswith(IMAGE) else name


def _their_name(name: str) -> str:
    return IMAGE + name.removeprefix(ENCODER) if name.startswith(ENCODER) else name

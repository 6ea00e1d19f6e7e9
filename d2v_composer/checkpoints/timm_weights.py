"""Load a timm model as a teacher, with weights from a file or the Hugging Face hub."""

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import timm
from timm.models import Beit, Eva, beit, eva, vision_transformer
from torch import Tensor

from d2v_composer.checkpoints.checkpoint import fetch_model
from d2v_composer.checkpoints.model_file import (
    FLOATS,
    Tensors,
    check_numbers,
    is_safetensors,
    loading_fault,
    read_model_file,
)
from d2v_composer.checkpoints.safe_load import load_untrusted
from d2v_composer.models.configs import ImageSize
from d2v_composer.models.provenance import Json, Record
from d2v_composer.models.timm_network import TimmModule, projection_width
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, materialize, teacher_config
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.fetch import fetch_from_hub

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Training programs nest the weights below these names; like timm, averaged ones before others.
NESTED = ("state_dict_ema", "model_ema", "model", "state_dict", "module", "teacher", "encoder")
# What they put before the names: DDP, torch.compile, and DINO beside its heads.
WRAPPERS = re.compile(r"^(module\.)?(_orig_mod\.)?(backbone\.)?")
# Parts of timm's models after the final norm.
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
# Tensors that a model of another kind has before or in its blocks. Leaving one out would change what it computes.
TOKENS = ("patch_embed.", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre.")
TRUNK = (*TOKENS, "blocks.", "rel_pos_bias.", "rope.")
# timm's filters drop the first for a model without biases; DINOv3's authors wrote zeros there.
BIASES = ("attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias")


def load_timm_teacher(
    path: str | Path | None, model: str, first_blocks: int | None, image_size: ImageSize | str | None
) -> TimmTeacher:
    """Load a frozen teacher ``timm/NAME``; see :func:`~d2v_composer.checkpoints.load.load_teacher`."""
    try:
        built = build_timm_model(model, image_size)
        config = teacher_config(model, built, first_blocks)
    except ValueError as error:
        raise InputError(str(error)) from error
    pretrained: Record = built.pretrained_cfg  # pyright: ignore[reportAssignmentType]: timm sets it
    file = fetch_pretrained(model, pretrained) if path is None else fetch_model(path)
    stored, about = read_state_dict(file)
    num_classes = len(stored["head.weight"]) if "head.weight" in stored else pretrained["num_classes"]
    built = materialize(build_timm_model(model, config.image_size, projection_width(num_classes)))
    try:
        has_head = load_weights(built, model, stored)
    except Exception as error:
        raise InputError(f"{file}: not weights of {model}: {loading_fault(error)}") from error
    license = pretrained.get("license") or "not stated by timm"
    provenance = {
        "model": model,
        "tag": pretrained.get("tag") if path is None else None,
        "timm": timm.__version__,
        "source": f"hub:{pretrained['hf_hub_id']}" if path is None else file_name(path),
        "license": license
        if path is None
        else f"not stated in the file; the license of timm's own weights is {license}",
    }
    provenance |= {"embedding": about["embedding"]} if "embedding" in about else {}
    with errors_of(str(file)):
        return TimmTeacher(built, config, provenance, has_head).identify(stored)


def fetch_pretrained(model: str, pretrained: Mapping[str, Json]) -> Path:
    """Return the local path of timm's pretrained weights, from the Hugging Face hub or the local cache."""
    repository, _, revision = str(pretrained.get("hf_hub_id") or "").partition("@")
    if not repository:
        raise InputError(f"{model}: timm has no pretrained weights for this model; set checkpoint to a file")
    names = [pretrained["hf_hub_filename"]] if pretrained.get("hf_hub_filename") else HUB_FILES
    try:
        return fetch_from_hub(repository, names, revision or None)
    except InputError as error:
        raise InputError(
            f"{model}: no pretrained weights: {error}; fetch them once with network access, or set checkpoint to a file"
        ) from error


def read_state_dict(file: Path) -> tuple[Tensors, Record]:
    """Read a weight file's tensors, floating-point ones as float32, and its provenance if this package wrote it."""
    contents: Any
    if is_safetensors(file):
        _, _, provenance, contents = read_model_file(file)
    else:
        provenance, contents = {}, load_untrusted(file)
    while nested := [name for name in NESTED if isinstance(contents, dict) and isinstance(contents.get(name), dict)]:
        contents = contents[nested[0]]
    items = contents.items() if isinstance(contents, dict) else ()
    tensors = {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}
    if not tensors:
        raise InputError(f"{file}: not a weight file: it has no dict of tensors")
    # Other numbers stay as they are, such as quantized weights, which are no weights of a timm model.
    tensors = {name: tensor.float() if tensor.dtype in FLOATS else tensor for name, tensor in tensors.items()}
    return tensors, provenance


def load_weights(built: TimmModule, model: str, stored: Tensors) -> bool:
    """Load a file's tensors into a model after timm's conversion; see :func:`checkpoint_filter`.

    Returns:
        True if the model has a head that computes an embedding, as CLIP's does, and the file has the head's weights.
    """
    named = {WRAPPERS.sub("", name): tensor for name, tensor in stored.items()}
    if len(named) < len(stored):  # two weights with one name: one would silently win
        raise ValueError("it holds two models, whose tensor names differ only in a prefix such as 'module.'; keep one")
    patch = built.patch_embed.proj
    kernels = [tensor for name, tensor in named.items() if tensor.ndim == 4 or "patch" in name]
    if not any(kernel.numel() == patch.weight.numel() for kernel in kernels):
        # timm would resample others
        raise ValueError(
            f"it has no {' x '.join(map(str, patch.kernel_size))} pixel patch embedding of the model's width"
        )
    biases = [name for name, tensor in named.items() if name.endswith(BIASES[0]) and tensor.any()]
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # timm prints each bias that a model lacks
        warnings.simplefilter("ignore")  # about the speed of timm's resampling
        tensors = checkpoint_filter(built, model)(named, built)
    if biases and not any(name.endswith(BIASES) for name in tensors):
        raise ValueError(f"the file has {biases[0]}, but the model does not; use a timm model whose name ends in _qkvb")
    if not built.num_classes:  # a head of classes
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS[:2])}
    check_numbers({name: tensor for name, tensor in tensors.items() if name.startswith((*TRUNK, *HEADS))})
    missing, unknown = built.load_state_dict(tensors, strict=False)
    of_head = {name for name in built.state_dict() if name.startswith(HEADS)}
    wrong = [name for name in missing if name not in of_head or not of_head.issubset(missing)]
    if wrong or (wrong := [name for name in unknown if name.startswith(TRUNK)]):
        raise ValueError(f"tensor {wrong[0]} is {'missing' if wrong[0] in missing else 'unknown'}")
    return bool(built.num_classes or getattr(built, "attn_pool", None) is not None) and of_head.isdisjoint(missing)


def checkpoint_filter(built: TimmModule, model: str) -> Callable[..., Tensors]:
    """Return timm's function that converts a file's tensors for a model of this class and name."""
    if isinstance(built, Eva):
        return eva.checkpoint_filter_fn
    if isinstance(built, Beit):
        return beit.checkpoint_filter_fn
    options: dict[str, Any] = {}
    if "flexi" in model or "radio" in model:
        aligned = getattr(vision_transformer, "_RADIO_ALIGN_CORNERS", ())
        is_aligned = any(name in model for name in aligned) or None
        options = {"interpolation": "bilinear", "antialias": False, "align_corners": is_aligned}
    return partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True, **options)

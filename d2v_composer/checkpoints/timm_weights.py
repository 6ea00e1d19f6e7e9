"""Load a teacher from timm: its model's weights from a local file or the Hugging Face hub, without running their code.

Files are those of timm, or of a model's authors if timm converts them. timm's own filters rename the tensors, and
resample positions to another image size.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import Beit, Eva, beit, eva, vision_transformer, vision_transformer_hybrid
from torch import Tensor, nn

from d2v_composer.checkpoints.resume import fetch_model
from d2v_composer.checkpoints.safe_load import Stub, load_untrusted
from d2v_composer.checkpoints.student_file import FLOATS, check_tensors, is_safetensors, read_tensors, sha256
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.timm_teacher import TimmTeacher, build_timm_model, materialize, teacher_config
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import is_lasting, reason

log = logging.getLogger(__name__)

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

# In the errors of a model's sizes.
SIZE = re.compile(r"^(first_blocks|image_size)\b")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Training programs nest the weights below these names; like timm, averaged ones before others.
NESTED = ("state_dict_ema", "model_ema", "model", "state_dict", "module", "teacher", "encoder")
# What they put before the names: DDP, torch.compile, and DINO beside its heads.
WRAPPERS = ("module.", "_orig_mod.", "backbone.")
# Parts of timm's models after the final norm: no teacher needs them.
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
# Tensors that a model of another kind has before or in its blocks. Leaving one out would change what it computes.
TOKENS = ("patch_embed.", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre.")
TRUNK = (*TOKENS, "blocks.", "rel_pos_bias.", "rope.")
# timm's filters drop this one for a model without it; DINOv3's authors wrote zeros there.
QKV_BIAS = "attn.qkv.bias"
# Of the models' authors too, whose names timm's filters change.
PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "patchifier.proj.weight", "vision_embed.proj.weight")


def load_timm_teacher(
    path: str | Path | None,
    model: str,
    first_blocks: int | None = None,
    image_size: ImageSize | str | None = None,
    option: Callable[[str], str] = str,
) -> TimmTeacher:
    """Load a frozen teacher, in eval mode and float32.

    Args:
        path: A .safetensors or PyTorch file: a local path, https://, or an object store's address. ``None``: timm's
            pretrained weights, from the hub or its cache.
        model: ``timm/NAME``.
        first_blocks: Blocks in the shared encoder; default a sixth of all.
        image_size: Pixels a side, or (height, width); default timm's for this model.
        option: The name of one of these arguments → what the user sets it with, for errors.

    Raises:
        InputError: The model cannot be a teacher, or the file is not one of its weights.
    """
    try:
        built = build_timm_model(model, image_size)
        config = teacher_config(model, built, first_blocks)
    except ValueError as error:
        raise InputError(SIZE.sub(lambda name: option(name[0]), str(error))) from error
    pretrained: Mapping[str, Any] = built.pretrained_cfg  # pyright: ignore[reportAssignmentType]: timm sets it
    file = fetch_pretrained(model, pretrained, option) if path is None else fetch_model(path)
    source = f"hub:{pretrained['hf_hub_id']}" if path is None else file_name(path)
    stored = {name: with_own_memory(in_float32(tensor)) for name, tensor in read_state_dict(file).items()}
    tensors = to_timm(file, built, model, stored)
    expected = {name: tuple(each.shape) for name, each in built.state_dict().items() if not name.startswith(HEADS)}
    foreign = [name for name in tensors if name not in expected and name.startswith(TRUNK)]
    if foreign:
        raise InputError(f"{file}: not weights of {model}: it has no tensor {foreign[0]}")
    used = {name: tensor for name, tensor in tensors.items() if name in expected}
    check_tensors(file, expected, used)
    left = unused_names(stored, used, partial(to_timm, file, built, model))
    biases = [name for name in left if name.endswith(QKV_BIAS) and stored[name].any()]
    if biases:
        raise InputError(f"{file}: not weights of {model}, which has no {biases[0]}; timm has names ending in _qkvb")
    if any(unwrapped(name).startswith("norm.") for name in left):
        log.warning("%s: its final norm is not used, since timm's %s has none", file, model)
    materialize(built).load_state_dict(used, strict=False)
    provenance = {
        "model": model,
        "tag": pretrained.get("tag") if path is None else None,
        "timm": timm.__version__,
        "source": source,
        "sha256": sha256(file),
        "licence": licence_of(pretrained, is_pretrained=path is None),
        "left": left,
    }
    return TimmTeacher(built, config, provenance)


def licence_of(pretrained: Mapping[str, Any], is_pretrained: bool) -> str:
    """Return the licence that timm states for its pretrained weights; another file may have another one."""
    stated = pretrained.get("license") or "not stated by timm"
    return stated if is_pretrained else f"of the file; timm states for its own weights of this model: {stated}"


def fetch_pretrained(model: str, pretrained: Mapping[str, Any], option: Callable[[str], str]) -> Path:
    """Return timm's pretrained weights in the hub's cache, after fetching them.

    The hub's own variables hold: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.

    Raises:
        InputError: There are none, or they are neither in the cache nor reachable.
    """
    repository, _, revision = str(pretrained.get("hf_hub_id") or "").partition("@")
    if not repository:
        raise InputError(f"{model}: timm has no pretrained weights on the hub: give {option('checkpoint')}, a file")
    names = [pretrained["hf_hub_filename"]] if pretrained.get("hf_hub_filename") else HUB_FILES
    problem, is_unreachable = "it has none of " + ", ".join(names), False
    for name in names:
        try:
            # An unreachable hub is not asked again, which takes half a minute; the cache may have the next name.
            options = {"revision": revision or None, "local_files_only": is_unreachable}
            return Path(hf_hub_download(repository, name, **options))
        except LocalEntryNotFoundError as error:
            if not is_unreachable:
                problem = f"not in the cache, and the hub cannot be reached ({reason(error)[:200]})"
            is_unreachable = is_unreachable or not is_lasting(error)
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problem = reason(error)[:200]
            break
    raise InputError(
        f"{model}: no pretrained weights of {repository} on the Hugging Face hub: {problem}; fetch them once with "
        f"network access, or give {option('checkpoint')}, a file"
    )


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file of weights.

    Raises:
        InputError: It is truncated, or holds anything that would be code.
    """
    if is_safetensors(file):
        return read_tensors(file)
    if file.suffix == ".npz":
        raise InputError(f"{file}: NumPy's files (JAX weights) are not read: use timm's .safetensors of this model")
    contents = load_untrusted(file)
    while isinstance(contents, dict):
        refuse_calls(file, contents)
        nested = next((name for name in NESTED if isinstance(contents.get(name), dict)), None)
        if nested is None:
            break
        contents = contents[nested]
    found = contents.items() if isinstance(contents, dict) else ()
    tensors = {str(name): each for name, each in found if isinstance(each, Tensor)}
    if not tensors:
        raise InputError(f"{file}: not a file of weights: it has no dict of tensors")
    return tensors


def refuse_calls(file: Path, contents: Mapping[Any, Any]) -> None:
    """Refuse a file in which a value comes from calling a function, though it was not called.

    An object with attributes, such as a program's arguments, is left alone.

    Raises:
        InputError: It names the value.
    """
    for name, value in contents.items():
        if isinstance(value, Stub) and not (value.args == () and isinstance(value.state, dict) and value.state):
            raise InputError(f"{file}: {name} would run code when loaded, or is no plain tensor: use a .safetensors")


def to_timm(file: Path, built: nn.Module, model: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply timm's filter: the model's names, and positions resampled to its grid.

    Raises:
        InputError: These are not weights of such a model.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if (bare := unwrapped(name)) in named:
            raise InputError(f"{file}: holds {bare} twice, the second one as {name}: keep one of both models")
        named[bare] = tensor
    check_patches(file, built, model, named)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # timm prints each bias that a model lacks
            warnings.simplefilter("ignore")  # of the speed of timm's resampling
            return checkpoint_filter(built, model)(named, built)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not weights of {model} ({reason(error)[:200]})") from error


def unwrapped(name: str) -> str:
    """Return a tensor's name without what training programs put before it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def check_patches(file: Path, built: Any, model: str, stored: Mapping[str, Tensor]) -> None:
    """Refuse weights of patches of another size, which timm would resample.

    Raises:
        InputError: It names both sizes.
    """
    if not isinstance(built.patch_embed.proj, nn.Conv2d):
        return
    expected = built.patch_embed.proj.kernel_size
    for name, tensor in stored.items():
        if (name.endswith(PATCHES) or name == "conv1.weight") and tensor.ndim == 4 and tensor.shape[2:] != expected:
            found = tuple(tensor.shape[2:])
            raise InputError(f"{file}: not weights of {model}: its patches have {found} pixels, not {expected}")


def in_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, unless it holds other numbers, such as quantized weights."""
    return tensor.float() if tensor.dtype in FLOATS else tensor


def with_own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor that is no part of another one's memory, by which :func:`unused_names` tells tensors apart."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def checkpoint_filter(built: Any, model: str) -> Callable[..., dict[str, Tensor]]:
    """Return the filter that timm's factory uses for a model."""
    if isinstance(built, Eva):
        return eva.checkpoint_filter_fn
    if isinstance(built, Beit):
        return beit.checkpoint_filter_fn
    if isinstance(built.patch_embed, HybridEmbed):
        return vision_transformer_hybrid.checkpoint_filter_fn
    options: dict[str, Any] = {}
    if "flexi" in model or "radio" in model:
        aligned = getattr(vision_transformer, "_RADIO_ALIGN_CORNERS", ())
        is_aligned = any(name in model for name in aligned) or None
        options = {"interpolation": "bilinear", "antialias": False, "align_corners": is_aligned}
    return partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True, **options)


def unused_names(stored: dict[str, Tensor], used: Mapping[str, Tensor], convert: Convert) -> list[str]:
    """Return the file's names of tensors that the teacher does not use.

    timm's filters rename, join and resample tensors: one is used if a teacher's tensor has its memory or depends on it.
    """
    memory = {address(tensor) for tensor in used.values()}
    suspects = [name for name, tensor in stored.items() if name not in used and address(tensor) not in memory]
    read = find_read(suspects, stored, used, convert)
    return [name for name in suspects if name not in read]


def find_read(names: Sequence[str], stored: dict[str, Tensor], used: Iterable[str], convert: Convert) -> set[str]:
    """Return those of some tensors that reach the teacher, by halves: most often none does."""
    if not names or not are_read(names, stored, used, convert):
        return set()
    if len(names) == 1:
        return set(names)
    middle = len(names) // 2
    return set().union(*(find_read(half, stored, used, convert) for half in (names[:middle], names[middle:])))


def are_read(names: Sequence[str], stored: dict[str, Tensor], used: Iterable[str], convert: Convert) -> bool:
    """Return whether the values of any of these tensors reach the teacher: NaN in their place would."""
    unchanged = {address(tensor) for tensor in stored.values()}
    nan = torch.full((), torch.nan)
    try:
        converted = convert(stored | {name: nan.expand(stored[name].shape) for name in names})
    except InputError:  # of a computation with NaN
        return True
    computed = [converted[each] for each in used if address(converted[each]) not in unchanged]
    return any(tensor.isnan().any() for tensor in computed)


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; views share it."""
    return tensor.untyped_storage().data_ptr()

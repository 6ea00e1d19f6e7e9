"""The frozen encoder of a timm ViT: what comes before its blocks, and the first of them.

Shapes: B images, T time steps, D channels, L blocks, H heads.
"""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models import Beit, Eva, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2v_composer.models.block import FfnBlock
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.sizes import MAX_PATCHES, ImageSize, check_whole, height_and_width
from d2v_composer.models.timm_block import TimmBlock, check_block
from d2v_composer.models.timm_config import NUM_OUTPUTS, PREFIX, TimmEncoderConfig, parse_image_size
from d2v_composer.models.timm_contexts import FixedContexts, take_contexts

__all__ = ["TimmEncoder", "TimmParts", "build_timm_model", "encoder_config", "materialize"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CLASSES = (VisionTransformer, Eva, Beit)
STEMS = (PatchEmbed, HybridEmbed)
# What a file says of itself. Weights of another tag may have another preprocessing: the file's counts.
OF_A_FILE = ("image_mean", "image_std", "interpolation", "timm", "outputs")
# Spreads a few outputs over time steps and channels; it is prime.
OUTPUT_STEP = 1_000_003


def build_timm_model(model: str, image_size: ImageSize | str | None = None) -> nn.Module:
    """Build one of timm's models on the meta device, without a classifier; :func:`materialize` gives it memory.

    Args:
        model: ``timm/NAME``.
        image_size: Default: that of timm's data config, less what is left of a patch.

    Raises:
        ValueError: There is no such model, or it cannot be a teacher, or not at this size.
    """
    name = model.removeprefix(PREFIX)
    if name == model or not timm.is_model(name):
        raise ValueError(f"no model {model!r}; allowed are timm/NAME, NAME as timm.list_models() shows it")
    built = create_on_meta(name)
    if not isinstance(built, CLASSES):
        allowed = ", ".join(kind.__name__ for kind in CLASSES)
        raise ValueError(f"{model} is a {type(built).__name__}; only timm's classes {allowed} can be teachers")
    for block in built.blocks:
        check_block(block)
    data = resolve_data_config(pretrained_cfg=built.pretrained_cfg)
    patch = patch_shape(model, built.patch_embed)
    if image_size is None:  # timm leaves out what is left of a patch at the edge
        shape = tuple(size // each * each for size, each in zip(data["input_size"][1:], patch, strict=True))
    else:
        shape = height_and_width(parse_image_size(image_size))
    check_patches(shape, patch)
    return create_on_meta(name, num_classes=0, img_size=shape).eval()


def patch_shape(model: str, stem: Any) -> tuple[int, int]:
    """Return the pixels of a time step: of a patch, times the stride of the convolutions before it.

    Raises:
        ValueError: The stem's kind is not supported.
    """
    if type(stem) not in STEMS:
        allowed = ", ".join(kind.__name__ for kind in STEMS)
        raise ValueError(f"{model} has a stem of kind {type(stem).__name__}; supported are {allowed}")
    (height, width), (rows, columns) = stem.img_size, stem.grid_size
    return height // rows, width // columns


def create_on_meta(name: str, **options: Any) -> Any:
    """Call timm's factory on the meta device.

    Raises:
        ValueError: The name's tag is unknown, or an option does not fit the model.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"timm/{name}: {error}") from error


def check_patches(shape: tuple[int, int], patch_shape: tuple[int, int]) -> None:
    """Check the size of images against a patch's.

    Raises:
        ValueError: The patch does not divide it, or there would be too many patches.
    """
    if any(size % patch for size, patch in zip(shape, patch_shape, strict=True)):
        patch, found = (" x ".join(map(str, each)) for each in (patch_shape, shape))
        raise ValueError(f"image_size must be a multiple of the patch, {patch} pixels, got {found}")
    num_patches = math.prod(shape) // math.prod(patch_shape)
    if num_patches > MAX_PATCHES:
        raise ValueError(f"images must have at most {MAX_PATCHES} patches, got {num_patches}")


def encoder_config(model: str, built: Any, first_blocks: int) -> TimmEncoderConfig:
    """Return the sizes of a built model.

    Raises:
        ValueError: ``first_blocks`` leaves no block to the teacher.
    """
    check_whole("first_blocks", first_blocks, 0, len(built.blocks) - 1)
    data = resolve_data_config(pretrained_cfg=built.pretrained_cfg)
    return TimmEncoderConfig(
        model=model,
        first_blocks=first_blocks,
        embed_dim=built.embed_dim,
        num_heads=built.blocks[0].attn.num_heads,
        num_extra_tokens=built.num_prefix_tokens,
        has_cls_token=built.cls_token is not None,
        image_size=parse_image_size(tuple(built.patch_embed.img_size)),
        grid_size=tuple(built.patch_embed.grid_size),
        in_chans=built.in_chans,
        image_mean=tuple(data["mean"]),
        image_std=tuple(data["std"]),
        interpolation=data["interpolation"],
        timm=timm.__version__,
    )


class TimmParts(NamedTuple):
    """A timm model, taken apart."""

    stem: nn.Module
    """The model without the other parts: its ``forward_features`` is what comes before the blocks."""
    blocks: list[TimmBlock]
    contexts: FixedContexts
    """Of all blocks."""
    norm: nn.Module
    """The final norm; an Identity in some models."""

    @classmethod
    def of(cls, model: Any) -> "TimmParts":
        """Take a model apart, which is changed. timm's code before the blocks thus stays timm's."""
        contexts = take_contexts(model)
        blocks, norm = [TimmBlock(block) for block in model.blocks], model.norm
        model.blocks = nn.Sequential()
        model.attn_pool = None
        model.norm = model.fc_norm = model.head = nn.Identity()
        return cls(model, blocks, contexts, norm)


def materialize(module: ModuleT) -> ModuleT:
    """Give a module from the meta device memory, unless meta is the current device; its parameters are not set."""
    device = torch.get_default_device()
    if device.type != "meta":
        module.to_empty(device=device)
        for part in module.modules():
            if hasattr(part, "init_non_persistent_buffers"):
                cast("Any", part).init_non_persistent_buffers()
    return module


class TimmEncoder(Encoder):
    """The encoder.

    Args:
        config: The sizes.
        parts: The parts of a model of these sizes; default: new ones, into which a state dict must be loaded.

    Raises:
        ValueError: There is no such model, or it has other sizes.
    """

    config: TimmEncoderConfig

    def __init__(self, config: TimmEncoderConfig, parts: TimmParts | None = None) -> None:
        super().__init__(config)
        is_new = parts is None
        if parts is None:
            model = build_timm_model(config.model, config.image_size)
            found = encoder_config(config.model, model, config.first_blocks)
            found = replace(found, **{name: getattr(config, name) for name in OF_A_FILE})
            if config != found:
                name = next(name for name, value in vars(found).items() if value != getattr(config, name))
                raise ValueError(
                    f"{config.model} has {name} {getattr(found, name)} in timm {timm.__version__}, not "
                    f"{getattr(config, name)}"
                )
            parts = TimmParts.of(model)
        self.stem: Any = parts.stem
        self.blocks = nn.ModuleList(parts.blocks[: config.first_blocks])
        self.contexts = parts.contexts.of_blocks(0, config.first_blocks)
        if is_new:
            for part in (self.stem, self.blocks, self.contexts):
                materialize(part)

    @property
    def block_list(self) -> list[FfnBlock]:
        return cast("list[FfnBlock]", list(self.blocks))

    @cached_property
    def stem_macs(self) -> int:
        if isinstance(self.stem.patch_embed, PatchEmbed):
            return super().stem_macs
        shape = (1, self.config.in_chans, *height_and_width(self.config.image_size))
        model: Any = build_timm_model(self.config.model, self.config.image_size)  # without memory
        with FlopCounterMode(display=False) as counter:
            model.patch_embed(torch.empty(shape, device="meta"))
        return counter.get_total_flops() // 2

    def embed_patches(self, images: Tensor) -> Tensor:
        return self.stem.forward_features(self.prepare(images))

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        return self.contexts(x_BTD)

    def sample_outputs(self) -> tuple[float, ...]:
        """Return a few numbers of what this encoder, on a CPU and in float32, computes of a fixed image."""
        shape = (1, self.config.in_chans, *height_and_width(self.config.image_size))
        image = (torch.arange(math.prod(shape)) * 7919 % 251).to(torch.uint8).view(shape)
        with torch.autocast("cpu", enabled=False):
            output = self(image).flatten()
        return tuple(output[torch.arange(NUM_OUTPUTS) * OUTPUT_STEP % len(output)].tolist())

"""A teacher from timm: any of its VisionTransformer, Eva and Beit models.

Shapes: B images, T time steps, D channels, L blocks.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
from typing_extensions import Self

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import (
    MAX_DEPTH,
    MAX_PATCHES,
    MAX_WIDTH,
    MEAN_RANGE,
    STD_RANGE,
    Encoder,
    ImageSize,
    check_channels,
    check_whole,
    height_and_width,
    is_number,
)
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_blocks import FixedContexts, RelativeBias, TimmBlock, check_block, take_contexts

# MERGED FROM d2v_composer/models/timm_teacher.py: Sizes of timm's ViTs as encoders and teachers; this module does

PREFIX = "timm/"
INTERPOLATIONS = ("bicubic", "bilinear")
# Of the students.
NORM_EPS = 1e-6
NUM_OUTPUTS = 32
"""How many of an encoder's outputs an exported file has."""


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig:
    """Sizes of a timm ViT's encoder. The model's name gives all others.

    Raises:
        ValueError: A size is out of range.
    """

    model: str
    """``timm/NAME``, NAME as ``timm.create_model`` takes it."""
    first_blocks: int
    """Number of blocks in the encoder."""
    embed_dim: int
    num_heads: int
    num_extra_tokens: int
    has_cls_token: bool
    image_size: ImageSize
    grid_size: tuple[int, int]
    in_chans: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    interpolation: str
    timm: str
    """The version of timm that built it."""
    outputs: tuple[float, ...] = ()
    """A few numbers of what it computes of a fixed image, in an exported file: another version of timm may build
    something else under the same name."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ValueError(f"model must be timm/NAME, got {self.model!r}")
        check_whole("first_blocks", self.first_blocks, 0, MAX_DEPTH)
        if parse_image_size(self.image_size) != self.image_size:
            raise ValueError(f"image_size must be one number for a square, else two, got {self.image_size!r}")
        check_whole("in_chans", self.in_chans, 1, MAX_WIDTH)
        check_channels("image_mean", self.image_mean, self.in_chans, MEAN_RANGE)
        check_channels("image_std", self.image_std, self.in_chans, STD_RANGE)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be {' or '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not isinstance(self.timm, str) or not re.fullmatch(r"[\w.+-]{1,50}", self.timm):
            raise ValueError(f"timm must be a version, got {self.timm!r}")
        if not isinstance(self.outputs, tuple) or len(self.outputs) not in (0, NUM_OUTPUTS):
            raise ValueError(f"outputs must be {NUM_OUTPUTS} numbers, or none")
        if not all(is_number(each, -1e30, 1e30) for each in self.outputs):
            raise ValueError("outputs must be numbers")

    @property
    def is_normalized(self) -> bool:
        return False

    @property
    def norm_eps(self) -> float:
        return NORM_EPS

    @property
    def patch_size(self) -> int:
        return height_and_width(self.image_size)[0] // self.grid_size[0]

    @property
    def prenet_depth(self) -> int:
        """:attr:`first_blocks`, under data2vec's name."""
        return self.first_blocks

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_steps(self) -> int:
        return self.num_extra_tokens + self.num_patches


@dataclass(frozen=True, kw_only=True)
class TimmTeacherConfig(TimmEncoderConfig):
    """Sizes of a timm ViT."""

    depth: int
    """Number of blocks after the encoder."""

    @property
    def average_top_k_layers(self) -> int:
        """All blocks."""
        return self.depth

    def encoder_config(self) -> TimmEncoderConfig:
        """Return the sizes of the encoder alone."""
        return TimmEncoderConfig(**{each.name: getattr(self, each.name) for each in fields(TimmEncoderConfig)})


def parse_image_size(image_size: Any) -> ImageSize:
    """Return an image size from any source: pixels a side, or (height, width) if they differ.

    Raises:
        ValueError: It is neither a number of pixels, nor two, nor text such as '112x168'.
    """
    if isinstance(image_size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", image_size):
        image_size = tuple(map(int, image_size.split("x")))
    elif isinstance(image_size, str):
        raise ValueError(f"image_size must be a number of pixels or HEIGHTxWIDTH, got {image_size!r}")
    shape: Any = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(shape) not in (1, 2):
        raise ValueError(f"image_size must be a whole number, or height and width, got {image_size!r}")
    for size in shape:
        check_whole("image_size", size, 1, MAX_WIDTH)
    return shape[0] if shape[0] == shape[-1] else (shape[0], shape[-1])


# MERGED FROM d2v_composer/models/timm_teacher.py: The frozen encoder of a timm ViT: what comes before its blocks,

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


ATTENTION_TENSORS = "proj.bias, proj.weight, qkv.bias, qkv.weight"
"""Of a student's attention."""


def teacher_config(model: str, built: Any, first_blocks: int | None = None) -> TimmTeacherConfig:
    """Return the sizes of a built model.

    Args:
        model: ``timm/NAME``.
        built: The model.
        first_blocks: Blocks in the encoder; default a sixth of all, as in data2vec 2.0 base.

    Raises:
        ValueError: ``first_blocks`` leaves no block to the teacher.
    """
    num_blocks = len(built.blocks)
    first_blocks = round(num_blocks / 6) if first_blocks is None else first_blocks
    encoder = encoder_config(model, built, first_blocks)
    return TimmTeacherConfig(**vars(encoder), depth=num_blocks - first_blocks)


class TimmTeacher(Teacher):
    """The teacher, frozen and in eval mode.

    Args:
        model: timm's model with its weights; it is taken apart.
        config: Its sizes.
        provenance: Origin of the weights, stored with what is derived from them.
    """

    config: TimmTeacherConfig

    def __init__(self, model: nn.Module, config: TimmTeacherConfig, provenance: dict[str, Any] | None = None) -> None:
        parts = TimmParts.of(model)
        first, num_blocks = config.first_blocks, len(parts.blocks)
        super().__init__(TimmEncoder(config.encoder_config(), parts), parts.blocks[first:], config, provenance)
        self.contexts = parts.contexts.of_blocks(first, num_blocks)
        self.norm = parts.norm
        self.freeze()

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast relative biases too: the attention computes in this dtype."""
        for part in self.modules():
            if isinstance(part, RelativeBias):
                part.to(dtype)
        return super().cast_weights(dtype)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Make the final norm a unit too; a root stays gathered."""
        return super().fsdp_wrap_fn(module) or (module is self.norm and any(True for _ in module.parameters()))

    @property
    def block_list(self) -> list[TimmBlock]:
        return cast("list[TimmBlock]", list(self.blocks))

    def block_contexts(self, x_BTD: Tensor) -> list[Tensor | None]:
        return self.contexts(x_BTD)

    def mask_padding(
        self, contexts: list[Tensor | None], padding_mask_BT: Tensor, dtype: torch.dtype
    ) -> list[Tensor | None]:
        raise ValueError("a timm teacher takes no padding mask: images have no padding")

    def forward_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return what timm's ``forward_features`` gives, with the final norm, and every FFN output, (B, T, D) each."""
        output_BTD, ffn_outputs = super().forward_blocks(x, padding_mask)
        return self.norm(output_BTD), ffn_outputs

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        blocks, name = [block.block for block in self.block_list], self.config.model
        if init == "teacher_blocks":
            kind = type(blocks[0]).__name__
            raise ValueError(f"init teacher_blocks needs data2vec 2.0's post-norm blocks, {name} has {kind}")
        attentions = [block.attn for block in blocks]
        found = ", ".join(sorted(parameter for parameter, _ in attentions[0].named_parameters()))
        if found != ATTENTION_TENSORS or self.contexts.table is not None:
            raise ValueError(
                f"init teacher_attention needs an attention of {ATTENTION_TENSORS} without rotary positions or "
                f"relative bias, {name} has {type(attentions[0]).__name__} of {found}"
            )
        return attentions

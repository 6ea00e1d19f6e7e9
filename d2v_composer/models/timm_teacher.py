"""Teachers from timm: its VisionTransformer, Eva and Beit models, and their frozen encoders.

Shapes: B images, T tokens, D channels, L blocks.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.patch_embed import PatchEmbed
from timm.models import Beit, Eva, VisionTransformer
from torch import Tensor, nn

from d2v_composer.models.backbone import Projection, Transformer
from d2v_composer.models.configs import (
    MAX_PATCHES,
    ImageSize,
    TeacherConfig,
    TimmEncoderConfig,
    check_whole,
    height_and_width,
    parse_image_size,
)
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.features import Features
from d2v_composer.models.images import PatchProjection, PixelEncoder
from d2v_composer.models.names import timm_name
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_blocks import FixedContexts, TimmBlock, check_block, take_contexts

CLASSES = (VisionTransformer, Eva, Beit)
# Fields in which a file may differ from timm: weights of another tag may have another preprocessing.
OF_A_FILE = ("image_mean", "image_std", "interpolation", "timm", "outputs")
# Parts of a model after its final norm.
HEAD = ("attn_pool", "fc_norm", "head_drop", "head")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def build_timm_model(model: str, image_size: ImageSize | str | None = None, num_outputs: int = 0) -> nn.Module:
    """Build a timm model on the meta device, without a classifier; :func:`materialize` gives it memory.

    Args:
        model: ``timm/NAME``.
        image_size: Pixels per side, or height and width; default: timm's size, rounded down to whole patches.
        num_outputs: Number of outputs of a projection at the model's end; 0 for no projection.

    Raises:
        ValueError: There is no such model, or it cannot be a teacher, or not at this size.
    """
    name = timm_name(model)
    built = create_on_meta(name)
    if not isinstance(built, CLASSES):
        allowed = ", ".join(kind.__name__ for kind in CLASSES)
        raise ValueError(f"{model} is a {type(built).__name__}; only timm's classes {allowed} can be teachers")
    stem: Any = built.patch_embed
    if type(stem) is not PatchEmbed:
        raise ValueError(f"{model} has a {type(stem).__name__} stem; only PatchEmbed is supported")
    for block in built.blocks:
        check_block(block)
    patch = cast("tuple[int, int]", stem.patch_size)
    if image_size is None:  # timm leaves out what is left of a patch at the edge
        data = resolve_data_config(pretrained_cfg=built.pretrained_cfg)
        shape = tuple(size // side * side for size, side in zip(data["input_size"][1:], patch, strict=True))
    else:
        shape = height_and_width(parse_image_size(image_size))
    if any(size % side for size, side in zip(shape, patch, strict=True)):
        expected, actual = (" x ".join(map(str, sizes)) for sizes in (patch, shape))
        raise ValueError(f"image_size must be a multiple of the patch size, {expected} pixels, got {actual}")
    check_whole("number of patches", math.prod(shape) // math.prod(patch), 1, MAX_PATCHES)
    return create_on_meta(name, num_classes=num_outputs, img_size=shape).eval()


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


def teacher_config(model: str, built: Any, first_blocks: int | None = None) -> TeacherConfig:
    """Return the sizes of a built model.

    Args:
        model: ``timm/NAME``.
        built: The model.
        first_blocks: Number of blocks in the encoder; default: a sixth of all, as in data2vec 2.0 base.

    Raises:
        ValueError: ``first_blocks`` leaves no block to the teacher.
    """
    num_blocks = len(built.blocks)
    first_blocks = round(num_blocks / 6) if first_blocks is None else first_blocks
    check_whole("first_blocks", first_blocks, 0, num_blocks - 1)
    data = resolve_data_config(pretrained_cfg=built.pretrained_cfg)
    encoder = TimmEncoderConfig(
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
    depth = num_blocks - first_blocks
    return TeacherConfig(encoder=encoder, depth=depth, average_top_k_layers=depth)


class TimmParts(NamedTuple):
    """A timm model, taken apart."""

    stem: nn.Module
    """The model without the other parts: its ``forward_features`` computes everything before the blocks."""
    blocks: list[TimmBlock]
    contexts: FixedContexts
    norm: nn.Module
    """The final norm; an Identity in some models."""

    @classmethod
    def of(cls, model: Any) -> "TimmParts":
        """Take a model apart, in place; timm's own code still computes everything before the blocks."""
        contexts = take_contexts(model)
        blocks, norm = [TimmBlock(block) for block in model.blocks], model.norm
        model.blocks = nn.Sequential()
        model.attn_pool = None
        model.norm = model.fc_norm = model.head = nn.Identity()
        return cls(model, blocks, contexts, norm)


def materialize(module: ModuleT) -> ModuleT:
    """Allocate memory for a meta module, unless meta is the default device; its parameters stay unset."""
    device = torch.get_default_device()
    if device.type != "meta":
        module.to_empty(device=device)
        for part in module.modules():
            if hasattr(part, "init_non_persistent_buffers"):
                cast("Any", part).init_non_persistent_buffers()
    return module


class TimmHead(Projection):
    """The head of a timm model, from the final norm to the projection, in timm's code.

    Args:
        model: The model, before it is taken apart.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.num_outputs = model.num_classes
        self.norm = copy.deepcopy(model.norm)
        self.model = copy.copy(model)
        self.model._modules = {name: getattr(model, name, None) for name in HEAD}
        self.model._parameters, self.model._buffers = {}, {}

    def forward(self, features: Features, output_BTD: Tensor) -> Tensor:
        return self.model.forward_head(output_BTD)


class TimmEncoder(PixelEncoder):
    """A timm ViT's encoder: everything before its blocks, and the first blocks.

    Args:
        config: Sizes.
        parts: Parts of a model of these sizes; default: new ones, into which a state dict must be loaded.

    Raises:
        ValueError: There is no such model, or it has other sizes.
    """

    config: TimmEncoderConfig

    def __init__(self, config: TimmEncoderConfig, parts: TimmParts | None = None) -> None:
        super().__init__(config)
        is_new = parts is None
        if parts is None:
            model = build_timm_model(config.model, config.image_size)
            sizes = teacher_config(config.model, model, config.first_blocks)
            for name, value in sizes.encoder:
                if name not in OF_A_FILE and value != (given := getattr(config, name)):
                    raise ValueError(f"{config.model} has {name} {value} in timm {timm.__version__}, not {given}")
            parts = TimmParts.of(model)
        self.stem: Any = parts.stem
        patches: Any = self.stem.patch_embed.proj
        patches.__class__ = PatchProjection  # an image is whole patches: build_timm_model allows no other size
        self.blocks = nn.ModuleList(parts.blocks[: config.first_blocks])
        self.contexts = parts.contexts.of_blocks(0, config.first_blocks)
        if is_new:
            for part in (self.stem, self.blocks, self.contexts):
                materialize(part)

    @property
    def block_list(self) -> list[Any]:
        return list(self.blocks)

    def build_head(self, num_outputs: int) -> TimmHead:
        return materialize(TimmHead(build_timm_model(self.config.model, self.config.image_size, num_outputs)))

    def embed_tokens(self, inputs: Inputs, padding_mask: Tensor | None = None) -> Tensor:
        return self.stem.forward_features(self.prepare(inputs.values))

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return self.contexts(x_BTD)


class TimmTeacher(Transformer, Teacher):
    """A timm teacher, frozen and in eval mode.

    Args:
        model: A timm model with its weights; it is taken apart.
        config: Sizes of the model.
        provenance: Origin of the weights, stored with what is derived from them.
        projected: Keep the model's head, for the embedding ``projected_cls``.
    """

    config: TeacherConfig

    def __init__(
        self,
        model: nn.Module,
        config: TeacherConfig,
        provenance: dict[str, Any] | None = None,
        projected: bool = False,
    ) -> None:
        head = TimmHead(model) if projected else None
        parts = TimmParts.of(model)
        first, num_blocks = config.first_blocks, len(parts.blocks)
        encoder = TimmEncoder(cast("TimmEncoderConfig", config.encoder), parts)
        super().__init__(encoder, parts.blocks[first:], config, provenance)
        self.contexts, self.projection = parts.contexts.of_blocks(first, num_blocks), head
        self.norm = parts.norm
        self.freeze()

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return self.contexts(x_BTD)

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        blocks, name = [block.block for block in self.block_list], self.config.model
        if init == "teacher_blocks":
            kind = type(blocks[0]).__name__
            raise ValueError(f"init teacher_blocks needs data2vec 2.0's post-norm blocks, but {name} has {kind}")
        if self.contexts.table is not None:
            needed = "an attention without rotary positions or relative bias"
            raise ValueError(f"init teacher_attention needs {needed}, but {name} has one of these")
        return [block.attn for block in blocks]

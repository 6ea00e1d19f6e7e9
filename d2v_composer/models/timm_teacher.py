"""Teachers that are timm models of the classes VisionTransformer, Eva and Beit.

Shapes: B images, T tokens, D channels, L blocks, H heads, P channels of the embedding ``joint``.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.patch_embed import PatchEmbed
from timm.models import Beit, Eva, VisionTransformer, beit, eva, vision_transformer
from torch import Tensor, nn

from d2v_composer.models.attention import FfnBlock, autocast_dtype, pad_rows
from d2v_composer.models.backbone import Transformer
from d2v_composer.models.configs import (
    MAX_PATCHES,
    ImageSize,
    TeacherConfig,
    TimmEncoderConfig,
    check_whole,
    height_and_width,
    parse_image_size,
)
from d2v_composer.models.encoder import Freezable, Inputs, Tokens
from d2v_composer.models.features import Features
from d2v_composer.models.images import PixelEncoder
from d2v_composer.models.names import JOINT, timm_name
from d2v_composer.models.provenance import Record
from d2v_composer.models.student import Init
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.timm_network import TimmModule

CLASSES = (VisionTransformer, Eva, Beit)
# Fields in which a file may differ from timm: weights of another tag may have another preprocessing.
OF_A_FILE = ("image_mean", "image_std", "interpolation", "timm", "outputs")
# Parts of a model after its final norm.
HEAD = ("attn_pool", "fc_norm", "head_drop", "head")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Kind(NamedTuple):
    """Properties of a class of timm's blocks."""

    context: str = ""
    """Name of the attention's argument for rotary positions or relative bias; '' if the attention takes neither."""
    is_post_norm: bool = False
    """True if each branch ends with a LayerNorm, before the residual sum."""
    scale: str = "gamma_{}"
    """Name of the attribute that holds a branch's LayerScale, with {} for the branch's number, 1 or 2. The LayerScale
    is a parameter, a module or ``None``."""


KINDS: dict[type[nn.Module], Kind] = {
    vision_transformer.Block: Kind(scale="ls{}"),
    vision_transformer.ResPostBlock: Kind(is_post_norm=True),
    eva.EvaBlock: Kind("rope"),
    eva.EvaBlockPostNorm: Kind("rope", is_post_norm=True),
    beit.Block: Kind("shared_rel_pos_bias"),
}


@torch.no_grad()
def fuse_biases(attention: TimmModule) -> None:
    """Join the biases of queries, keys and values into one bias."""
    if getattr(attention, "q_bias", None) is not None:
        joined = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        attention.qkv.bias = nn.Parameter(joined, requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None


class TimmBlock(FfnBlock):
    """A timm block: attention branch, then MLP branch, each added to the residual stream.

    The FFN output is what the MLP branch adds to the residual stream.

    Args:
        block: A block of a class in ``KINDS``.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: TimmModule = block
        self.kind = KINDS[type(block)]
        fuse_biases(self.block.attn)

    def forward(
        self, x_BTD: Tensor, context: Tensor | None = None, needs_output: bool = True, /
    ) -> tuple[Tensor | None, Tensor]:
        block, arguments = self.block, {} if context is None else {self.kind.context: context}
        if self.kind.is_post_norm:
            attended_BTD = x_BTD + block.norm1(block.attn(x_BTD, **arguments))
            ffn_output_BTD = block.norm2(block.mlp(attended_BTD))
        else:
            attended_BTD = x_BTD + self.scale(1, block.attn(block.norm1(x_BTD), **arguments))
            ffn_output_BTD = self.scale(2, block.mlp(block.norm2(attended_BTD)))
        return attended_BTD + ffn_output_BTD if needs_output else None, ffn_output_BTD

    def scale(self, branch: int, x_BTD: Tensor) -> Tensor:
        """Apply the LayerScale of branch 1 or 2, if the branch has a LayerScale."""
        scale = getattr(self.block, self.kind.scale.format(branch))
        if scale is None:
            return x_BTD
        return scale(x_BTD) if isinstance(scale, nn.Module) else scale * x_BTD


class FixedContexts(nn.Module):
    """The rotary positions or attention biases of blocks.

    Args:
        table: Positions or biases, (L, …), or (1, …) for all blocks; ``None`` if the blocks have neither.
        num_blocks: Number of blocks, L.
        is_cast: True if the table holds attention biases with padded rows.
    """

    table: Tensor | None

    def __init__(self, table: Tensor | None, num_blocks: int, is_cast: bool = False) -> None:
        super().__init__()
        self.num_blocks, self.is_cast = num_blocks, is_cast
        self.register_buffer("table", table if num_blocks else None)

    def of_blocks(self, start: int, stop: int) -> "FixedContexts":
        """Return the positions or biases of blocks ``start`` to ``stop - 1``."""
        table = self.table
        if table is not None:
            table = (table if len(table) == 1 else table[start:stop]).clone()
        return FixedContexts(table, stop - start, self.is_cast)

    def forward(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Return the rotary positions, the attention bias or ``None`` for each block."""
        table = self.table
        if table is None:
            return [None] * self.num_blocks
        if self.is_cast:
            table = table.to(autocast_dtype(x_BTD))[..., : table.shape[-2]]
        contexts: list[Tensor | None] = list(table)
        return contexts * self.num_blocks if len(contexts) == 1 else contexts


@torch.no_grad()
def take_contexts(model: TimmModule) -> FixedContexts:
    """Remove the rotary positions or relative biases of all blocks from a model, and return them."""
    num_blocks = len(model.blocks)
    if isinstance(model, Beit):
        return FixedContexts(take_relative_bias(model), num_blocks, is_cast=True)
    rope: TimmModule = getattr(model, "rope", None)
    if rope is None:
        return FixedContexts(None, num_blocks)
    model.rope = None
    table = rope.get_embed(shape=model.patch_embed.grid_size)
    return FixedContexts(table if model.rope_mixed else table[None], num_blocks)


def take_relative_bias(model: TimmModule) -> Tensor | None:
    """Remove the relative biases from a BEiT model, and return them, (L, 1, H, T, padded T), or ``None``.

    A bias that all blocks share is added to each block's own bias; if no block has its own, L is 1.
    """
    attentions = [block.attn for block in model.blocks if block.attn.relative_position_bias_table is not None]
    biases = [gather(attention) for attention in attentions]
    if model.rel_pos_bias is not None:
        shared = gather(model.rel_pos_bias)
        biases = [bias + shared for bias in biases] or [shared]
        model.rel_pos_bias = None
    for attention in attentions:
        attention.relative_position_bias_table = attention.relative_position_index = None
    return pad_rows(torch.stack(biases)) if biases else None


def gather(part: TimmModule) -> Tensor:
    """Return the relative bias of each pair of tokens, (1, H, T, T)."""
    return part.relative_position_bias_table[part.relative_position_index].permute(2, 0, 1)[None]


def build_timm_model(model: str, image_size: ImageSize | str | None = None, num_outputs: int = 0) -> nn.Module:
    """Build a timm model on the meta device, without a classifier.

    Args:
        model: ``timm/NAME``.
        image_size: Pixels per side, or height and width; default: timm's size, rounded down to whole patches.
        num_outputs: Number of outputs of a projection at the model's end; 0 for no projection.
    """
    name = timm_name(model)
    built = create_on_meta(name)
    if not isinstance(built, CLASSES):
        raise ValueError(
            f"{model} is a {type(built).__name__}; only models of timm's classes "
            f"{', '.join(kind.__name__ for kind in CLASSES)} can be teachers"
        )
    stem: TimmModule = built.patch_embed
    if type(stem) is not PatchEmbed:
        raise ValueError(f"{model} has a {type(stem).__name__} stem; only PatchEmbed is supported")
    if unknown := [type(block).__name__ for block in built.blocks if type(block) not in KINDS]:
        allowed = ", ".join(sorted({kind.__name__ for kind in KINDS}))
        raise ValueError(f"{model}: blocks of class {unknown[0]} are not supported; expected one of {allowed}")
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


def create_on_meta(name: str, **options: Any) -> TimmModule:
    """Build a timm model on the meta device."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"timm/{name}: {error}") from error


def teacher_config(model: str, built: TimmModule, first_blocks: int | None = None) -> TeacherConfig:
    """Return the config of a teacher that is a timm model.

    Args:
        model: ``timm/NAME``.
        built: The model, built by timm.
        first_blocks: Number of blocks in the encoder; default: a sixth of all blocks, rounded.
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
    """The model without its blocks, contexts and norm: ``forward_features`` computes the input of the first block."""
    blocks: list[TimmBlock]
    contexts: FixedContexts
    norm: nn.Module
    """The final norm; an Identity in some models."""

    @classmethod
    def of(cls, model: TimmModule) -> "TimmParts":
        """Take a model apart, in place."""
        contexts = take_contexts(model)
        blocks, norm = [TimmBlock(block) for block in model.blocks], model.norm
        model.blocks = nn.Sequential()
        model.attn_pool = None
        model.norm = model.fc_norm = model.head = nn.Identity()
        return cls(model, blocks, contexts, norm)


def materialize(module: ModuleT) -> ModuleT:
    """Allocate uninitialized memory for the weights of a meta module, unless meta is the default device."""
    device = torch.get_default_device()
    if device.type != "meta":
        module.to_empty(device=device)
        for part in module.modules():
            getattr(part, "init_non_persistent_buffers", lambda: None)()
    return module


class TimmHead(Freezable):
    """The layers of a timm model after its final norm, which compute the embedding ``joint``.

    Args:
        model: The model, before it is taken apart.
    """

    def __init__(self, model: TimmModule) -> None:
        super().__init__()
        self.width = model.num_classes or model.embed_dim
        self.model = copy.copy(model)
        self.model._modules = {name: getattr(model, name, None) for name in HEAD}
        self.model._parameters, self.model._buffers = {}, {}

    def forward(self, output_BTD: Tensor) -> Tensor:
        """Return the embedding ``joint``, (B, P), given the output of the final norm."""
        return self.model.forward_head(output_BTD)


class TimmEncoder(PixelEncoder):
    """A timm ViT's encoder: the layers before the blocks, and the first blocks.

    Args:
        config: Sizes.
        parts: Parts of a model of these sizes; default: new parts, into which a state dict must be loaded.
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
                    built = f"timm {timm.__version__} builds {config.model} with {name} {value}"
                    raise ValueError(f"{built}, but the config has {name} {given}")
            parts = TimmParts.of(model)
        self.stem: TimmModule = parts.stem
        self.blocks = nn.ModuleList(parts.blocks[: config.first_blocks])
        self.contexts = parts.contexts.of_blocks(0, config.first_blocks)
        if is_new:
            for part in (self.stem, self.blocks, self.contexts):
                materialize(part)

    @property
    def block_list(self) -> list[Any]:
        return list(self.blocks)

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        return self.stem.forward_features(self.prepare(inputs.values))

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return self.contexts(x_BTD)


class TimmTeacher(Transformer, Teacher):
    """A timm teacher, frozen and in eval mode.

    Args:
        model: A timm model with its weights; it is taken apart.
        config: Sizes of the model.
        provenance: See :class:`~d2v_composer.models.teacher.Teacher`.
        has_head: True if the model's head has weights and computes the embedding ``joint``.
    """

    config: TeacherConfig

    def __init__(
        self,
        model: TimmModule,
        config: TeacherConfig,
        provenance: Record | None = None,
        has_head: bool = False,
    ) -> None:
        head, pooling = TimmHead(model) if has_head else None, model.global_pool
        parts = TimmParts.of(model)
        first, num_blocks = config.first_blocks, len(parts.blocks)
        encoder = TimmEncoder(cast("TimmEncoderConfig", config.encoder), parts)
        super().__init__(encoder, parts.blocks[first:], config, provenance)
        self.contexts, self.joint = parts.contexts.of_blocks(first, num_blocks), head
        self.norm = parts.norm
        default = JOINT if has_head else "output_mean_patches" if pooling == "avg" else None
        self.name_embedding(self.provenance.get("embedding", default))
        self.freeze()

    @property
    def raw_names(self) -> list[str]:
        return super().raw_names + ([] if self.joint is None else [JOINT])

    def width_of(self, name: str) -> int:
        return self.joint.width if name == JOINT and self.joint is not None else super().width_of(name)

    def features(self, tokens: Tokens) -> Features:
        return replace(super().features(tokens), joint=self.joint)

    def block_contexts(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> list[Tensor | None]:
        return self.contexts(x_BTD)

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        blocks, name = [block.block for block in self.block_list], self.config.model
        if init == "teacher_blocks":
            raise ValueError(
                f"init teacher_blocks needs data2vec 2.0's post-norm blocks, but the blocks of {name} are timm's "
                f"{type(blocks[0]).__name__}"
            )
        if self.contexts.table is not None:
            raise ValueError(
                "init teacher_attention: the teacher's attention must not use rotary position embeddings or a relative "
                f"position bias, but {name} uses one of them"
            )
        return [block.attn for block in blocks]

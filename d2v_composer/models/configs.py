"""Configs, with checked values, of encoders, teachers, targets and students.

This module imports neither torch nor timm, because both load slowly.

Each class of :data:`EncoderConfig` has these attributes:

- ``modality``: ``image`` or ``audio``, which is also the key of the inputs in a batch;
- ``num_extra_tokens``: number of tokens before the patches or frames;
- ``has_cls_token``: true if the first extra token is CLS;
- ``num_columns``: number of columns in the grid of patches; 1 for a sequence of frames;
- ``norm_eps``: eps of the LayerNorms in a student's blocks;
- ``is_normalized``: false if a student's first block must begin with a LayerNorm;
- ``preprocessing``: names of the fields by which inputs are prepared;
- ``timm_preprocessing``: the preprocessing as fields of timm's data config; empty for audio;
- ``recipe``: name of the YAML to train with, without its suffix.
"""

import math
import re
from functools import cached_property
from pathlib import Path
from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError
from typing_extensions import Self

from d2v_composer.models.names import RAW_EMBEDDINGS, ExtraTokens, MadeBy, Normalization, TargetSource
from d2v_composer.models.provenance import Record

if TYPE_CHECKING:
    from torch import Tensor

Shape = Annotated[tuple[int, int], Field(strict=False)]
"""(height, width) in pixels, or (rows, columns) of a grid of patches."""
ImageSize = int | Shape
"""Pixels per side of a square, or (height, width)."""

# Far above any vision transformer's. Larger sizes mean a corrupt file, or one that would exhaust the memory.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14
MAX_CONVOLUTIONS = 32
CONVOLUTIONS = re.compile(r"\[((?:\(\d{1,9},\d{1,9},\d{1,9}\)(?:,|(?=\])))+)\](?:\*(\d{1,9}))?")

SAMPLE_RATE = 16_000
"""Samples per second of a waveform."""
NUM_MELS, EAT_PATCH = 128, 16
"""Number of channels of a log-mel spectrogram; side of EAT's square patches, in frames and in channels."""

Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
RawName = Literal[tuple(RAW_EMBEDDINGS)]  # pyright: ignore[reportInvalidTypeForm]
T = TypeVar("T")
LengthT = TypeVar("LengthT", int, "Tensor")
Tuple = Annotated[tuple[T, ...], Field(strict=False)]  # JSON has lists


def check_whole(name: str, value: object, minimum: int, maximum: int) -> None:
    """Raise ValueError unless the value is an int from ``minimum`` to ``maximum``."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {short(value)}")


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return an image size as (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def parse_image_size(image_size: Any) -> ImageSize:
    """Convert a number of pixels, a tuple (height, width), or text such as '224' or '112x168' to an image size."""
    shape = image_size if isinstance(image_size, tuple) else (image_size,)
    if isinstance(image_size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", image_size):
        shape = tuple(map(int, image_size.split("x")))
    if len(shape) not in (1, 2) or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"image_size must be a whole number, or HEIGHTxWIDTH such as 112x168, got {short(image_size)}")
    for size in shape:
        check_whole("image_size", size, 1, MAX_WIDTH)
    return shape[0] if shape[0] == shape[-1] else (shape[0], shape[-1])


STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Config(BaseModel):
    """Base of configs, which are checked and immutable."""

    model_config = STRICT

    def __init__(self, /, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from error
        self.check()

    def check(self) -> None:
        """Raise ValueError if fields contradict each other."""

    def changed(self, **values: object) -> Self:
        """Return a checked copy in which the given fields have the given values."""
        return type(self)(**(self.model_dump() | values))


def first_fault(error: ValidationError) -> str:
    """Return one line about the first wrong field of pydantic's error."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # ours
        return str(first["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    rules = {"missing": "is missing", "extra_forbidden": "is unknown", "int_type": "must be a whole number"}
    rule = rules.get(first["type"]) or re.sub(r"^\w+ should", "must", first["msg"])
    return f"{first['loc'][0]:.100} {rule:.200}, got {short(first['input'])}"


class Data2Vec2EncoderConfig(Config):
    """Sizes that all encoders of data2vec 2.0 and EAT have."""

    embed_dim: Width = 768
    num_heads: Width = 12
    mlp_ratio: PositiveFloat = 4.0
    norm_eps: float = Field(default=1e-6, gt=0, le=1e-2)
    prenet_depth: int = Field(default=4, ge=0, le=MAX_DEPTH)
    num_extra_tokens: int = Field(default=0, ge=0, le=MAX_PATCHES)
    num_alibi_heads: NonNegativeInt = 0
    """Number of heads with ALiBi; 0: no ALiBi."""
    alibi_scale_shape: Tuple[int] | None = None
    """Shape of ALiBi's learned factors: (L, 1, H, 1, 1) for L blocks and H heads with ALiBi, with 1 in place of L or H
    if all blocks or all heads have the same factor. ``None``: no learned factors."""
    is_normalized: ClassVar = True

    @property
    def has_cls_token(self) -> bool:
        return self.num_extra_tokens > 0

    def check(self) -> None:
        super().check()
        check_whole("num_alibi_heads", self.num_alibi_heads, 0, self.num_heads)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        shape, heads = self.alibi_scale_shape, self.num_alibi_heads
        if shape is not None and (not heads or shape[1:] not in [(1, count, 1, 1) for count in (1, heads)]):
            factors = f"null or (L, 1, H, 1, 1), where L is 1 or the number of blocks, and H is 1 or {heads}"
            allowed = factors if heads else "null if num_alibi_heads is 0"
            raise ValueError(f"alibi_scale_shape must be {allowed}, got {short(shape)}")


class ImageConfig(Config):
    """Fields of all image encoders."""

    in_chans: Width = 3
    image_mean: Tuple[Annotated[float, Field(ge=0, le=1)]] = (0.485, 0.456, 0.406)
    """Mean of each channel for pixels from 0 to 1; default: ImageNet's."""
    image_std: Tuple[Annotated[float, Field(ge=1e-3, le=1)]] = (0.229, 0.224, 0.225)
    modality: ClassVar = "image"
    preprocessing: ClassVar = ("image_size", "image_mean", "image_std", "interpolation")
    recipe: ClassVar = "distill"

    def check(self) -> None:
        super().check()
        for name in ("image_mean", "image_std"):
            if len(values := getattr(self, name)) != self.in_chans:
                raise ValueError(f"{name} must have as many numbers as in_chans ({self.in_chans}), got {short(values)}")

    @property
    def timm_preprocessing(self: Any) -> Record:
        return {
            "input_size": (self.in_chans, *height_and_width(self.image_size)),
            "fixed_input_size": True,
            "interpolation": self.interpolation,
            "crop_pct": 1.0,
            "mean": self.image_mean,
            "std": self.image_std,
        }

    @property
    def num_columns(self: Any) -> int:
        return self.grid_size[1]

    @property
    def num_tokens(self: Any) -> int:
        return self.num_extra_tokens + math.prod(self.grid_size)


class ImageEncoderConfig(Data2Vec2EncoderConfig, ImageConfig):
    """Sizes of a data2vec 2.0 image encoder."""

    kind: Literal["image"] = "image"
    image_size: Width = 224
    patch_size: Width = 16
    interpolation: ClassVar = "bicubic"

    def check(self) -> None:
        super().check()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.image_size}, got {self.patch_size}")

    @property
    def grid_size(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side


class SoundConfig(Config):
    """Base of the configs of audio encoders."""

    modality: ClassVar = "audio"
    sample_rate: ClassVar = SAMPLE_RATE
    timm_preprocessing: ClassVar[Record] = {}
    recipe: ClassVar = "distill_audio"


class AudioEncoderConfig(Data2Vec2EncoderConfig, SoundConfig):
    """Sizes of a data2vec 2.0 audio encoder."""

    kind: Literal["audio"] = "audio"
    extractor_mode: Literal["layer_norm", "default"] = "layer_norm"
    """``layer_norm``: a LayerNorm after each convolution; ``default``: a GroupNorm of each channel over time after the
    first convolution."""
    feature_encoder_spec: str = Field(
        default="[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", max_length=1000
    )
    """(channels, kernel, stride) of each convolution, in fairseq's notation."""
    conv_pos_width: Depth = 95
    conv_pos_groups: Depth = 16
    conv_pos_depth: Depth = 5
    conv_pos_pre_ln: bool = False
    preprocessing: ClassVar = ("sample_rate",)
    num_columns: ClassVar = 1

    def check(self) -> None:
        super().check()
        if self.embed_dim % self.conv_pos_groups:
            raise ValueError(f"conv_pos_groups must divide embed_dim {self.embed_dim}, got {self.conv_pos_groups}")
        _ = self.convolutions  # parsed once

    @property
    def has_cls_token(self) -> bool:
        return False  # the extra tokens of an audio encoder are registers

    @cached_property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """(channels, kernel, stride) of each convolution, parsed from :attr:`feature_encoder_spec`."""
        return parse_convolutions(self.feature_encoder_spec)

    def min_samples(self, num_frames: int = 1) -> int:
        """Return the length in samples of the shortest waveform that gives ``num_frames`` frames."""
        samples = num_frames
        for _, kernel, stride in reversed(self.convolutions):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, num_samples: LengthT, num_convolutions: int | None = None) -> LengthT:
        """Return the number of frames that the convolutions make of a waveform.

        Args:
            num_samples: Number of samples in the waveform, or a tensor of the numbers for several waveforms.
            num_convolutions: Number of convolutions to apply; default: all.
        """
        for _, kernel, stride in self.convolutions[:num_convolutions]:
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples


def parse_convolutions(spec: str) -> list[tuple[int, int, int]]:
    """Return (channels, kernel, stride) of each convolution of ``feature_encoder_spec``."""
    layers = list[tuple[int, int, int]]()
    for text in spec.replace(" ", "").split("+"):
        if (part := CONVOLUTIONS.fullmatch(text)) is None:
            raise ValueError(
                "feature_encoder_spec must be lists of (channels, kernel, stride), repeated by * and joined by +, got "
                f"{short(spec)}"
            )
        sizes = [int(number) for number in re.findall(r"\d+", part[1])]
        for size in sizes:
            check_whole("a size in feature_encoder_spec", size, 1, MAX_WIDTH)
        # More repetitions would exceed MAX_CONVOLUTIONS in any case.
        layers += [*zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True)] * min(
            int(part[2] or 1), MAX_CONVOLUTIONS + 1
        )
    check_whole("number of convolutions", len(layers), 1, MAX_CONVOLUTIONS)
    return layers


class EatEncoderConfig(Data2Vec2EncoderConfig, SoundConfig):
    """Sizes of an EAT encoder, and the mean and standard deviation of its spectrograms."""

    kind: Literal["eat"] = "eat"
    target_length: int = Field(default=1024, ge=EAT_PATCH, multiple_of=EAT_PATCH)
    """Number of frames in a spectrogram, which has a frame every 10 ms."""
    max_length: int = Field(default=768, ge=1, le=MAX_PATCHES)
    """Number of patches along the time axis for which the encoder has position embeddings."""
    log_mel_mean: float = -4.268
    log_mel_std: PositiveFloat = 4.569
    preprocessing: ClassVar = ("sample_rate", "target_length", "log_mel_mean", "log_mel_std")
    num_columns: ClassVar = NUM_MELS // EAT_PATCH

    def check(self) -> None:
        super().check()
        check_whole("target_length", self.target_length, EAT_PATCH, EAT_PATCH * self.max_length)


class FrozenModelConfig(ImageConfig):
    """Preprocessing and sizes of a teacher that is made from a module."""

    image_size: ImageSize
    grid_size: Shape
    has_cls_token: bool
    embed_dim: Width
    interpolation: ClassVar = "bicubic"
    normalization: ClassVar = "instance"
    final_layer_norm: ClassVar = True
    depth: ClassVar = 1
    average_top_k_layers: ClassVar = 1

    @property
    def num_extra_tokens(self) -> int:
        return int(self.has_cls_token)


class TimmConfig(ImageConfig):
    """Fields of all encoders that timm builds."""

    model: str
    """``timm/NAME``, with a NAME that ``timm.create_model`` takes."""
    image_size: ImageSize
    interpolation: Literal["bicubic", "bilinear"]
    timm: str
    """Version of timm that built the encoder."""
    outputs: Tuple[float] = Field(default=(), repr=False)  # no part of the weights' hash, which is of a repr
    """In a student's file: a few of the student's outputs for fixed images."""


class TimmEncoderConfig(TimmConfig):
    """Sizes of a timm ViT's encoder."""

    kind: Literal["timm"] = "timm"
    first_blocks: int
    """Number of blocks in the encoder."""
    embed_dim: int
    num_heads: int
    num_extra_tokens: int
    has_cls_token: bool
    grid_size: Shape
    is_normalized: ClassVar = False
    norm_eps: ClassVar = 1e-6

    @property
    def prenet_depth(self) -> int:
        """The same number as :attr:`first_blocks`."""
        return self.first_blocks


EncoderConfig = Annotated[
    ImageEncoderConfig | AudioEncoderConfig | EatEncoderConfig | TimmEncoderConfig, Field(discriminator="kind")
]


class TeacherConfig(Config):
    """Sizes of a teacher; the encoder's fields are attributes of this config, too."""

    encoder: EncoderConfig
    depth: Depth
    average_top_k_layers: int
    """Number of the teacher's last blocks that the target averages."""
    final_layer_norm: bool = True
    """True if the target ends with a LayerNorm."""
    normalization: ClassVar = "instance"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python's and pydantic's own
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def check(self) -> None:
        super().check()
        check_whole("average_top_k_layers", self.average_top_k_layers, 1, self.depth)
        shape, num_blocks = getattr(self.encoder, "alibi_scale_shape", None), self.encoder.prenet_depth + self.depth
        if shape is not None and shape[0] not in (1, num_blocks):
            raise ValueError(
                f"alibi_scale_shape must begin with {num_blocks} or 1 for {num_blocks} blocks, got {short(shape)}"
            )


_SIZES = yaml.safe_load(Path(__file__).with_name("released.yaml").read_text("utf-8"))
RELEASED = {name: TeacherConfig(**sizes) for name, sizes in _SIZES.items()}
"""Name → sizes of released models of data2vec 2.0 and EAT."""


class TargetOptions(BaseModel):
    """Options by which a target is computed from a teacher's layers."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    source: TargetSource = "ffn"
    """``ffn``: the FFN outputs of the teacher's blocks. ``block``: the outputs of the teacher's blocks."""
    average_top_k_layers: Annotated[int, Field(ge=1)] | None = None
    """Number of the teacher's last blocks that the target averages; null: all blocks after the encoder; for
    data2vec 2.0 and EAT, at most as many as in pre-training."""
    normalization: Normalization | None = None
    """Normalization of each layer in the target and in ``layer_mean``. ``instance``: over tokens, as in data2vec
    2.0. ``layer``: over channels. null: ``layer`` if ``student.model`` is set, else ``instance``."""
    final_layer_norm: bool | None = None
    """End the target and ``layer_mean`` with a LayerNorm. null: as in pre-training for data2vec 2.0 and EAT; true for
    other teachers."""
    extra_tokens: ExtraTokens = "regress"
    """``regress``: the student regresses CLS and registers like patches; a timm student regresses no registers.
    ``drop``: InstanceNorm's statistics and the loss leave out CLS and registers; if the teacher has CLS, the prediction
    of CLS regresses the target's mean over patches, with weight 0.01."""

    def num_dropped(self, num_extra_tokens: int) -> int:
        """Return the number of leading tokens that the target leaves out."""
        return num_extra_tokens if self.extra_tokens == "drop" else 0


class TargetConfig(TargetOptions, Config):
    """Options of a target, checked."""


class BlockSizes(BaseModel):
    """Sizes of a student's blocks."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    depth: Depth = 5
    """Number of blocks."""
    mlp_ratio: PositiveFloat = 3.0
    """Ratio of the width of a block's MLP to the block's number of channels."""
    alibi: bool = True
    """Add ALiBi, a penalty proportional to the distance between two patches or frames, to the attention scores."""
    embed_dim: Width | None = None
    """Number of channels of the blocks, at most the encoder's number of channels; null: the encoder's number."""


class StudentConfig(BlockSizes, Config):
    """Sizes of a student's blocks, and settings of the student's ``layer_mean``."""

    kind: Literal["blocks"] = "blocks"
    normalization: Normalization = "instance"
    """Normalization of each layer in the target and in ``layer_mean``."""
    final_layer_norm: bool = True
    """End the target and ``layer_mean`` with a LayerNorm."""


class TimmNetworkConfig(TimmConfig):
    """Name, preprocessing and target settings of a student that is a timm model."""

    kind: Literal["network"] = "network"
    normalization: Normalization = "layer"
    """Normalization of each layer in the target."""
    final_layer_norm: bool = True
    """End the target with a LayerNorm."""
    num_extra_tokens: ClassVar = 0
    has_cls_token: ClassVar = True  # the pooled feature


class EmbeddingConfig(Config):
    """Description of a student's embedding in the student's file."""

    raw: RawName  # pyright: ignore[reportInvalidTypeForm]
    """Name of the raw embedding, such as ``output_cls``, that is the student's embedding if there is no alignment."""
    of: Annotated[str, Field(max_length=1000)]
    made_by: MadeBy
    space: Annotated[str, Field(max_length=1000)]


class StudentSizes(Config):
    """Sizes in the file of a student that has blocks on an encoder."""

    encoder: EncoderConfig
    student: StudentConfig
    embedding: EmbeddingConfig
    prefix: ClassVar = ""
    """Prefix of the tensors' names in the model; names in the file lack this prefix."""


class NetworkSizes(Config):
    """Sizes in the file of a student that is a timm model."""

    network: TimmNetworkConfig
    embedding: EmbeddingConfig
    prefix: ClassVar = "encoder.model."

"""Sizes of encoders and teachers, and checks of sizes from files. No torch or timm: they take seconds to import.

An encoder's config has, as a field or otherwise: ``modality`` (the name of its inputs in a batch),
``num_extra_tokens`` before the patches or frames (CLS and registers), ``has_cls_token`` (the first of them is CLS),
``num_columns`` (of the grid of patches; 1 for a sequence), ``norm_eps`` (of a student's LayerNorms, too),
``is_normalized`` (by a LayerNorm: a pre-norm residual stream has no bounded scale), ``preprocessing`` (what prepares
inputs, by name) and ``timm_preprocessing`` (the same in timm's words).
"""

import ast
import math
import re
from dataclasses import dataclass, fields
from functools import cached_property
from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Any, ClassVar, Literal, get_args

from d2v_composer.models.names import Normalization

ImageSize = int | tuple[int, int]
"""Pixels per side of a square, or (height, width)."""

# Far above any vision transformer's. Larger sizes mean a corrupt file, or one that would exhaust the memory.
MAX_WIDTH = 1 << 16
MAX_DEPTH = 1000
MAX_PATCHES = 1 << 14
MAX_CONVOLUTIONS = 32
LONGEST_SPEC = 1000  # characters

SAMPLE_RATE = 16_000
"""Samples of a waveform in a second."""
NUM_MELS, EAT_PATCH = 128, 16
"""Channels of a log-mel spectrogram, and frames and channels of EAT's patches."""


def check_whole(name: str, value: Any, minimum: int, maximum: int) -> None:
    """Raise ValueError, with the name of the size, unless the value is a whole number in the range."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from {minimum} to {maximum}, got {short(value)}")


def check_number(name: str, value: Any, minimum: float, maximum: float) -> None:
    """Raise ValueError, with the name of the size, unless the value is a number in the range."""
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a number from {minimum:g} to {maximum:g}, got {short(value)}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError, with the name of the option, unless the value is one of a Literal's values."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {short(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError, with the name of the option, unless it is true or false."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {short(value)}")


def check_pixel_statistics(in_chans: int, image_mean: Any, image_std: Any) -> None:
    """Raise ValueError unless each channel has a mean and a standard deviation, for pixels from 0 to 1."""
    for name, values, minimum in (("image_mean", image_mean, 0.0), ("image_std", image_std, 1e-3)):
        if not isinstance(values, tuple) or len(values) != in_chans:
            raise ValueError(f"{name} must be a number for each of in_chans {in_chans}, got {short(values)}")
        for value in values:
            check_number(name, value, minimum, 1.0)


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def parse_image_size(image_size: Any) -> ImageSize:
    """Return an image size from any source: pixels per side, or (height, width) if they differ.

    Raises:
        ValueError: It is neither a number of pixels, nor two, nor text such as '112x168'.
    """
    shape = image_size if isinstance(image_size, tuple) else (image_size,)
    if isinstance(image_size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", image_size):
        shape = tuple(map(int, image_size.split("x")))
    if len(shape) not in (1, 2):
        raise ValueError(f"image_size must be a whole number, or height and width, got {short(image_size)}")
    for size in shape:
        check_whole("image_size", size, 1, MAX_WIDTH)
    return shape[0] if shape[0] == shape[-1] else (shape[0], shape[-1])


@dataclass(frozen=True, kw_only=True)
class Data2Vec2EncoderConfig:
    """Sizes that data2vec 2.0's encoders of all modalities share; the defaults are data2vec's own.

    Raises:
        ValueError: A size is out of range, or does not fit the others.
    """

    embed_dim: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    prenet_depth: int = 4
    num_extra_tokens: int = 0
    num_alibi_heads: int = 0
    """Number of heads with ALiBi; 0: no ALiBi (``use_alibi_encoder: false``)."""
    alibi_scale_shape: tuple[int, ...] | None = None
    """Shape of the ALiBi scale, (L or 1, 1, H or 1, 1, 1), if the checkpoint has one."""
    # The same for all, and thus not stored.
    is_normalized = True

    def __post_init__(self) -> None:
        # A strict load of the tensors finds all other wrong sizes.
        check_whole("num_heads", self.num_heads, 1, MAX_WIDTH)
        check_whole("num_alibi_heads", self.num_alibi_heads, 0, self.num_heads)
        check_whole("num_extra_tokens", self.num_extra_tokens, 0, MAX_PATCHES)
        check_whole("prenet_depth", self.prenet_depth, 0, MAX_DEPTH)
        check_number("norm_eps", self.norm_eps, math.ulp(0), 1e-2)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} heads for {short(self.embed_dim)}")
        shape, heads = self.alibi_scale_shape, self.num_alibi_heads
        if shape is not None and (not heads or shape[1:] not in [(1, each, 1, 1) for each in (1, heads)]):
            expected = f"(blocks or 1, 1, {heads} or 1, 1, 1), or null without ALiBi"
            raise ValueError(f"alibi_scale_shape must be {expected}, got {short(shape)}")


class ImageSizes:
    """Derive the grid, the tokens and the preprocessing of any image encoder from its sizes."""

    modality = "image"
    preprocessing = ("image_size", "image_mean", "image_std", "interpolation")

    @property
    def timm_preprocessing(self: Any) -> dict[str, Any]:
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


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(Data2Vec2EncoderConfig, ImageSizes):
    """Sizes of a data2vec 2.0 image encoder."""

    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    recipe = "yamls/distill.yaml"
    interpolation = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size, got {self.patch_size} for {self.image_size}")
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)

    @property
    def has_cls_token(self) -> bool:
        """True if there are extra tokens. The first is CLS."""
        return self.num_extra_tokens > 0

    @property
    def grid_size(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side


class SoundSizes:
    """What the configs of all encoders of sound have in common."""

    modality = "audio"
    sample_rate = SAMPLE_RATE
    timm_preprocessing: ClassVar[dict[str, Any]] = {}
    recipe = "yamls/distill_audio.yaml"


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig(SoundSizes, Data2Vec2EncoderConfig):
    """Sizes of a data2vec 2.0 audio encoder."""

    extractor_mode: str = "layer_norm"
    """``layer_norm``: LayerNorm after each convolution; ``default``: GroupNorm over time after the first alone."""
    feature_encoder_spec: str = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    """Channels, kernel and stride of each convolution."""
    conv_pos_width: int = 95
    conv_pos_groups: int = 16
    conv_pos_depth: int = 5
    conv_pos_pre_ln: bool = False
    preprocessing = ("sample_rate",)
    num_columns = 1
    has_cls_token = False  # its extra tokens are registers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("extractor_mode", self.extractor_mode, Literal["layer_norm", "default"])
        for name in ("conv_pos_width", "conv_pos_groups", "conv_pos_depth"):
            check_whole(name, getattr(self, name), 1, MAX_DEPTH)
        if self.embed_dim % self.conv_pos_groups:
            raise ValueError(f"conv_pos_groups must divide embed_dim, got {self.conv_pos_groups}")
        check_flag("conv_pos_pre_ln", self.conv_pos_pre_ln)
        _ = self.convolutions  # parsed once

    @cached_property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """Channels, kernel and stride of each convolution."""
        return parse_convolutions(self.feature_encoder_spec)

    def min_samples(self, num_frames: int = 1) -> int:
        """Return the number of samples of the shortest waveform that gives a number of frames."""
        samples = num_frames
        for _, kernel, stride in reversed(self.convolutions):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, num_samples: Any, num_convolutions: int | None = None) -> Any:
        """Return the number of frames of waveforms, an int or a tensor, after all convolutions or the first ones."""
        for _, kernel, stride in self.convolutions[:num_convolutions]:
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples


def parse_convolutions(spec: Any) -> list[tuple[int, int, int]]:
    """Return (channels, kernel, stride) of each convolution of ``feature_encoder_spec``.

    It is a Python expression, which fairseq evaluates. Here nothing but lists of tuples, ``+`` and ``*`` is read.

    Raises:
        ValueError: It is another expression, or a number is out of range.
    """

    def read(node: ast.AST) -> list[Any]:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return read(left) + read(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int() as times)):
                # No longer than what is too long.
                return (read(left) * min(times, MAX_CONVOLUTIONS + 1))[: MAX_CONVOLUTIONS + 1]
            case ast.List():
                return ast.literal_eval(node)
        raise ValueError(node)

    try:
        if len(spec) > LONGEST_SPEC:
            raise ValueError(len(spec))
        found = [(channels, kernel, stride) for channels, kernel, stride in read(ast.parse(spec, mode="eval").body)]
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        allowed = f"lists of (channels, kernel, stride), joined by + and *, at most {MAX_CONVOLUTIONS} in all"
        raise ValueError(f"feature_encoder_spec must be {allowed}, got {short(spec)}") from error
    check_whole("number of convolutions", len(found), 1, MAX_CONVOLUTIONS)
    for size in (size for each in found for size in each):
        check_whole("a size in feature_encoder_spec", size, 1, MAX_WIDTH)
    return found


@dataclass(frozen=True, kw_only=True)
class EatEncoderConfig(SoundSizes, Data2Vec2EncoderConfig):
    """Sizes of an EAT encoder, and what normalizes its spectrograms; the defaults are AudioSet's."""

    target_length: int = 1024
    """Frames of a spectrogram, one each 10 ms."""
    max_length: int = 768
    """Rows of patches for which there are positions."""
    log_mel_mean: float = -4.268
    log_mel_std: float = 4.569
    preprocessing = ("sample_rate", "target_length", "log_mel_mean", "log_mel_std")
    num_columns = NUM_MELS // EAT_PATCH

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_length", self.max_length, 1, MAX_PATCHES)
        check_whole("target_length", self.target_length, EAT_PATCH, EAT_PATCH * self.max_length)
        if self.target_length % EAT_PATCH:
            raise ValueError(f"target_length must be a multiple of {EAT_PATCH}, got {self.target_length}")
        check_number("log_mel_mean", self.log_mel_mean, -100, 100)
        check_number("log_mel_std", self.log_mel_std, 1e-3, 100)

    @property
    def has_cls_token(self) -> bool:
        """True if there are extra tokens. The first is CLS."""
        return self.num_extra_tokens > 0


@dataclass(frozen=True, kw_only=True)
class Data2Vec2Sizes(Data2Vec2EncoderConfig):
    """Sizes of the blocks after a data2vec 2.0 encoder."""

    depth: int = 8
    average_top_k_layers: int = 8
    """Number of last blocks in the target, as in pre-training."""
    normalization = "instance"
    final_layer_norm = True

    def __post_init__(self) -> None:
        check_whole("depth", self.depth, 1, MAX_DEPTH)
        super().__post_init__()
        check_whole("average_top_k_layers", self.average_top_k_layers, 1, self.depth)
        check_flag("final_layer_norm", self.final_layer_norm)
        shape, num_blocks = self.alibi_scale_shape, self.prenet_depth + self.depth
        if shape is not None and shape[0] not in (1, num_blocks):
            raise ValueError(f"alibi_scale_shape must be for {num_blocks} blocks or for 1, got {short(shape)}")


@dataclass(frozen=True, kw_only=True)
class Data2Vec2Config(Data2Vec2Sizes, ImageEncoderConfig):
    """Sizes of a data2vec 2.0 image model."""

    encoder_class = ImageEncoderConfig


@dataclass(frozen=True, kw_only=True)
class Data2Vec2AudioConfig(Data2Vec2Sizes, AudioEncoderConfig):
    """Sizes of a data2vec 2.0 audio model."""

    final_layer_norm: bool = False
    """The target ends with a LayerNorm, ``layer_norm_targets`` in pre-training."""
    encoder_class = AudioEncoderConfig


@dataclass(frozen=True, kw_only=True)
class EatConfig(Data2Vec2Sizes, EatEncoderConfig):
    """Sizes of an EAT model."""

    encoder_class = EatEncoderConfig


Data2Vec2TeacherConfig = Data2Vec2Config | Data2Vec2AudioConfig | EatConfig


def _released(**sizes: Any) -> Data2Vec2Config:
    return Data2Vec2Config(num_extra_tokens=1, **sizes)


def _released_audio(num_heads: int = 12, **sizes: Any) -> Data2Vec2AudioConfig:
    heads: dict[str, Any] = {"num_alibi_heads": num_heads, "alibi_scale_shape": (1, 1, num_heads, 1, 1)}
    return Data2Vec2AudioConfig(num_heads=num_heads, norm_eps=1e-5, **heads, **sizes)


RELEASED: dict[str, Data2Vec2TeacherConfig] = {
    "base": _released(prenet_depth=2, depth=10, average_top_k_layers=10),
    "large": _released(embed_dim=1024, num_heads=16, prenet_depth=0, depth=24, average_top_k_layers=18),
    "huge": _released(embed_dim=1280, num_heads=16, patch_size=14, prenet_depth=0, depth=32, average_top_k_layers=24),
    "base_audio": _released_audio(prenet_depth=0, depth=12, average_top_k_layers=8),
    "large_audio": _released_audio(embed_dim=1024, num_heads=16, prenet_depth=8, depth=16, average_top_k_layers=16),
    "base_eat": EatConfig(num_extra_tokens=1, prenet_depth=0, depth=12, average_top_k_layers=12),
}
"""Sizes of Meta's models and of EAT's; those without a modality are of images."""


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig(ImageSizes):
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
    """timm version that built the encoder."""
    outputs: tuple[float, ...] = ()
    """A few outputs for a fixed image, in an exported file: another version of timm may silently build something else
    under the same name."""
    # The same for all, and thus not stored.
    is_normalized = False
    norm_eps = 1e-6

    def __post_init__(self) -> None:
        # Only what a file says of itself; TimmEncoder compares all other fields with timm's model.
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)
        check_choice("interpolation", self.interpolation, Literal["bicubic", "bilinear"])

    @property
    def prenet_depth(self) -> int:
        """:attr:`first_blocks`, under data2vec's name."""
        return self.first_blocks


@dataclass(frozen=True, kw_only=True)
class TimmTeacherConfig(TimmEncoderConfig):
    """Sizes of a timm ViT."""

    depth: int
    """Number of blocks after the encoder."""
    normalization = "instance"
    final_layer_norm = True
    encoder_class = TimmEncoderConfig

    @property
    def average_top_k_layers(self) -> int:
        """Number of layers that the target averages: all blocks."""
        return self.depth


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Sizes of a student, and how its ``layer_mean`` is computed; all other sizes are the encoder's.

    Raises:
        ValueError: A size is out of range, or ``normalization`` is unknown.
    """

    depth: int = 5
    mlp_ratio: float = 3.0
    alibi: bool = True
    normalization: Normalization = "instance"
    """Normalization of each layer in target, prediction and ``layer_mean``."""
    embed_dim: int | None = None
    """Channels of blocks and embeddings, at most the encoder's; default: the encoder's."""
    final_layer_norm: bool = True
    """End target, prediction and ``layer_mean`` with a LayerNorm."""
    average_top_k_layers = None  # a target's

    def __post_init__(self) -> None:
        check_whole("student depth", self.depth, 1, MAX_DEPTH)
        for name in ("alibi", "final_layer_norm"):
            check_flag(f"student {name}", getattr(self, name))
        check_choice("student normalization", self.normalization, Normalization)


@dataclass(frozen=True, kw_only=True)
class TimmNetworkConfig(ImageSizes):
    """A student that is a timm model, its preprocessing, and what it regresses.

    Raises:
        ValueError: ``normalization`` is unknown.
    """

    model: str
    """``timm/NAME``, NAME as ``timm.create_model`` takes it."""
    image_size: ImageSize
    in_chans: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    interpolation: str
    timm: str
    """timm version that built it."""
    normalization: Normalization = "layer"
    """Normalization of each layer in target and prediction."""
    final_layer_norm: bool = True
    """End target and prediction with a LayerNorm."""
    # The same for all, and thus not stored.
    num_extra_tokens = 0
    has_cls_token = True  # the pooled feature
    average_top_k_layers = None  # a target's

    def __post_init__(self) -> None:
        check_pixel_statistics(self.in_chans, self.image_mean, self.image_std)
        check_choice("student normalization", self.normalization, Normalization)


ImageConfig = ImageEncoderConfig | TimmEncoderConfig | TimmNetworkConfig
EncoderConfig = ImageConfig | AudioEncoderConfig | EatEncoderConfig
TeacherConfig = Data2Vec2TeacherConfig | TimmTeacherConfig

# A field that only one kind of config has, of teachers and of their encoders → the kind of teacher.
KINDS: dict[str, type[TeacherConfig]] = {
    "model": TimmTeacherConfig,
    "feature_encoder_spec": Data2Vec2AudioConfig,
    "target_length": EatConfig,
    "patch_size": Data2Vec2Config,
}


def find_kind(stored: Any) -> type[TeacherConfig]:
    """Return the kind of teacher whose sizes, or whose encoder's, a file has.

    Raises:
        ValueError: There is none.
    """
    for name in KINDS.keys() & stored.keys():
        return KINDS[name]
    raise ValueError(f"sizes must have one of {', '.join(KINDS)}")


def encoder_config(config: TeacherConfig) -> Any:
    """Return the sizes of a teacher's encoder alone."""
    kind = config.encoder_class
    return kind(**{each.name: getattr(config, each.name) for each in fields(kind)})

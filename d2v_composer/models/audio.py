"""Audio encoders of data2vec 2.0 and EAT, and log-mel spectrograms.

Shapes: B clips, L samples, C channels of convolutions, E extra tokens, N frames or patches, T = E + N tokens,
D channels, M mels; in EAT's encoder, W windows of a clip, F frames of a spectrogram.
Source: fairseq's ``data2vec/models/modalities/audio.py`` and ``wav2vec2.py``; EAT (Chen et al. 2024, arXiv:2401.03497),
github.com/cwx-worst-one/EAT at commit 06c1c34.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pad

from d2v_composer.models.configs import EAT_PATCH, NUM_MELS, SAMPLE_RATE, AudioEncoderConfig, EatEncoderConfig
from d2v_composer.models.encoder import Data2Vec2Encoder, Encoder, Inputs
from d2v_composer.models.features import mean_over_time
from d2v_composer.models.images import PatchProjection
from d2v_composer.models.targets import instance_norm

# A log-mel spectrogram as Kaldi computes it: samples of a frame and between frames, points of the Fourier transform.
FRAME, HOP, NUM_POINTS, LOWEST_HERTZ, LOG_FLOOR = 400, 160, 512, 20.0, torch.finfo(torch.float32).eps


class Waveforms(Encoder):
    """Base of audio encoders.

    Attributes:
        min_samples: Smallest number of samples that a waveform may have.
    """

    baseline = "log_mel"
    input_name = "waveforms"
    min_samples: int = FRAME

    def prepare(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or not values.is_floating_point() or values.shape[1] < self.min_samples:
            raise ValueError(
                f"waveforms must be (B, L) float, with L at least {self.min_samples} and values in [-1, 1]; got "
                f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
            )
        return values.float()

    def example(self, count: int) -> Tensor:
        return torch.zeros(count, SAMPLE_RATE)

    def noise(self, count: int) -> Tensor:
        return 0.1 * torch.randn(count, 5 * SAMPLE_RATE)

    def baseline_of(self, inputs: Inputs) -> Tensor:
        """Return the mean of the log-mel spectrogram over time, (B, M)."""
        log_mel_BNM, padding_BN = LogMel().to(inputs.values.device)(inputs.values, inputs.lengths)
        return mean_over_time(log_mel_BNM, padding_mask=padding_BN)[:, 0]


class AudioEncoder(Waveforms, Data2Vec2Encoder):
    """Data2vec 2.0's audio encoder: convolutions, projection, positional convolutions, extra tokens, LayerNorm, blocks.

    Inputs are waveforms, (B, L) float in [-1, 1], 16 kHz mono.
    """

    config: AudioEncoderConfig

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__(config)
        self.min_samples = config.min_samples()
        dim, channels, layers = config.embed_dim, 1, []
        for number, (width, kernel, stride) in enumerate(config.convolutions):
            layer: dict[str, nn.Module] = {"0": nn.Conv1d(channels, width, kernel, stride, bias=False)}
            if config.extractor_mode == "layer_norm":
                layer["2"] = nn.ModuleDict({"1": nn.LayerNorm(width)})
            elif number == 0:
                layer["2"] = nn.GroupNorm(width, width)
            layers.append(nn.ModuleDict(layer))
            channels = width
        # The names of fairseq's modules, some of which have no weights.
        self.local_encoder = nn.ModuleDict({"conv_layers": nn.ModuleList(layers)})
        self.project_features = nn.ModuleDict({"1": nn.LayerNorm(channels), "2": nn.Linear(channels, dim)})
        kernel, groups = max(3, config.conv_pos_width // config.conv_pos_depth), config.conv_pos_groups
        convolutions = nn.ModuleDict(
            {
                str(number): nn.ModuleDict({"0": nn.Conv1d(dim, dim, kernel, 1, kernel // 2, groups=groups)})
                for number in range(1, config.conv_pos_depth + 1)
            }
        )
        before = {"0": nn.LayerNorm(dim), "1": convolutions}
        self.relative_positional_encoder = nn.ModuleDict(before) if config.conv_pos_pre_ln else convolutions
        self.add_blocks()

    def prepare(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalize each clip over its samples to mean 0 and variance 1; padding becomes 0."""
        waveforms = super().prepare(values)
        if lengths is None:
            return layer_norm(waveforms, waveforms.shape[1:])
        padding_BL = padding_mask_of(lengths, waveforms.shape[1])
        return instance_norm(waveforms[..., None], padding_mask=padding_BL)[0][..., 0].masked_fill(padding_BL, 0)

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> Tensor | None:
        if lengths is None:
            return None
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # never wait for a device
            shortest, longest = (int(length) for length in lengths.aminmax())
            num_samples = longest if num_samples is None else num_samples
            if shortest < self.min_samples or longest > num_samples:
                raise ValueError(
                    f"lengths must be from {self.min_samples} to {num_samples} samples, got {shortest} to {longest}"
                )
        num_frames = self.config.num_frames(int(lengths.max()) if num_samples is None else num_samples)
        return pad(padding_mask_of(self.config.num_frames(lengths), num_frames), (self.config.num_extra_tokens, 0))

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        x_BND, lengths = self.local_features(inputs.values, inputs.lengths), inputs.lengths
        padding_BN = None if lengths is None else padding_mask_of(self.config.num_frames(lengths), x_BND.shape[1])
        return self.add_extra_tokens(x_BND + self.positions(x_BND, padding_BN))

    def local_features(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the projected outputs of the convolutions, (B, N, D)."""
        x_BCN = self.prepare(waveforms, lengths)[:, None]
        for layer in cast("Any", self.local_encoder["conv_layers"]):
            x_BNC = layer["0"](x_BCN).transpose(1, 2)
            if self.config.extractor_mode == "layer_norm":
                x_BNC = layer["2"]["1"](x_BNC.float())
            elif "2" in layer:
                # GroupNorm's statistics are over time, and must leave out padding.
                padding_BN = (
                    None if lengths is None else padding_mask_of(self.config.num_frames(lengths, 1), x_BNC.shape[1])
                )
                x_BNC = instance_norm(x_BNC, padding_mask=padding_BN)[0] * layer["2"].weight + layer["2"].bias
            x_BCN = gelu(x_BNC).transpose(1, 2)
        return self.project_features["2"](self.project_features["1"](x_BCN.transpose(1, 2)))

    def positions(self, x_BND: Tensor, padding_BN: Tensor | None) -> Tensor:
        """Return the positional convolutions' output, (B, N, D)."""
        convolutions: Any = self.relative_positional_encoder
        if self.config.conv_pos_pre_ln:
            x_BND, convolutions = convolutions["0"](x_BND), convolutions["1"]
        num_frames = x_BND.shape[1]
        for layer in convolutions.values():
            if padding_BN is not None:  # each convolution reaches over the clip's end
                x_BND = x_BND.masked_fill(padding_BN[..., None], 0)
            x_BDN = layer["0"](x_BND.transpose(1, 2))[..., :num_frames]  # an even kernel gives one more
            x_BND = gelu(layer_norm(x_BDN.transpose(1, 2), x_BND.shape[2:]))
        return x_BND

    def num_tokens(self, shape: Sequence[int] | None = None) -> int:
        return self.config.num_extra_tokens + self.config.num_frames(SAMPLE_RATE if shape is None else shape[-1])

    @property
    def free_axes(self) -> dict[int, tuple[str, int, int]]:
        # Two frames, because torch.export treats a size of one as constant.
        return super().free_axes | {1: ("time", self.config.min_samples(num_frames=2), 1 << 24)}


def padding_mask_of(lengths: Tensor, size: int) -> Tensor:
    """Return a mask of the positions past each clip's length, (B, size) bool."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


class LogMel(nn.Module):
    """Compute log-mel spectrograms as in Kaldi, with a Hann window and one frame of 25 ms every 10 ms."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(FRAME, periodic=False), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return spectrograms, (B, N, M) float32, and which frames are padding, (B, N) bool or ``None``.

        Args:
            waveforms: Waveforms, (B, L) float in [-1, 1], 16 kHz mono.
            lengths: Number of samples in each clip, (B,); ``None``: nothing is padded.
        """
        padding_BL = None if lengths is None else padding_mask_of(lengths, waveforms.shape[1])
        waveforms = waveforms.float()
        waveforms = waveforms - mean_over_time(waveforms[..., None], padding_mask=padding_BL)[..., 0]
        frames_BNF = waveforms.unfold(1, FRAME, HOP)
        padding_BN = None if lengths is None else padding_mask_of((lengths - FRAME) // HOP + 1, frames_BNF.shape[1])
        frames_BNF = frames_BNF - frames_BNF.mean(dim=-1, keepdim=True)
        before_BNF = torch.cat([frames_BNF[..., :1], frames_BNF[..., :-1]], dim=-1)
        windowed_BNF = (frames_BNF - 0.97 * before_BNF) * self.window
        power_BNP = torch.fft.rfft(windowed_BNF, NUM_POINTS).abs().square()
        with torch.autocast(waveforms.device.type, enabled=False):  # powers span more than half precision holds
            mels_BNM = power_BNP @ self.filters
        return mels_BNM.clamp(min=LOG_FLOOR).log(), padding_BN


def mel_filters() -> Tensor:
    """Return Kaldi's triangular filters, equally spaced on the mel scale, (NUM_POINTS / 2 + 1, M) float32."""

    mels_P1 = 1127 * (1 + torch.arange(NUM_POINTS // 2 + 1)[:, None] * (SAMPLE_RATE / NUM_POINTS) / 700).log()
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (LOWEST_HERTZ, SAMPLE_RATE / 2))
    width = (highest - lowest) / (NUM_MELS + 1)
    left_M = lowest + torch.arange(NUM_MELS) * width
    return torch.minimum((mels_P1 - left_M) / width, (left_M + 2 * width - mels_P1) / width).clamp(min=0)


class EatEncoder(Waveforms, Data2Vec2Encoder):
    """EAT's encoder: log-mel spectrogram, patch embedding, fixed positions, extra tokens, LayerNorm, blocks.

    Inputs are waveforms, (B, L) float in [-1, 1], 16 kHz mono. The spectrogram is padded with zeros, or cut, to
    ``target_length`` frames.
    """

    config: EatEncoderConfig

    def __init__(self, config: EatEncoderConfig) -> None:
        super().__init__(config)
        dim, num_positions = config.embed_dim, config.max_length * config.num_columns
        self.local_encoder = nn.ModuleDict({"proj": PatchProjection(1, dim, EAT_PATCH, stride=EAT_PATCH)})
        self.fixed_positional_encoder = nn.ParameterDict({"positions": torch.zeros(1, num_positions, dim)})
        self.log_mel = LogMel()
        self.add_blocks()

    @property
    def window(self) -> int:
        """Number of samples from which ``target_length`` frames are computed."""
        return (self.config.target_length - 1) * HOP + FRAME

    def windows(self, inputs: Inputs) -> Inputs:
        """Divide clips of more than ``target_length`` frames into windows, (B·W, :attr:`window`)."""
        waveforms, lengths, _ = inputs
        hop = self.config.target_length * HOP
        num_windows = -(-((waveforms.shape[1] - FRAME) // HOP + 1) // self.config.target_length)
        if num_windows < 2:
            return inputs
        missing = (num_windows - 1) * hop + self.window - waveforms.shape[1]
        starts = torch.arange(num_windows, device=waveforms.device) * hop
        whole = torch.full_like(waveforms[:, 0], waveforms.shape[1], dtype=torch.int64)
        ends = whole if lengths is None else lengths.clamp(min=FRAME)
        lengths_BW = (ends[:, None] - starts).clamp(0, self.window)
        num_frames_BW = (lengths_BW - FRAME).div(HOP, rounding_mode="floor").add(1).clamp(min=0).float()
        parts = pad(waveforms, (0, max(missing, 0))).unfold(1, self.window, hop).flatten(0, 1)
        shares_BW = num_frames_BW / num_frames_BW.sum(dim=1, keepdim=True)
        return Inputs(parts, lengths_BW.flatten().clamp(min=FRAME), shares_BW)

    def padding_mask(self, lengths: Tensor | None, num_samples: int | None = None) -> None:
        """Return ``None``: EAT treats the zeros that pad a spectrogram like sound."""

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        x_BND = self.local_features(inputs.values, inputs.lengths)
        return self.add_extra_tokens(x_BND + self.fixed_positional_encoder["positions"][:, : x_BND.shape[1]])

    def local_features(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the projected patches, (B, N, D)."""
        spectrogram_BFM = self.spectrogram(self.prepare(waveforms), lengths)
        return self.local_encoder["proj"](spectrogram_BFM[:, None]).flatten(2).transpose(1, 2)

    def spectrogram(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute log-mel spectrograms, padded with zeros to F frames, then normalized: (B, F, M)."""
        log_mel_BFM, padding_BF = self.log_mel(waveforms[:, : self.window], lengths)
        if padding_BF is not None:
            log_mel_BFM = log_mel_BFM.masked_fill(padding_BF[..., None], 0)
        log_mel_BFM = pad(log_mel_BFM, (0, 0, 0, self.config.target_length - log_mel_BFM.shape[1]))
        return (log_mel_BFM - self.config.log_mel_mean) / (2 * self.config.log_mel_std)

    def num_tokens(self, shape: Sequence[int] | None = None) -> int:
        return self.config.num_extra_tokens + self.config.target_length * NUM_MELS // EAT_PATCH**2

    def example(self, count: int) -> Tensor:
        return torch.zeros(count, self.window // 2)

    @property
    def free_axes(self) -> dict[int, tuple[str, int, int]]:
        # Two frames and less than a window, because torch.export treats one frame, and a whole window, as constant.
        return super().free_axes | {1: ("time", FRAME + HOP, self.window - 1)}

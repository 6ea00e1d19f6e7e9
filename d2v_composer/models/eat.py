"""EAT, data2vec 2.0's image model on log-mel spectrograms of any sound: its encoder.

Shapes: B clips, L samples, W windows of a clip, N patches, F frames of 10 ms, M mels, D channels.
Source: EAT (Chen et al. 2024, arXiv:2401.03497), github.com/cwx-worst-one/EAT at 06c1c34.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from d2v_composer.models.audio import FRAME, HOP, LogMel, Sound
from d2v_composer.models.configs import EAT_PATCH, NUM_MELS, EatEncoderConfig
from d2v_composer.models.encoder import Data2Vec2Encoder, Inputs
from d2v_composer.models.images import PatchProjection


class EatEncoder(Sound, Data2Vec2Encoder):
    """Log-mel spectrogram, patch embedding, fixed positions, CLS, LayerNorm, ``prenet_depth`` blocks.

    Inputs are waveforms, (B, L) float in [-1, 1], 16 kHz mono. A spectrogram has ``target_length`` frames. A shorter
    clip is filled up, as in pre-training, and no token is padding. A longer clip is cut off, unless :meth:`windows`
    divides it before.
    """

    config: EatEncoderConfig

    def __init__(self, config: EatEncoderConfig) -> None:
        super().__init__(config)
        dim, num_positions = config.embed_dim, config.max_length * config.num_columns
        self.local_encoder = nn.ModuleDict({"proj": PatchProjection(1, dim, EAT_PATCH, stride=EAT_PATCH)})
        self.fixed_positional_encoder = nn.ParameterDict({"positions": torch.zeros(1, num_positions, dim)})
        self.log_mel = LogMel()
        self.add_blocks(config)

    @property
    def window(self) -> int:
        """Number of samples that a whole spectrogram covers."""
        return (self.config.target_length - 1) * HOP + FRAME

    def windows(self, inputs: Inputs) -> Inputs:
        """Divide clips that are longer than a spectrogram into consecutive windows, (B·W, window)."""
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
        """Return ``None``: the zeros that fill up a spectrogram count like sound."""

    def embed_tokens(self, inputs: Inputs, padding_mask: Tensor | None = None) -> Tensor:
        x_BND = self.local_features(inputs.values, inputs.lengths)
        return self.add_extra_tokens(x_BND + self.fixed_positional_encoder["positions"][:, : x_BND.shape[1]])

    def local_features(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the projected patches, (B, N, D)."""
        spectrogram_BFM = self.spectrogram(self.prepare(waveforms), lengths)
        return self.local_encoder["proj"](spectrogram_BFM[:, None]).flatten(2).transpose(1, 2)

    def spectrogram(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute log-mel spectrograms, (B, F, M), filled up with zeros, then normalized."""
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

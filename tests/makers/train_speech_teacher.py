"""Train the teacher of the quickstart with sound, without labels: a small data2vec 2.0 audio model.

    python tests/makers/train_speech_teacher.py speech/all_clips teacher.safetensors

1. The encoder's convolutions learn to tell the log-mel spectrogram, frame by frame. Then the encoder is frozen, its
   positional convolutions still random: what is to be learned is left to the blocks.
2. The blocks learn to tell which two pieces of sound come from the same place in the same clip, although speed, pitch,
   formants, tone and noise differ: what is left is what is said. All pieces of a batch come from one package, and thus
   from one voice, so that the voice does not help. The loss is InfoNCE on the mean over time of the last block's output
   and of the layers' mean, which a student regresses.

A file's name up to the first "-" is its package; prepare_speech.py leaves the judged words out.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss, normalize

from d2v_composer.checkpoints.model_file import write_model_file
from d2v_composer.models.attention import init_linear_layers
from d2v_composer.models.audio import NUM_MELS, AudioEncoder, LogMel
from d2v_composer.models.backbone import hash_weights
from d2v_composer.models.configs import SAMPLE_RATE, AudioEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.targets import norm_mean

# The strides and windows of the released models, in narrow.
ENCODER = AudioEncoderConfig(
    embed_dim=128,
    num_heads=4,
    norm_eps=1e-5,
    num_alibi_heads=4,
    alibi_scale_shape=(1, 1, 4, 1, 1),
    prenet_depth=0,
    feature_encoder_spec="[(32, 10, 5)] + [(64, 3, 2)] * 4 + [(96, 2, 2)] * 2",
    conv_pos_width=38,
    conv_pos_depth=2,
)
CONFIG = TeacherConfig(encoder=ENCODER, depth=6, average_top_k_layers=6, final_layer_norm=False)
BATCH, SHORTEST, LONGEST = 64, 0.45, 1.1  # pieces, their seconds
ENCODER_STEPS, STEPS, WARMUP = 400, 500, 80
LEARNING_RATE, WEIGHT_DECAY, CLIP, TEMPERATURE = 1e-3, 0.05, 3.0, 0.1
SPEED, FORMANTS = 0.22, 0.18  # largest change: factor e^±SPEED, e^±FORMANTS
TONE, LOUDEST_NOISE, SOFTEST_NOISE = 0.6, 0.1, 0.001  # nepers (standard deviation); noise relative to the sound
EDGE = 0.06  # of a piece, left out at its ends
NUM_POINTS, HOP, QUEFRENCIES = 512, 128, 25  # of the Fourier transforms; those that make the spectrum's envelope
FRAMES_PER_HOP = 2  # log_mel's frames for one of the encoder's


class Clips:
    """Clips by package, and random pieces of them."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.rng, self.clips = rng, {}
        for path in sorted(folder.glob("*.flac")):
            clip = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            self.clips.setdefault(path.stem.split("-")[0], []).append(clip)
        self.packages = list(self.clips)

    def draw(self, seconds: float, package: str, count: int) -> Tensor:
        """Return pieces, (B, L); longer clips are likelier, and quiet places are left out."""
        size = int(seconds * SAMPLE_RATE)
        clips = [clip for clip in self.clips[package] if len(clip) >= size]
        weights = np.array([min(len(clip), 4 * SAMPLE_RATE) for clip in clips]) ** 0.7
        chosen = self.rng.choice(len(clips), count, p=weights / weights.sum(), replace=False)
        return torch.stack([self.cut(clips[number], size) for number in chosen])

    def cut(self, clip: Tensor, size: int) -> Tensor:
        for _ in range(10):
            start = int(self.rng.integers(len(clip) - size + 1))
            piece = clip[start : start + size]
            if piece.std() > 0.4 * clip.std():
                break
        return piece


def perturb(pieces_BL: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the same sounds as another voice would say them in another room; all at one speed."""
    (count, size), speed = pieces_BL.shape, math.exp(rng.uniform(-SPEED, SPEED))
    # Speed and pitch: resampled, from a random start.
    kept = int(size * (1 - EDGE))
    place_L = torch.arange(int((kept - 2) / speed)) * speed
    place_BL = place_L + torch.randint(size - kept, (count, 1))
    before_BL = place_BL.long()
    part_BL = place_BL - before_BL
    sound_BL = pieces_BL.gather(1, before_BL) * (1 - part_BL) + pieces_BL.gather(1, before_BL + 1) * part_BL
    # Formants: the spectrum's envelope is stretched, and its fine structure, the pitch, stays. Tone: a random filter.
    window = torch.hann_window(NUM_POINTS)
    spectrum_BFN = torch.stft(sound_BL, NUM_POINTS, HOP, window=window, return_complex=True)
    cepstrum_BFN = torch.fft.irfft((spectrum_BFN.abs() + 1e-4).log(), dim=1)
    cepstrum_BFN[:, QUEFRENCIES : 1 - QUEFRENCIES] = 0
    envelope_BFN = torch.fft.rfft(cepstrum_BFN, dim=1).real
    last = NUM_POINTS // 2
    stretch_B1 = torch.exp(FORMANTS * (2 * torch.rand(count, 1) - 1))
    place_BF = (torch.arange(last + 1) * stretch_B1).clamp(max=last - 0.001)
    below_BF = place_BF.long()
    part_BF1 = (place_BF - below_BF)[..., None]
    below_BFN = below_BF[..., None].expand_as(envelope_BFN)
    stretched_BFN = envelope_BFN.gather(1, below_BFN) * (1 - part_BF1)
    stretched_BFN += envelope_BFN.gather(1, below_BFN + 1) * part_BF1
    tone_BF = interpolate(TONE * torch.randn(count, 1, 7), last + 1, mode="linear", align_corners=True)[:, 0]
    gain_BFN = (stretched_BFN - envelope_BFN + tone_BF[..., None]).exp()
    sound_BL = torch.istft(spectrum_BFN * gain_BFN, NUM_POINTS, HOP, window=window, length=sound_BL.shape[1])
    noise_B1 = torch.exp(torch.empty(count, 1).uniform_(math.log(SOFTEST_NOISE), math.log(LOUDEST_NOISE)))
    return sound_BL + noise_B1 * sound_BL.std(dim=1, keepdim=True) * torch.randn_like(sound_BL)


def train(phase: str, optimizer: torch.optim.Optimizer, steps: int, compute_loss: Callable[[], Tensor]) -> None:
    start = time.time()
    for step in range(steps):
        factor = min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], CLIP)
        optimizer.step()
        if step % 50 == 0:
            print(f"{phase} {step}: loss {loss.item():.3f}, {(time.time() - start) / 60:.1f} min", flush=True)


def train_encoder(encoder: AudioEncoder, clips: Clips) -> None:
    """Regress the log-mel spectrogram, each band with mean 0 and variance 1, from the convolutions' outputs."""
    head, statistics = nn.Linear(ENCODER.embed_dim, NUM_MELS), []

    def compute_loss() -> Tensor:
        pieces_BL = torch.cat([clips.draw(0.8, package, 6) for package in clips.packages])
        sound_BL = perturb(pieces_BL, clips.rng)
        target_BNM = LogMel()(encoder.prepare(sound_BL))[0][:, ::FRAMES_PER_HOP]
        if not statistics:
            statistics.extend([target_BNM.mean(dim=(0, 1)), target_BNM.std(dim=(0, 1)).clamp(min=0.3)])
        with torch.autocast("cpu", torch.bfloat16):
            features_BND = encoder.local_features(sound_BL)
        prediction_BNM = head(features_BND.float())
        target_BNM = (target_BNM - statistics[0]) / statistics[1]
        return mse_loss(prediction_BNM, target_BNM[:, : prediction_BNM.shape[1]])

    parts = (encoder.local_encoder, encoder.project_features, head)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    train("encoder", torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY), ENCODER_STEPS, compute_loss)
    encoder.requires_grad_(False)


def contrast(one_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return InfoNCE, in both directions."""
    similarity_BB = normalize(one_BD, dim=1) @ normalize(other_BD, dim=1).T / TEMPERATURE
    own_B = torch.arange(len(one_BD))
    return (cross_entropy(similarity_BB, own_B) + cross_entropy(similarity_BB.T, own_B)) / 2


def train_blocks(teacher: Data2Vec2, clips: Clips) -> None:
    """Learn embeddings by which a piece is found among others of its voice, after another change."""

    def embed(sound_BL: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output_BTD, layers = teacher.forward_blocks(teacher.encode(sound_BL))
        return output_BTD.float().mean(dim=1), norm_mean(layers, 0, "layer", final_layer_norm=False).mean(dim=1)

    def compute_loss() -> Tensor:
        package = clips.packages[clips.rng.integers(len(clips.packages))]
        pieces_BL = clips.draw(clips.rng.uniform(SHORTEST, LONGEST), package, BATCH)
        one, other = (embed(perturb(pieces_BL, clips.rng)) for _ in range(2))
        return contrast(one[0], other[0]) + contrast(one[1], other[1])

    parameters = [*teacher.blocks.parameters(), teacher.encoder.alibi_scale.requires_grad_()]
    decayed, rest = ([weight for weight in parameters if (weight.ndim == 2) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    train("blocks", torch.optim.AdamW(groups, betas=(0.9, 0.98)), STEPS, compute_loss)


def main(speech: Path, out: Path) -> None:
    torch.manual_seed(17)
    teacher, clips = Data2Vec2(CONFIG), Clips(speech, np.random.default_rng(17))
    init_linear_layers(teacher.blocks)
    train_encoder(teacher.encoder.requires_grad_(), clips)
    teacher.blocks.requires_grad_()
    train_blocks(teacher, clips)
    provenance = {
        "source": "tests/makers/train_speech_teacher.py",
        "sha256": hash_weights(teacher),
        "weights": "model",
        "dtype": "float16",
        "license": "CC BY-SA 3.0, as the speech that it was trained on",
    }
    tensors = {name: tensor.half() for name, tensor in teacher.state_dict().items()}
    write_model_file(out, "teacher", CONFIG.model_dump(mode="json"), provenance, tensors)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

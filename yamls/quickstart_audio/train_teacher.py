"""Train the teacher of the quickstart with sound, without labels: a small data2vec 2.0 audio model.

    python yamls/quickstart_audio/train_teacher.py speech/all_clips teacher.safetensors

1. The encoder's convolutions learn to tell the log-mel spectrogram, frame by frame, and are frozen.
2. The rest learns to tell which two pieces of sound come from the same place in the same clip, although speed, pitch,
   formants, tone and noise differ: what is left is what is said. All pieces of a batch come from one package, and thus
   from one voice, so that the voice does not help. The loss is InfoNCE on the mean over time of the last block's output
   and of the layers' mean, which a student regresses.

A file's name up to the first "-" is its package; prepare.py leaves the judged words out. The model is written each
hundred steps.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss, normalize, pad

from d2v_composer.checkpoints.student_file import write_model_file
from d2v_composer.models.attention import init_linear_layers
from d2v_composer.models.audio import log_mel
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.sizes import SAMPLE_RATE, Data2Vec2AudioConfig
from d2v_composer.models.targets import norm_mean

# The strides and windows of the released models, in narrow.
CONFIG = Data2Vec2AudioConfig(
    embed_dim=128,
    num_heads=4,
    norm_eps=1e-5,
    num_alibi_heads=4,
    alibi_scale_shape=(1, 1, 4, 1, 1),
    prenet_depth=0,
    depth=6,
    average_top_k_layers=6,
    feature_encoder_spec="[(32, 10, 5)] + [(64, 3, 2)] * 4 + [(96, 2, 2)] * 2",
    conv_pos_width=38,
    conv_pos_depth=2,
)
BATCH, SHORTEST, LONGEST = 64, 0.45, 1.1  # pieces, their seconds
FILLED, WHOLE = 0.75, 0.8  # part of a batch's length that a piece fills at least; weight of pieces that are not cut
FRAME, PAUSE, QUIET, MARGIN = 160, 6, 30, 800  # samples; frames that make a pause; decibels below the loudest; samples
ENCODER_STEPS, STEPS, WARMUP = 500, 1000, 100
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.05, 3.0
TEMPERATURE, LAYERS_WEIGHT = 0.1, 1.0
SPEED, FORMANTS, PACE = 0.25, 0.2, 0.1  # largest change: factor e^±SPEED, e^±FORMANTS, 1 ± PACE
TONE, LOUDEST_NOISE, SOFTEST_NOISE = 0.6, 0.1, 0.001  # nepers (standard deviation); noise relative to the sound
EDGE = 0.06  # of a piece, left out at its ends
NUM_POINTS, HOP, QUEFRENCIES = 512, 128, 25  # of the Fourier transforms; those that make the spectrum's envelope
FRAMES_PER_HOP = 2  # log_mel's frames for one of the encoder's


class Pieces:
    """Pieces of one package's clips: what is said between two pauses, or a span of that if it is long."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.rng, self.pieces = rng, {}
        for path in sorted(folder.glob("*.flac")):
            clip = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            self.pieces.setdefault(path.stem.split("-")[0], []).extend(split(clip))
        self.packages = list(self.pieces)
        self.sizes = {package: np.array([len(each) for each in pieces]) for package, pieces in self.pieces.items()}

    def draw(self, seconds: float, package: str, count: int = BATCH) -> Tensor:
        """Return pieces, (B, L): most of them whole, a little shorter than L, with silence behind."""
        size, sizes = int(seconds * SAMPLE_RATE), self.sizes[package]
        weights = np.where(sizes > size, 1 - WHOLE, WHOLE) * (sizes > FILLED * size)
        chosen = self.rng.choice(len(sizes), count, p=weights / weights.sum(), replace=False)
        return torch.stack([self.cut(self.pieces[package][number], size) for number in chosen])

    def cut(self, piece: Tensor, size: int) -> Tensor:
        start = int(self.rng.integers(max(len(piece) - size, 0) + 1))
        piece = piece[start : start + size]
        return pad(piece, (0, size - len(piece)))


def split(clip: Tensor) -> list[Tensor]:
    """Split a clip at its pauses, of which a piece keeps a little at each end."""
    frames = clip[: len(clip) // FRAME * FRAME].reshape(-1, FRAME)
    loudness = frames.square().mean(dim=1)
    loud = (loudness > loudness.max() * 10 ** (-QUIET / 10)).nonzero()[:, 0]
    ends = ((loud[1:] - loud[:-1]) > PAUSE).nonzero()[:, 0].tolist()
    firsts, lasts = [0, *(end + 1 for end in ends)], [*ends, len(loud) - 1]
    spans = [(int(loud[i]) * FRAME, int(loud[j] + 1) * FRAME) for i, j in zip(firsts, lasts, strict=True)]
    return [clip[max(start - MARGIN, 0) : end + MARGIN] for start, end in spans]


def perturb(pieces_BL: Tensor, speed: float) -> Tensor:
    """Return the same sounds as another voice would say them in another room; all at one speed."""
    count, size = pieces_BL.shape
    # Speed and pitch: resampled, at a pace that changes on the way, from a random start.
    kept = int(size * (1 - EDGE))
    place_L = torch.linspace(0, 1, int(kept / speed))
    pace_B1 = PACE * (2 * torch.rand(count, 1) - 1)
    place_BL = (place_L + pace_B1 * place_L * (1 - place_L)) * (kept - 2) + torch.randint(size - kept, (count, 1))
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


def any_speed(rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(-SPEED, SPEED))


def learning_rate(step: int, steps: int) -> float:
    return LEARNING_RATE * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], CLIP)
    optimizer.step()


def report(phase: str, step: int, loss: Tensor, start: float) -> None:
    if step % 50 == 0:
        print(f"{phase} {step}: loss {loss.item():.3f}, {(time.time() - start) / 60:.1f} min", flush=True)


def convolutions(teacher: Data2Vec2) -> list[nn.Parameter]:
    """Return the parameters before the positional convolutions."""
    encoder = teacher.encoder
    return [*encoder.local_encoder.parameters(), *encoder.project_features.parameters()]


def train_encoder(teacher: Data2Vec2, pieces: Pieces) -> None:
    """Regress the log-mel spectrogram, each band with mean 0 and variance 1, from the convolutions' outputs."""
    head, start = nn.Linear(CONFIG.embed_dim, 128), time.time()
    optimizer = torch.optim.AdamW([*convolutions(teacher), *head.parameters()], weight_decay=WEIGHT_DECAY)
    statistics = None
    for step in range(ENCODER_STEPS):
        speed = any_speed(pieces.rng)
        each = [pieces.draw(0.8, package, BATCH // 12) for package in pieces.packages]
        sound_BL = perturb(torch.cat(each), speed)
        target_BNM = log_mel(teacher.encoder.prepare(sound_BL))[:, ::FRAMES_PER_HOP]
        if statistics is None:
            statistics = target_BNM.mean(dim=(0, 1)), target_BNM.std(dim=(0, 1)).clamp(min=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            features_BND = teacher.encoder.local_features(sound_BL)
        prediction_BNM = head(features_BND.float())
        length = min(prediction_BNM.shape[1], target_BNM.shape[1])
        target_BNM = (target_BNM - statistics[0]) / statistics[1]
        loss = mse_loss(prediction_BNM[:, :length], target_BNM[:, :length])
        take_step(optimizer, loss, step, ENCODER_STEPS)
        report("encoder", step, loss, start)


def embed(teacher: Data2Vec2, sound_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over time of the output and of the layers' mean, (B, D) each."""
    with torch.autocast("cpu", torch.bfloat16):
        output_BTD, layers = teacher.forward_blocks(teacher.encoder.encode_with_gradient(sound_BL))
    return output_BTD.float().mean(dim=1), norm_mean(layers, 0, "layer", final_layer_norm=False).mean(dim=1)


def contrast(one_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return InfoNCE, in both directions."""
    similarity_BB = normalize(one_BD, dim=1) @ normalize(other_BD, dim=1).T / TEMPERATURE
    own_B = torch.arange(len(one_BD))
    return (cross_entropy(similarity_BB, own_B) + cross_entropy(similarity_BB.T, own_B)) / 2


def train_blocks(teacher: Data2Vec2, pieces: Pieces, out: Path) -> None:
    parameters = [each for each in teacher.parameters() if each.requires_grad]
    decayed = [each for each in parameters if each.ndim in (2, 3)]
    others = [each for each in parameters if each.ndim not in (2, 3)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, start = torch.optim.AdamW(groups, betas=(0.9, 0.98)), time.time()
    for step in range(STEPS):
        package = pieces.packages[pieces.rng.integers(len(pieces.packages))]
        drawn_BL = pieces.draw(pieces.rng.uniform(SHORTEST, LONGEST), package)
        one, other = (embed(teacher, perturb(drawn_BL, any_speed(pieces.rng))) for _ in range(2))
        loss = contrast(one[0], other[0]) + LAYERS_WEIGHT * contrast(one[1], other[1])
        take_step(optimizer, loss, step, STEPS)
        report("blocks", step, loss, start)
        if step % 100 == 99 or step == STEPS - 1:
            save(teacher, out)


def save(teacher: Data2Vec2, out: Path) -> None:
    """Write what load_teacher reads, in float16."""
    tensors = {name: tensor.half() for name, tensor in teacher.state_dict().items()}
    write_model_file(out, "teacher", asdict(CONFIG), teacher.provenance, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIPS", type=Path)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(17)
    provenance = {
        "source": "yamls/quickstart_audio/train_teacher.py",
        "weights": "model",
        "dtype": "float16",
        "licence": "CC BY-SA 3.0, as the speech that it was trained on",
    }
    teacher, pieces = Data2Vec2(CONFIG, provenance), Pieces(arguments.clips, np.random.default_rng(17))
    init_linear_layers(teacher.blocks)
    teacher.requires_grad_(True)
    train_encoder(teacher, pieces)
    for each in convolutions(teacher):
        each.requires_grad_(False)
    train_blocks(teacher, pieces, arguments.out)


if __name__ == "__main__":
    main()

"""Sound as samples: decode clips to 16 kHz mono, and crop them."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from d2v_composer.data.modality import Modality, decoding
from d2v_composer.models.audio import LogMel
from d2v_composer.models.sizes import SAMPLE_RATE
from d2v_composer.system.errors import UnreadableSampleError

FORMATS = ("FLAC", "WAV", "WAVEX", "RF64", "OGG", "MP3")
KIND = "a FLAC, WAV, OGG or MP3 file"
MOST_CHANNELS, SAMPLE_RATES = 16, (4_000, 384_000)
# Two frames, of which a target needs both.
FEWEST_SAMPLES = 720
# A file's; what a model takes whole is far shorter, since attention grows with its square.
LONGEST, LONGEST_WHOLE = 3600, 60  # seconds
LONGEST_HEARD = 10  # seconds, in a report
LOUDEST = 10  # an encoder may overshoot 1
UNKNOWN = (1 << 63) - 1  # libsndfile's length of a FLAC that was written to a pipe
BLOCK = 1 << 18  # samples of each channel decoded at a time


def open_clip(encoded: bytes, longest: int) -> soundfile.SoundFile:
    """Read the header of an audio file.

    Raises:
        UnreadableSampleError: Its format, channels, sample rate or length is not allowed.
    """
    file = soundfile.SoundFile(io.BytesIO(encoded))
    low, high = SAMPLE_RATES
    if file.format not in FORMATS:
        raise UnreadableSampleError(f"is {file.format}, not one of {', '.join(FORMATS)}")
    if file.channels > MOST_CHANNELS:
        raise UnreadableSampleError(f"has {file.channels} channels, more than {MOST_CHANNELS}")
    if not low <= file.samplerate <= high:
        raise UnreadableSampleError(f"has {file.samplerate} samples a second; allowed are {low} to {high}")
    if file.frames == UNKNOWN:
        raise UnreadableSampleError("does not say how long it is; encode it to a file, not to a pipe")
    if file.frames > longest * file.samplerate:
        raise UnreadableSampleError(f"has {file.frames / file.samplerate:,.0f} s, more than {longest}")
    if file.format == "OGG":  # libsndfile ends without an error where the file does
        page = encoded[encoded.rfind(b"OggS") :]
        is_last = len(page) > 27 and page[5] & 4
        if not is_last or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise UnreadableSampleError("is truncated: it has no last page")
    return file


def read_blocks(file: soundfile.SoundFile, count: int) -> Iterator[NDArray[np.float32]]:
    """Decode the next ``count`` samples, and yield them by blocks, mono.

    Raises:
        UnreadableSampleError: The file is truncated.
    """
    while count:
        block = file.read(min(count, BLOCK), dtype="float32", always_2d=True).mean(axis=1)
        if not len(block):
            raise UnreadableSampleError(f"is truncated: it ends {count:,} samples too early")
        count -= len(block)
        yield block


def read_span(file: soundfile.SoundFile, start: int, count: int) -> NDArray[np.float32]:
    """Decode a span of a file to 16 kHz mono, (L,).

    Args:
        file: The file.
        start: The first sample, at the file's rate.
        count: Number of samples, at the file's rate.

    Raises:
        UnreadableSampleError: The file is truncated, or the span shorter than 720 samples, not finite or too loud.
    """
    if file.subtype == "VORBIS":  # libsndfile misses a place in the last page
        for _ in read_blocks(file, start):
            pass
    else:
        file.seek(start)
    resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")  # changes nothing at 16 kHz
    blocks = [resampler.resample_chunk(block) for block in read_blocks(file, count)]
    clip = np.concatenate([*blocks, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
    if len(clip) < FEWEST_SAMPLES:
        raise UnreadableSampleError(f"has {len(clip)} samples at 16 kHz; allowed are at least {FEWEST_SAMPLES}")
    if not np.isfinite(clip).all():
        raise UnreadableSampleError("has samples that are not finite")
    if (loudest := np.abs(clip).max()) > LOUDEST:
        raise UnreadableSampleError(f"has samples up to {loudest:,.0f}; allowed are -1 to 1")
    return clip


def encode_flac(clip: NDArray[np.float32]) -> bytes:
    """Return a clip, (L,) at 16 kHz, as a FLAC file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, clip, SAMPLE_RATE, "PCM_16", format="FLAC")
    return file.getvalue()


class RandomCrop(NamedTuple):
    """The training augmentation of a clip: a random span of at most so many samples."""

    longest: int
    most: float = 1.0
    """Share of a clip that a crop may have."""

    @property
    def sample_bytes(self) -> int:
        return 4 * self.longest

    def __call__(self, sample: bytes | Tensor, rng: np.random.Generator, source: str = "clip") -> Tensor:
        """Crop a clip: a file's bytes, of which only the span is decoded, or (L,) at 16 kHz.

        Returns:
            (at most ``longest``,) float32 at 16 kHz.

        Raises:
            UnreadableSampleError: The file cannot be decoded.
        """
        if isinstance(sample, Tensor):
            count = min(self.longest, max(round(self.most * len(sample)), FEWEST_SAMPLES))
            start = int(rng.integers(max(len(sample) - count, 0) + 1))
            return sample[start : start + count]
        with decoding(sample, source, KIND), open_clip(sample, LONGEST) as file:
            count = min(file.frames, math.ceil(self.longest * file.samplerate / SAMPLE_RATE))
            clip = read_span(file, int(rng.integers(file.frames - count + 1)), count)
            return torch.from_numpy(clip[: self.longest])


@dataclass(frozen=True)
class Audio(Modality):
    """Clips of sound, 16 kHz mono, of any length."""

    name = "audio"
    unit = "clips"
    suffixes = (".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3")
    columns: ClassVar = {"audio": "bytes"}
    encodings = ("bytes",)
    options = frozenset({"crop_seconds"})
    batch_size = 4  # a minute each takes 2 GB
    has_lengths = True

    def decode(self, stored: bytes, source: str) -> Tensor:
        """Decode a clip to (L,) float32; silence, which trains nothing, can be embedded."""
        with decoding(stored, source, KIND), open_clip(stored, LONGEST_WHOLE) as file:
            return torch.from_numpy(read_span(file, 0, file.frames))

    @classmethod
    def encode(cls, stored: bytes, source: str, **options: Any) -> dict[str, Any]:
        """Keep a 16 kHz mono FLAC, WAV or OGG file; of all others, store 16 kHz mono FLAC of 16 bits.

        Of longer clips, only the first ``most_seconds`` are kept.
        """
        with decoding(stored, source, KIND), open_clip(stored, LONGEST) as file:
            whole = read_span(file, 0, file.frames)
            if whole.min() == whole.max():
                raise UnreadableSampleError("is silent")
            is_plain = (file.samplerate, file.channels) == (SAMPLE_RATE, 1) and file.format != "MP3"
        clip = whole[: round(options.get("most_seconds", LONGEST) * SAMPLE_RATE)]
        if not is_plain or len(clip) < len(whole):
            stored = encode_flac(clip)
        return {"audio": stored, "length": len(clip)}

    def picture(self, sample: Tensor) -> Tensor:
        """Return a square log-mel spectrogram, high pitches on top, of what :meth:`sound` plays."""
        log_mel_1NM, _ = LogMel()(sample[None, : LONGEST_HEARD * SAMPLE_RATE])
        log_mel_NM = log_mel_1NM[0]
        return adaptive_avg_pool1d(log_mel_NM.T.flip(0), len(log_mel_NM.T))

    def sound(self, sample: Tensor) -> bytes:
        return encode_flac(sample[: LONGEST_HEARD * SAMPLE_RATE].numpy())

    def words(self) -> dict[str, str]:
        return {
            "pipeline_tag": "feature-extraction",
            "tag": "audio",
            "kind": "transformer for sound",
            "one": "a clip of sound",
            "each": "second of sound",
            "prepared": "16 kHz mono of any length, in [-1, 1]; the model normalizes them",
            "shape": "(B, samples) float32; if padded with zeros, also lengths=(B,)",
        }

    def choices(self, on_gpu: bool) -> dict[str, Any]:
        return {
            "global_train_batch_size": 64 if on_gpu else 32,
            "device_eval_batch_size": 64 if on_gpu else 32,
            "train_loader.crop_seconds": 15.6 if on_gpu else 2.0,
            "train_loader.shuffle_block_size": 8192,
            "retrieval.baselines": ["log_mel", "encoder", "teacher"],
        }

    def kept(self, config: Any, held_out: bool) -> dict[str, Any]:
        return {"most_seconds": min(config.train_loader.crop_seconds, LONGEST_WHOLE)} if held_out else {}

    def augmentation(self, *, for_views: bool = False, **options: Any) -> RandomCrop:
        # Views are halves: of a clip that a crop takes whole, both would be the same.
        return RandomCrop(round(options["crop_seconds"] * SAMPLE_RATE), 0.5 if for_views else 1.0)

"""Decode audio clips to 16 kHz mono, crop them, and encode them as FLAC."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_composer.data.modality import Modality, decoding
from d2v_composer.models.configs import SAMPLE_RATE
from d2v_composer.models.provenance import Json
from d2v_composer.system.errors import UnreadableSampleError

AUDIO_FORMATS = ("FLAC", "WAV", "WAVEX", "RF64", "OGG", "MP3")
KIND = "a FLAC, WAV, OGG or MP3 file"
MAX_CHANNELS, SAMPLE_RATES = 16, (4_000, 384_000)
# Two frames: a target needs at least two.
MIN_LENGTH = 720
# The longest file, and the longest clip that a model takes whole: attention's cost grows with the square of the length.
MAX_SECONDS, MAX_SECONDS_WHOLE = 3600, 60  # seconds
MAX_LOUDNESS = 10  # an encoder may overshoot 1
UNKNOWN = (1 << 63) - 1  # libsndfile's length of a FLAC that was written to a pipe
BLOCK = 1 << 18  # samples of each channel decoded at a time


def open_clip(encoded: bytes, longest: int) -> soundfile.SoundFile:
    """Read the header of an audio file of at most ``longest`` seconds."""
    file = soundfile.SoundFile(io.BytesIO(encoded))
    low, high = SAMPLE_RATES
    if file.format not in AUDIO_FORMATS:
        raise UnreadableSampleError(f"its format is {file.format}; expected one of {', '.join(AUDIO_FORMATS)}")
    if file.channels > MAX_CHANNELS:
        raise UnreadableSampleError(f"it has {file.channels} channels; the limit is {MAX_CHANNELS}")
    if not low <= file.samplerate <= high:
        raise UnreadableSampleError(f"its sample rate is {file.samplerate} Hz; expected {low} to {high} Hz")
    if file.frames == UNKNOWN:
        raise UnreadableSampleError("its header states no length; encode the clip to a file, not to a pipe")
    if file.frames > longest * file.samplerate:
        raise UnreadableSampleError(f"it is {file.frames / file.samplerate:,.2f} s long; the limit is {longest} s")
    if file.format == "OGG":  # libsndfile ends without an error where the file does
        page = encoded[encoded.rfind(b"OggS") :]
        is_last = len(page) > 27 and page[5] & 4
        if not is_last or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise UnreadableSampleError("truncated: the last Ogg page is missing or incomplete")
    return file


def read_blocks(file: soundfile.SoundFile, count: int) -> Iterator[NDArray[np.float32]]:
    """Decode the next ``count`` samples of a file to mono; yield blocks of at most ``BLOCK`` samples, (L,) float32."""
    while count:
        block = file.read(min(count, BLOCK), dtype="float32", always_2d=True).mean(axis=1)
        if not len(block):
            raise UnreadableSampleError(f"truncated: at least {count:,} samples are missing")
        count -= len(block)
        yield block


def read_span(file: soundfile.SoundFile, start: int, count: int) -> NDArray[np.float32]:
    """Decode a span of a file to 16 kHz mono, (L,) float32.

    Args:
        start: Index of the first sample, at the file's rate.
        count: Number of samples, at the file's rate.
    """
    if file.subtype == "VORBIS":  # libsndfile misses a place in the last page
        for _ in read_blocks(file, start):
            pass
    else:
        file.seek(start)
    resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")  # changes nothing at 16 kHz
    blocks = [resampler.resample_chunk(block) for block in read_blocks(file, count)]
    clip = np.concatenate([*blocks, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
    if len(clip) < MIN_LENGTH:
        raise UnreadableSampleError(f"it has {len(clip)} samples at 16 kHz; expected at least {MIN_LENGTH}")
    if not np.isfinite(clip).all():
        raise UnreadableSampleError("some of its samples are not finite")
    if (loudest := np.abs(clip).max()) > MAX_LOUDNESS:
        raise UnreadableSampleError(f"its samples reach {loudest:,.0f}; expected -1 to 1")
    return clip


def encode_flac(clip: NDArray[np.float32]) -> bytes:
    """Return a clip, (L,) at 16 kHz, as a FLAC file with 16 bits per sample."""
    file = io.BytesIO()
    soundfile.write(file, clip, SAMPLE_RATE, "PCM_16", format="FLAC")
    return file.getvalue()


class RandomCrop(NamedTuple):
    """An augmentation of a clip: a random span of at most ``longest`` samples at 16 kHz."""

    longest: int
    max_share: float = 1.0
    """Largest share of a decoded clip that a crop takes; a crop of 720 samples is always allowed. The share is not used
    for a clip that is given as a file."""

    @property
    def sample_bytes(self) -> int:
        return 4 * self.longest

    def __call__(self, sample: bytes | Tensor, rng: np.random.Generator, source: str = "clip") -> Tensor:
        """Crop a clip, given as a file's bytes or as (L,) float32 at 16 kHz.

        Returns:
            A random span of the clip, (at most ``longest``,) float32 at 16 kHz.
        """
        if isinstance(sample, Tensor):
            count = min(self.longest, max(round(self.max_share * len(sample)), MIN_LENGTH))
            start = int(rng.integers(max(len(sample) - count, 0) + 1))
            return sample[start : start + count]
        with decoding(sample, source, KIND), open_clip(sample, MAX_SECONDS) as file:
            count = min(file.frames, math.ceil(self.longest * file.samplerate / SAMPLE_RATE))
            clip = read_span(file, int(rng.integers(file.frames - count + 1)), count)
            return torch.from_numpy(clip[: self.longest])


@dataclass(frozen=True)
class Audio(Modality):
    """Audio clips, decoded to 16 kHz mono."""

    name = "audio"
    unit = "clips"
    cost_unit = "5-s clip"
    suffixes = (".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3")
    encodings = ("bytes",)
    options = frozenset({"crop_seconds"})
    batch_size = 4  # a minute each takes 2 GB
    has_lengths = True

    def decode(self, stored: bytes, source: str) -> Tensor:
        """Decode a clip of at most 60 seconds to (L,) float32 at 16 kHz."""
        with decoding(stored, source, KIND), open_clip(stored, MAX_SECONDS_WHOLE) as file:
            return torch.from_numpy(read_span(file, 0, file.frames))

    @classmethod
    def encode(cls, stored: bytes, source: str, **options: Json) -> tuple[bytes, int]:
        """Keep a 16 kHz mono FLAC, WAV or OGG file of at most ``most_seconds``.

        Other clips are cut to ``most_seconds`` and converted to 16 kHz mono FLAC with 16 bits per sample.
        """
        with decoding(stored, source, KIND), open_clip(stored, MAX_SECONDS) as file:
            whole = read_span(file, 0, file.frames)
            if whole.min() == whole.max():
                raise UnreadableSampleError("the clip is silent")
            is_plain = (file.samplerate, file.channels) == (SAMPLE_RATE, 1) and file.format != "MP3"
        clip = whole[: round(options.get("most_seconds", MAX_SECONDS) * SAMPLE_RATE)]
        if not is_plain or len(clip) < len(whole):
            stored = encode_flac(clip)
        return stored, len(clip)

    def augmentation(self, for_views: bool, **options: Json) -> RandomCrop:
        # A view takes half of a clip: if a crop took the whole clip, both views would be the same.
        return RandomCrop(round(options["crop_seconds"] * SAMPLE_RATE), 0.5 if for_views else 1.0)

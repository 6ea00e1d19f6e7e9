"""Files of sound: what is decoded, and files that are not what they say."""

import io
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from numpy.typing import NDArray

from d2v_composer.data.audio import Audio, RandomCrop
from d2v_composer.data.modality import read_sample_file, sample_rng
from d2v_composer.system.errors import UnreadableSampleError

RATE = 16_000
ALLOWED = "cannot decode as a FLAC, WAV, OGG or MP3 file"


def noise(count: int, channels: int = 1) -> NDArray[np.float32]:
    """Return a tone with noise, (L,) or (L, channels)."""
    rng = np.random.default_rng(count)
    sound = 0.3 * np.sin(np.arange(count) * 0.05) + rng.normal(0, 0.05, count)
    return np.repeat(sound.astype(np.float32)[:, None], channels, axis=1) if channels > 1 else sound.astype(np.float32)


def encoded(sound: NDArray, rate: int = RATE, format: str = "FLAC", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=format, subtype=subtype)
    return file.getvalue()


def floats(sound: NDArray) -> bytes:
    return encoded(sound.astype(np.float32), format="WAV", subtype="FLOAT")


def with_length(flac: bytes, count: int) -> bytes:
    """Write another number of samples into a FLAC's header; 0: unknown."""
    high, low = divmod(count, 1 << 32)
    return flac[:21] + bytes([flac[21] & 0xF0 | high]) + struct.pack(">I", low) + flac[26:]


VIDEO = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + b"\0\0\1\0mdat" + bytes(248)
AVI = b"RIFF" + struct.pack("<I", 300) + b"AVI LIST" + bytes(300)
HOURS = 10 * 3600 * RATE
VORBIS = encoded(noise(9 * RATE), format="OGG", subtype="VORBIS")
FLAC, MP3 = encoded(noise(RATE)), encoded(noise(RATE), format="MP3")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "mp4.wav": (VIDEO, f"{ALLOWED} ({len(VIDEO)} bytes)"),
    "avi.wav": (AVI, f"{ALLOWED} ({len(AVI)} bytes)"),
    "empty.flac": (b"", f"{ALLOWED} (0 bytes)"),
    "aiff.wav": (encoded(noise(RATE), format="AIFF"), "its format is AIFF; expected one of FLAC, WAV, WAVEX, RF64"),
    "200.wav": (encoded(noise(800, 200), format="WAV"), "it has 200 channels; the limit is 16"),
    "1hz.wav": (encoded(noise(800), 1, "WAV"), "its sample rate is 1 Hz; expected 4000 to 384000 Hz"),
    "10h.flac": (with_length(FLAC, HOURS), "it is 36,000.00 s long; the limit is"),
    "piped.flac": (with_length(FLAC, 0), "its header states no length; encode the clip to a file, not to a pipe"),
    "lying.flac": (with_length(FLAC, 2 * RATE), ALLOWED),
    "half.flac": (FLAC[: len(FLAC) // 2], ALLOWED),
    "half.mp3": (MP3[: len(MP3) // 2], "truncated: at least"),
    "half.ogg": (VORBIS[: len(VORBIS) // 2], "truncated: the last Ogg page is missing or incomplete"),
    "pages.ogg": (VORBIS[: VORBIS.rindex(b"OggS")], "truncated: the last Ogg page is missing or incomplete"),
    "most.ogg": (VORBIS[:-9], "truncated: the last Ogg page is missing or incomplete"),
    "nan.wav": (floats(np.full(RATE, np.nan)), "some of its samples are not finite"),
    "inf.wav": (floats(np.full(RATE, np.inf)), "some of its samples are not finite"),
    "int.wav": (floats(np.full(RATE, 1000)), "its samples reach 1,000; expected -1 to 1"),
    "none.wav": (encoded(noise(0), format="WAV"), "it has 0 samples at 16 kHz; expected at least 720"),
    "719.wav": (encoded(noise(719), format="WAV"), "it has 719 samples at 16 kHz; expected at least 720"),
    "719.flac": (encoded(noise(1438), 32_000), "it has 719 samples at 16 kHz; expected at least 720"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_one_line_in_bounded_memory(name: str) -> None:
    content, message = HOSTILE[name]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop, rng = RandomCrop(60 * RATE), np.random.default_rng(0)
    reads: list[Callable[[], object]] = [lambda: Audio().decode(content, name), lambda: crop(content, rng, name)]
    for read in reads:
        with pytest.raises(UnreadableSampleError, match=rf"\A{re.escape(f'{name}: {message}')}[^\n]*\Z"):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 17  # KiB


def test_silence_is_named() -> None:
    with pytest.raises(UnreadableSampleError, match=r"^a: the clip is silent$"):
        Audio.encode(encoded(np.zeros(RATE, np.float32)), "a")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "10h.wav"
    header = encoded(noise(0), format="WAV")
    with path.open("wb") as file:
        file.write(header[:40] + struct.pack("<I", 2 * HOURS))
        file.truncate(len(header) + 2 * HOURS)
    with pytest.raises(UnreadableSampleError, match=r"10h.wav has 1,152,000,044 bytes; the limit is 1,073,741,824$"):
        read_sample_file(path)


@pytest.mark.parametrize(
    ("format", "subtype", "rate", "tolerance"),
    [
        ("FLAC", None, RATE, 5e-5),
        ("FLAC", "PCM_24", 44_100, 1e-6),
        ("WAV", "FLOAT", RATE, 0),
        ("WAVEX", None, 8_000, 5e-5),
        ("RF64", None, 48_000, 5e-5),
        ("OGG", "VORBIS", 22_050, 0.2),
        ("OGG", "OPUS", 48_000, 0.2),
        ("MP3", None, RATE, 0.2),
    ],
)
def test_clips_are_decoded_to_16_khz_mono(format: str, subtype: str | None, rate: int, tolerance: float) -> None:
    sound = noise(3 * rate + 7, channels=2)
    sound[:, 1] *= 0.5
    expected = soxr.resample(sound.mean(axis=1), rate, RATE)
    clip = Audio().decode(encoded(sound, rate, format, subtype), "clip")
    assert clip.dtype == torch.float32
    assert abs(len(clip) - (3 * rate + 7) * RATE / rate) < 1
    np.testing.assert_allclose(clip, expected, rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.parametrize(
    ("format", "subtype"), [("FLAC", None), ("WAV", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_a_crop_is_a_span_of_the_clip(format: str, subtype: str | None) -> None:
    content = encoded(noise(100_000), RATE, format, subtype)
    whole, crop = Audio().decode(content, "clip"), RandomCrop(4000)
    for epoch in range(20):
        span = crop(content, sample_rng(0, epoch, 1))
        torch.testing.assert_close(span, crop(whole, sample_rng(0, epoch, 1)), rtol=0, atol=1e-2)
    assert torch.equal(RandomCrop(100_001)(content, sample_rng(0, 0, 1)), whole)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 192_000])
def test_crops_of_long_clips_are_of_one_length(rate: int) -> None:
    content = encoded(noise(2 * rate), rate)
    crop: Any = RandomCrop(12_345)
    assert {len(crop(content, sample_rng(0, epoch, 1))) for epoch in range(20)} == {12_345}

"""Embed a folder of sound: each clip as if alone, unreadable files named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_composer import load_teacher
from d2v_composer.commands import embed as embed_command
from d2v_composer.data.audio import Audio
from d2v_composer.embedding.embed_source import Embedded
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_clip, truncated, write_files

TEACHER = GOLDEN / "audio_base.pt"
NUM_CLIPS = 22

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Clips of many lengths in a folder with subfolders; two of one length are equal, and are a batch."""
    clips = {}
    for i in range(NUM_CLIPS):
        suffix = ("flac", "wav", "OGG")[i % 3]
        length = 2000 + 531 * (i * 7 % 11)
        clips[f"{('a', 'b/deep')[i >= 11]}/{i:02}.{suffix}"] = encoded_clip(i, length, format=suffix.upper())
    return write_files(tmp_path / "sounds", clips)


def embed(source: Path, out: Path, *options: str) -> Embedded:
    arguments = str(TEACHER), str(source), str(out), "--workers", "0", "--pooling", "mean", "--batch-size", "4"
    return embed_command.main([*arguments, *options])


def test_clips_are_embedded_as_if_alone(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, teacher = tmp_path / "whole.npy", load_teacher(TEACHER)
    embed(sounds, whole)
    assert f"wrote {whole}: {NUM_CLIPS} embeddings of 48 dimensions" in (said := capsys.readouterr().out)
    assert " clips/s\n" in said
    ids = np.load(tmp_path / "whole.ids.npy").tolist()
    assert ids == sorted(path.relative_to(sounds).as_posix() for path in sounds.rglob("*.*"))
    with torch.inference_mode():
        for path, embedding in zip(ids, np.load(whole), strict=True):
            clip = Audio().decode((sounds / path).read_bytes(), path)
            expected = teacher.embed(clip[None], pooling="mean")[0]
            torch.testing.assert_close(torch.from_numpy(embedding), expected, rtol=0, atol=2e-5)


def test_files_that_lie_stop_or_are_skipped(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More of them in tests/data/test_audio_files.py."""
    half, long = truncated(encoded_clip(1, 16000)), encoded_clip(1, 4000 * 61, rate=4000)
    write_files(sounds, {"a/half.flac": half, "b/long.flac": long, "b/silent.flac": encoded_clip(1, 4000, volume=0)})
    problems = {
        "a/half.flac": "cannot decode as a FLAC, WAV, OGG or MP3 file",
        "b/long.flac": "it is 61.00 s long; the limit is 60 s",
    }
    with pytest.raises(InputError, match=r"\A\S+half\.flac: cannot decode .*; --skip-unreadable skips such clips\Z"):
        embed(sounds, tmp_path / "out.npy")
    result = embed(sounds, tmp_path / "out.npy", "--skip-unreadable")
    assert (result.images, len(result.skipped)) == (NUM_CLIPS + 1, len(problems))
    said = capsys.readouterr().out
    for name, problem in problems.items():
        assert f"  {sounds / name}: {problem}" in said
    assert not {*np.load(tmp_path / "out.ids.npy").tolist()} & problems.keys()

"""Convert folders of sound, and MDS of other makers, to MDS with lengths."""

import io
import json
from pathlib import Path

import pytest
import soundfile
from streaming import MDSWriter, StreamingDataset

from d2v_composer.commands.convert_audio import main
from d2v_composer.data.audio import Audio
from d2v_composer.system.errors import InputError
from helpers import encoded_clip, write_files


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with forty 16 kHz FLAC files, an OGG, a WAV in stereo, an MP3, and one of 44.1 kHz."""
    clips = {f"{('no', 'yes')[i % 2]}/{i:02}.flac": encoded_clip(i, 800 + 400 * i) for i in range(40)}
    other_files = {
        "no/vorbis.ogg": encoded_clip(50, 8000, format="OGG"),
        "no/speech.mp3": encoded_clip(51, 8000, format="MP3"),
        "yes/stereo.wav": encoded_clip(52, 8000, format="WAV", channels=2),
        "yes/cd.wav": encoded_clip(53, 44100, format="WAV", rate=44100),
        "yes/notes.txt": b"notes",
    }
    return write_files(tmp_path_factory.mktemp("sounds"), clips | other_files)


def read(folder: Path) -> list[dict]:
    """Read a data set with Streaming's own class."""
    return list(StreamingDataset(local=str(folder), batch_size=1))


def test_stores_files_as_they_are_and_others_as_flac(
    sounds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = main([str(sounds), str(tmp_path / "out"), "--shard-size", "50kb", "--workers", "2"])
    said = capfd.readouterr().out
    summary = json.loads((tmp_path / "out" / "conversion.json").read_bytes())
    samples = read(tmp_path / "out")
    assert [len(Audio().decode(sample["audio"], "clip")) for sample in samples] == summary["lengths"] == result.lengths
    assert summary["clips"] == result.samples == len(samples) == 44
    assert summary["classes"] == ["no", "yes"]
    assert "44 clips (0.01 hours), 2 classes" in said
    assert "1 .txt" in said
    assert result.shards > 2
    originals = {path.read_bytes(): path for path in sounds.rglob("*.*")}
    changed = []
    for sample in samples:
        file = soundfile.SoundFile(io.BytesIO(sample["audio"]))
        assert (file.samplerate, file.channels) == (16000, 1)
        if sample["audio"] in originals:
            assert sample["label"] == ("no", "yes").index(originals[sample["audio"]].parent.name)
        else:
            changed.append((file.format, file.subtype, int(sample["label"])))
    assert sorted(changed) == [("FLAC", "PCM_16", 0), ("FLAC", "PCM_16", 1), ("FLAC", "PCM_16", 1)]
    assert sum(summary["lengths"]) == pytest.approx(sum(800 + 400 * i for i in range(40)) + 24000 + 16000, abs=1200)


def test_names_what_cannot_be_used(tmp_path: Path) -> None:
    """tests/data/test_audio_files.py has more of them."""
    sounds = write_files(tmp_path / "sounds", {"bad.flac": b"fLaC" + bytes(90), "good.flac": encoded_clip(1, 4000)})
    command = [str(sounds), str(tmp_path / "out"), "--workers", "1"]
    problem = r"bad\.flac: .*cannot decode as a FLAC, WAV, OGG or MP3 file.*--skip-unreadable skips such clips"
    with pytest.raises(InputError, match=problem):
        main(command)
    result = main([*command, "--skip-unreadable"])
    assert (result.samples, result.lengths, len(result.skipped)) == (1, [4000], 1)


def test_converts_an_mds_data_set(tmp_path: Path) -> None:
    """From another maker's, with another name for the column, and without lengths."""
    with MDSWriter(out=str(tmp_path / "theirs"), columns={"flac": "bytes", "text": "str"}) as writer:
        for i in range(5):
            writer.write({"flac": encoded_clip(i, 2000 + i), "text": "word"})
    result = main([str(tmp_path / "theirs"), str(tmp_path / "out"), "--column", "flac", "--workers", "1"])
    assert result.lengths == [2000 + i for i in range(5)]
    assert [len(Audio().decode(sample["audio"], "clip")) for sample in read(tmp_path / "out")] == result.lengths

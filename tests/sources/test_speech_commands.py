"""Speech Commands: its unpacked archive, by its own lists."""

from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.sources.labeled import EvaluationSet, load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import encoded_clip, write_files

WORDS = ("go", "no", "up")
TRAIN = [f"{word}/{i}_nohash_0.wav" for word in WORDS for i in (0, 1, 2)]
VALIDATION = [f"{word}/3_nohash_0.wav" for word in WORDS]
TEST = ["go/4_nohash_0.wav", "up/5_nohash_1.wav", "up/6_nohash_0.wav"]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The archive's files; the lists stand between the clips, and one clip is silent."""
    clips = {path: encoded_clip(i, 1000 + 10 * i, "WAV") for i, path in enumerate([*TRAIN, *VALIDATION, *TEST])}
    clips["no/1_nohash_0.wav"] = encoded_clip(0, 1600, "WAV", volume=0)
    lists = {"testing_list.txt": "\n".join(TEST).encode(), "validation_list.txt": "\n".join(VALIDATION).encode()}
    other_files = {"_background_noise_/pink_noise.wav": b"not read", "README.md": b"", "LICENSE": b""}
    first, second = dict(list(clips.items())[:7]), dict(list(clips.items())[7:])
    return {**first, **lists, **other_files, **second}


@pytest.fixture
def unpacked(files: dict[str, bytes], tmp_path: Path) -> Path:
    return write_files(tmp_path / "unpacked", files)


def load(root: Path, **options: Any) -> EvaluationSet:
    return load_labeled_set("speech_commands", root, Audio(), **options)


def test_the_splits_are_those_of_its_lists(unpacked: Path, files: dict[str, bytes]) -> None:
    labeled_set = load(unpacked)
    assert labeled_set.class_names == WORDS
    assert labeled_set.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labeled_set.test.labels.tolist() == [0, 2, 2]
    for split, paths in ((labeled_set.train, TRAIN), (labeled_set.test, TEST)):
        for clip, path in zip(split.samples, paths, strict=True):
            assert torch.equal(clip, Audio().decode(files[path], path))
    few = load(unpacked, max_images=2)
    assert [split.labels.tolist() for split in few[:2]] == [[0, 1], [0, 2]]


def test_what_is_wrong_is_one_line(unpacked: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no testing_list\.txt; unpack https://\S+ there$"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="speech_commands has audio samples, but the model takes images"):
        load_labeled_set("speech_commands", unpacked, Images(32))
    with pytest.raises(InputError, match="cifar10 has image samples, but the model takes clips"):
        load_labeled_set("cifar10", unpacked, Audio())
    (unpacked / "go" / "0_nohash_0.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"unpacked/go/0_nohash_0\.wav: cannot decode as a FLAC, WAV, OGG or MP3 file"):
        load(unpacked)
    (unpacked / "testing_list.txt").write_text("")
    with pytest.raises(InputError, match=r"expected WORD.*, some in testing_list\.txt, some in no list; got 15 clips"):
        load(unpacked)

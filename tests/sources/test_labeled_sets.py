"""Labeled sets: folders and MDS whose files lie otherwise than their format says; Speech Commands by its own lists."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from streaming import MDSWriter

from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples, load_labeled_set
from d2v_composer.system.errors import InputError, ShardError
from helpers import encoded_clip, encoded_image, write_files, write_images, write_mds


def load(format: Any, root: Path, **options: Any) -> EvaluationSet:
    return load_labeled_set(format, root, image_size=32, interpolation="bicubic", **options)


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (["train/cat/a.jpg"], ": no split 'test'; available: train"),
        (["train/cat/a.jpg", "test/a.jpg"], ": expected class folders in train and in test, or in neither"),
        (["train/cat/a.jpg", "test/dog/a.jpg"], "/test/dog/a.jpg: expected one of the classes cat; got 'dog'"),
    ],
)
def test_the_layout_of_a_folder_is_told(tmp_path: Path, images: list[str], fault: str) -> None:
    write_images(tmp_path, images)
    with pytest.raises(InputError, match=f"^{tmp_path}{fault}"):
        load("folder", tmp_path)


@pytest.mark.parametrize("format", ["folder", "mds"])
def test_no_more_images_are_read_than_wanted(format: Literal["folder", "mds"], tmp_path: Path) -> None:
    for split in ("train", "test"):
        if format == "mds":  # one image a shard
            images = [encoded_image(seed, size=480) for seed in range(7)]
            write_mds(tmp_path / split, images, labels=[0, 0, 1, 1, 2, 0, 1])
        else:
            write_images(tmp_path / split, [f"{'cat' if number < 4 else 'dog'}/{number}.jpg" for number in range(7)])
    expected = load(format, tmp_path)
    files = sorted(path for path in (tmp_path / "train").rglob("*.*") if path.suffix in (".jpg", ".mds"))
    assert len(files) == 7
    for number in {*range(7)} - {0, 2, 4}:
        files[number].write_bytes(b"\0" * files[number].stat().st_size)
    labeled_set = load(format, tmp_path, max_images=3)
    for split, wanted in zip(labeled_set[:2], expected[:2], strict=True):
        assert torch.equal(split.samples, wanted.samples[[0, 2, 4]])
        assert torch.equal(split.labels, wanted.labels[[0, 2, 4]])
    with pytest.raises((InputError, ShardError)):
        load(format, tmp_path)


@pytest.mark.parametrize(
    ("images", "chosen"),
    [
        (["a.jpg", "2024/b.jpg", "2024/May/c.jpg"], ["2024/May/c.jpg", "2024/b.jpg", "a.jpg"]),
        (["train/a.jpg", "test/b.jpg", "c.jpg"], ["test/b.jpg"]),
        (["test/b.jpg", "test/c.jpg"], ["test/b.jpg", "test/c.jpg"]),
    ],
)
def test_a_folder_without_class_folders_has_no_labels(tmp_path: Path, images: list[str], chosen: list[str]) -> None:
    write_images(tmp_path, images)
    labeled_set = load("folder", tmp_path)
    assert not labeled_set.has_labels
    assert labeled_set.num_samples == (0, len(chosen))
    assert labeled_set.class_names == labeled_set.numbered().class_names == ()
    for image, path in zip(labeled_set.test.samples, chosen, strict=True):
        assert torch.equal(image, Images(32, "bicubic").decode((tmp_path / path).read_bytes(), path))
    assert load("folder", tmp_path, max_images=1).num_samples == (0, 1)


def test_what_a_folder_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ("train/cat/a.jpg", "train/dog/a.jpg", "test/cat/a.jpg", "test/notes.txt"))
    load("folder", tmp_path)
    assert caplog.messages == [f"{tmp_path}: left out 1 .txt"]


def test_class_folders_without_splits_are_said_to_be_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ("cat/a.jpg", "dog/a.jpg"))
    assert not load("folder", tmp_path).has_labels
    [said] = caplog.messages
    assert said.startswith(f"{tmp_path}: found no labels; to add labels, sort the files into train/CLASS")


@pytest.mark.parametrize("folder", ["", "test"])
def test_mds_without_labels(tmp_path: Path, folder: str) -> None:
    write_mds(tmp_path / folder, [encoded_image(seed) for seed in range(3)])
    labeled_set = load("mds", tmp_path, label_column=None)
    assert labeled_set.num_samples == (0, 3)
    with pytest.raises(InputError, match=r"no column 'label'|no such folder"):
        load("mds", tmp_path)


def write_named(root: Path, **classes: list[str] | None) -> None:
    """Write splits of three images with labels as d2v convert-images writes them, or as another program does."""
    for split, names in classes.items():
        write_mds(root / split, [encoded_image(seed) for seed in range(3)], [0, 1, 0])
        if names is not None:
            (root / split / "conversion.json").write_text(json.dumps({"classes": names}))


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [(["ant", "bee"], ["ant", "bee"], ["ant", "bee"]), (["ant", "bee"], None, ["ant", "bee"]), (None, None, [])],
)
def test_splits_have_the_classes_that_their_conversion_named(
    tmp_path: Path, train: list[str] | None, test: list[str] | None, names: list[str]
) -> None:
    write_named(tmp_path, train=train, test=test)
    labeled_set = load("mds", tmp_path)
    assert labeled_set.test.labels.tolist() == [0, 1, 0]
    assert labeled_set.class_names == tuple(names)


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    write_named(tmp_path, train=["ant", "bee"], test=["bee", "dog"])
    with pytest.raises(InputError, match=f"^{tmp_path}: train and test name their classes differently; convert both"):
        load("mds", tmp_path)


def test_labels_are_whole_numbers(tmp_path: Path) -> None:
    for split in ("train", "test"):
        with MDSWriter(out=str(tmp_path / split), columns={"image": "bytes", "label": "float64"}) as writer:
            for seed, label in enumerate([1.0, 0.5]):
                writer.write({"image": encoded_image(seed), "label": label})
    with pytest.raises(InputError, match=r"sample 1 of .*train: its label must be a whole number, got .*0\.5"):
        load("mds", tmp_path)


def test_class_embeddings_follow_their_labels() -> None:
    """Those of classes without images come last: they are wrong answers."""
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    train, test = (LabeledSamples(images, torch.tensor(labels)) for labels in ([4, 1], [1, 3]))
    numbered = EvaluationSet(train, test, tuple("abcde"), torch.eye(5)).numbered()
    assert numbered.class_names == ("b", "d", "e")
    assert numbered.test.labels.tolist() == [0, 1]
    assert numbered.class_embeddings is not None
    assert numbered.class_embeddings.argmax(dim=1).tolist() == [1, 3, 4, 0, 2]


WORDS = ("go", "no", "up")
TRAIN = [f"{word}/{i}_nohash_0.wav" for word in WORDS for i in (0, 1, 2)]
VALIDATION = [f"{word}/3_nohash_0.wav" for word in WORDS]
TEST = ["go/4_nohash_0.wav", "up/5_nohash_1.wav", "up/6_nohash_0.wav"]


@pytest.fixture
def speech_commands(tmp_path: Path) -> Path:
    """Write the folder to which the archive unpacks; one clip is silent."""
    clips = {path: encoded_clip(i, 1000 + 10 * i, "WAV") for i, path in enumerate([*TRAIN, *VALIDATION, *TEST])}
    clips["no/1_nohash_0.wav"] = encoded_clip(0, 1600, "WAV", volume=0)
    lists = {"testing_list.txt": "\n".join(TEST).encode(), "validation_list.txt": "\n".join(VALIDATION).encode()}
    other_files = {"_background_noise_/pink_noise.wav": b"not read", "README.md": b"", "LICENSE": b""}
    return write_files(tmp_path / "unpacked", clips | lists | other_files)


def test_the_splits_of_speech_commands_are_those_of_its_lists(speech_commands: Path) -> None:
    labeled_set = load("speech_commands", speech_commands, modality=Audio())
    assert labeled_set.class_names == WORDS
    assert labeled_set.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labeled_set.test.labels.tolist() == [0, 2, 2]
    for split, paths in ((labeled_set.train, TRAIN), (labeled_set.test, TEST)):
        for clip, path in zip(split.samples, paths, strict=True):
            assert torch.equal(clip, Audio().decode((speech_commands / path).read_bytes(), path))
    few = load("speech_commands", speech_commands, modality=Audio(), max_images=2)
    assert [split.labels.tolist() for split in few[:2]] == [[0, 1], [0, 2]]


def test_what_is_wrong_with_speech_commands_is_one_line(speech_commands: Path, tmp_path: Path) -> None:
    def refused(message: str, root: Path = speech_commands, format: str = "speech_commands", **modality: Audio) -> None:
        with pytest.raises(InputError, match=message):
            load(format, root, **modality)

    refused(
        r"nowhere: no testing_list\.txt; unpack https://\S+ in this folder$", tmp_path / "nowhere", modality=Audio()
    )
    refused("speech_commands has audio samples, but images are expected")
    refused("cifar10 has image samples, but clips are expected", format="cifar10", modality=Audio())
    (speech_commands / "go" / "0_nohash_0.wav").write_bytes(b"RIFF")
    refused(r"/go/0_nohash_0\.wav: cannot decode as a FLAC, WAV, OGG or MP3 file", modality=Audio())
    (speech_commands / "testing_list.txt").write_text("")
    refused(
        r"expected clips WORD.*; found \d+ for training and 0 for the test$",
        modality=Audio(),
    )

"""A labelled set whose files lie otherwise than its format says."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from d2v_composer.data.labelled_sets import find_missing_files, load_labelled_set
from d2v_composer.system.errors import InputError
from helpers import encoded_image, write_mds


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_image(seed))


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (["cat/a.jpg"], "train: no such folder"),
        (["train/cat/a.jpg"], "test: no such folder"),
        (["train/cat/a.jpg", "test/a.jpg"], "test: no images in its class folders"),
        (["train/cat/a.jpg", "test/dog/a.jpg"], "test/dog: a class that the train folder lacks"),
    ],
)
def test_the_layout_of_a_folder_is_told(tmp_path: Path, images: list[str], fault: str) -> None:
    for image in images:
        write_image(tmp_path / image)
    with pytest.raises(InputError) as caught:
        load_labelled_set("folder", tmp_path, image_size=32, interpolation="bicubic")
    layout = f"{tmp_path}/train/CLASS/*.jpg and {tmp_path}/test/CLASS/*.jpg, with the same classes"
    assert str(caught.value) == f"{tmp_path}/{fault}; a folder's images are {layout}"


@pytest.mark.parametrize("format", ["folder", "mds"])
def test_no_more_images_are_read_than_wanted(format: Literal["folder", "mds"], tmp_path: Path) -> None:
    for split in ("train", "test"):
        if format == "mds":  # one image a shard
            images = [encoded_image(seed, size=480) for seed in range(7)]
            write_mds(tmp_path / split, images, labels=[0, 1, 0, 1, 0, 1, 2])
        else:
            for number in range(7):
                write_image(tmp_path / split / ("cat" if number < 4 else "dog") / f"{number}.jpg", seed=number)
    options: Any = {"image_size": 32, "interpolation": "bicubic"}
    expected = load_labelled_set(format, tmp_path, **options).at_most(3)
    files = sorted(path for path in (tmp_path / "train").rglob("*.*") if path.suffix in (".jpg", ".mds"))
    assert len(files) == 7
    for number in {*range(7)} - {0, 2, 4}:
        files[number].write_bytes(b"\0" * files[number].stat().st_size)
    found = load_labelled_set(format, tmp_path, **options, max_images=3)
    for split, wanted in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(split.images, wanted.images)
        assert torch.equal(split.labels, wanted.labels)
    with pytest.raises(InputError):
        load_labelled_set(format, tmp_path, **options)


def test_cifar_that_is_here_may_lie_in_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.data.labelled_sets.find_unwritable", lambda folder: "cannot be written")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert find_missing_files("cifar10", tmp_path, download=True) is None
    assert find_missing_files("cifar100", tmp_path, download=True) == f"{tmp_path}: cannot be written"

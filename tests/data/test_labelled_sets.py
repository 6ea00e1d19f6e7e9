"""A labelled set whose files lie otherwise than its format says."""

from pathlib import Path

import pytest

from d2v_composer.data.labelled_sets import find_missing_files, load_labelled_set
from d2v_composer.system.errors import InputError
from helpers import encoded_image


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_image(0))


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


def test_cifar_that_is_here_may_lie_in_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.data.labelled_sets.find_unwritable", lambda folder: "cannot be written")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert find_missing_files("cifar10", tmp_path, download=True) is None
    assert find_missing_files("cifar100", tmp_path, download=True) == f"{tmp_path}: cannot be written"

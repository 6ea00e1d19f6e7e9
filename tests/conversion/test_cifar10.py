"""CIFAR-10 as MDS."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from d2v_composer.data import convert as conversion
from d2v_composer.data.convert import convert_cifar10
from d2v_composer.data.labeled import LabeledImages, LabeledSet, load_labeled_set
from d2v_composer.system.files import sole_user
from helpers import QUICKSTART, refused_by, wait_until
from recipes import convert_cifar10 as recipe


def test_pixels_and_labels_are_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = {split: torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8) for split in ("train", "test")}
    labels = torch.tensor([3, 1, 4, 1, 5])
    whole = LabeledSet(LabeledImages(images["train"], labels), LabeledImages(images["test"], labels))
    monkeypatch.setattr(conversion, "load_labeled_set", lambda *arguments, **options: whole)
    (tmp_path / "out" / ".train.partial").mkdir(parents=True)  # of a killed conversion
    convert_cifar10(tmp_path, tmp_path / "out", 4, 3)
    found = load_labeled_set("mds", tmp_path / "out", image_size=32, interpolation="bicubic")
    for split, num_images in (("train", 4), ("test", 3)):
        assert torch.equal(getattr(found, split).images, images[split][:num_images])
        assert torch.equal(getattr(found, split).labels, labels[:num_images])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]
    monkeypatch.delattr(conversion, "load_labeled_set")  # what exists is not made again
    convert_cifar10(tmp_path, tmp_path / "out", 4, 3)


def test_a_second_conversion_waits_for_the_first_and_finds_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = LabeledImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))
    monkeypatch.setattr(conversion, "load_labeled_set", lambda *arguments, **options: LabeledSet(split, split))
    write, written, go_on = conversion._write, list[Path](), threading.Event()

    def write_slowly(labeled: LabeledImages, num_images: int, folder: Path) -> None:
        written.append(folder)
        assert go_on.wait(60)
        write(labeled, num_images, folder)

    monkeypatch.setattr(conversion, "_write", write_slowly)
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as threads:
        conversions = [threads.submit(convert_cifar10, tmp_path, out, 2, 2) for _ in range(2)]
        wait_until(lambda: bool(written))
        go_on.set()
        for each in conversions:
            each.result(60)
    assert [folder.name for folder in written] == ["train", "test"]
    assert sorted(path.name for path in out.iterdir()) == ["test", "train"]


def test_a_conversion_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "LOCK_SECONDS", 0.0)
    with sole_user(tmp_path / ".lock"):
        refused = refused_by(partial(convert_cifar10, tmp_path), tmp_path)
    assert refused == f"{tmp_path}: another conversion is writing there"


def test_a_split_of_other_images_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(conversion, "load_labeled_set")
    convert = partial(convert_cifar10, tmp_path)
    assert "has 4480 images, not 50000: " in refused_by(convert, QUICKSTART / "cifar10")
    (tmp_path / "foreign" / "test").mkdir(parents=True)
    (tmp_path / "foreign" / "test" / "notes.txt").touch()
    assert "test: exists, and has no index.json: " in refused_by(convert, tmp_path / "foreign")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused_by(convert, tmp_path / "file" / "out")


def test_the_next_command_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "convert_cifar10", lambda *arguments: None)
    for out, changes in (
        ("datasets/cifar10/", ""),
        ("/data/cifar", " train_loader.local=/data/cifar/train retrieval.datasets.cifar10.root=/data/cifar"),
    ):
        recipe.main([out])
        assert capsys.readouterr().out.splitlines()[-1] == (
            f"next: composer recipes/train.py yamls/cifar10.yaml{changes}"
        )

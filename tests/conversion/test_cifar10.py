"""CIFAR-10 as MDS."""

from pathlib import Path

import pytest
import torch

from d2v_composer.conversion import cifar10
from d2v_composer.conversion.cifar10 import convert_cifar10
from d2v_composer.data.labelled_sets import LabelledImages, LabelledSet, load_labelled_set


def test_pixels_and_labels_are_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = {split: torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8) for split in ("train", "test")}
    labels = torch.tensor([3, 1, 4, 1, 5])
    whole = LabelledSet(*(LabelledImages(images[split], labels) for split in ("train", "test")))
    monkeypatch.setattr(cifar10, "load_labelled_set", lambda *arguments, **options: whole)
    (tmp_path / "out" / ".train.partial").mkdir(parents=True)  # of a killed conversion
    convert_cifar10(tmp_path, tmp_path / "out", 4, 3)
    found = load_labelled_set("mds", tmp_path / "out", image_size=32)
    for split, num_images in (("train", 4), ("test", 3)):
        assert torch.equal(getattr(found, split).images, images[split][:num_images])
        assert torch.equal(getattr(found, split).labels, labels[:num_images])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]
    monkeypatch.delattr(cifar10, "load_labelled_set")  # what exists is not made again
    convert_cifar10(tmp_path, tmp_path / "out", 4, 3)

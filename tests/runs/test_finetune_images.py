"""A fine-tuning's images have the classes of train, and a classifier has an output for each."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_composer import load_teacher
from d2v_composer.config.schema import FinetuneConfig, LabeledSetConfig, ShardLoaderConfig
from d2v_composer.models.configs import EncoderConfig
from d2v_composer.runs.finetune import build_data, count_classes
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_image, write_mds


def write_streamed(tmp_path: Path, *classes: list[str] | None) -> FinetuneConfig:
    """Write a data set whose train images are elsewhere, with the class names of train and of test."""
    root, train = tmp_path / "set", tmp_path / "store" / "train"
    for folder, labels, names in zip((train, root / "test"), ([0, 1, 2, 2], [1, 2]), classes, strict=True):
        write_mds(folder, [encoded_image(seed) for seed in range(len(labels))], labels)
        if names is not None:
            (folder / "conversion.json").write_text(json.dumps({"classes": names}))
    options: dict[str, Any] = {"remote": str(train), "crop_scale": (1, 1), "crop_ratio": (1, 1), "flip": 0}
    loader = ShardLoaderConfig(num_workers=0, **options)
    dataset = LabeledSetConfig(format="mds", root=str(root))
    return FinetuneConfig(model="x", dataset=dataset, train_loader=loader, global_train_batch_size=4)


@pytest.fixture(scope="module")
def sizes() -> EncoderConfig:
    return load_teacher(GOLDEN / "tiny_base.pt").encoder.config


def test_streamed_and_test_images_have_their_labels_and_the_classes_of_train(
    tmp_path: Path, sizes: EncoderConfig
) -> None:
    images = build_data(write_streamed(tmp_path, ["ant", "bee", "cat"], ["ant", "bee", "cat"]), sizes)
    assert images.test.labels.tolist() == [1, 2]
    assert (images.class_names, images.num_classes) == (("ant", "bee", "cat"), 3)
    (batch,) = images.train_loader
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(*batch, strict=True)}
    for seed, label in enumerate([0, 1, 2, 2]):
        pixels = np.array(Image.open(io.BytesIO(encoded_image(seed))))
        assert label_of[pixels.transpose(2, 0, 1).tobytes()] == label


def test_classes_of_streamed_and_test_images_are_compared(tmp_path: Path, sizes: EncoderConfig) -> None:
    """Those of a data set from another program have no names."""
    swapped = write_streamed(tmp_path / "swapped", ["ant", "bee", "cat"], ["cat", "bee", "ant"])
    with pytest.raises(InputError, match="train and test name their classes differently"):
        build_data(swapped, sizes)
    unnamed = write_streamed(tmp_path / "unnamed", None, None)
    for _ in range(2):  # then from the cache
        assert build_data(unnamed, sizes).class_names == ()


def test_classes_are_counted_by_names_and_labels() -> None:
    """A split may lack some."""
    assert count_classes(Path("data"), (), torch.tensor([0, 9])) == 10
    assert count_classes(Path("data"), tuple("abcdefghijkl"), torch.tensor([0, 9])) == 12
    problems = {
        (0, -1): "labels must not be negative, got -1$",
        (4, 4): "expected at least two classes, got 1$",
        (0, 10**11): "without large gaps, got 2 classes with labels up to 100000000000$",
    }
    for labels, problem in problems.items():
        with pytest.raises(InputError, match=rf"^dataset\.root: data: .*{problem}"):
            count_classes(Path("data"), (), torch.tensor(labels))

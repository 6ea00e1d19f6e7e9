"""A fine-tuning's images have the classes of train, and a classifier has an output for each."""

import json
from pathlib import Path

import pytest
import torch

from d2v_composer import load_teacher
from d2v_composer.builders.finetune import build_images, count_classes
from d2v_composer.config.schema import FinetuneConfig, FinetuneLoaderConfig, LabeledSetConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_image, write_mds


def write_split(folder: Path, labels: list[int], names: list[str]) -> None:
    write_mds(folder, [encoded_image(seed) for seed in range(len(labels))], labels)
    (folder / "conversion.json").write_text(json.dumps({"classes": names}))


def test_streamed_images_and_test_images_have_the_classes_of_train(tmp_path: Path) -> None:
    root, train = tmp_path / "set", tmp_path / "store" / "train"
    write_split(train, [0, 1, 2, 2], ["ant", "bee", "cat"])
    write_split(root / "test", [1, 2], ["ant", "bee", "cat"])
    loader = FinetuneLoaderConfig(stream=True, num_workers=0, remote=str(train))
    dataset = LabeledSetConfig(format="mds", root=str(root))
    config = FinetuneConfig(model="x", dataset=dataset, train_loader=loader, global_train_batch_size=4)
    images = build_images(config, load_teacher(GOLDEN / "tiny_base.pt").encoder.config)
    assert images.test.labels.tolist() == [1, 2]
    assert (images.class_names, images.num_classes) == (("ant", "bee", "cat"), 3)
    (batch,) = images.train_loader
    assert sorted(batch[1].tolist()) == [0, 1, 2, 2]


def test_classes_are_counted_by_names_and_labels() -> None:
    """A split may lack some."""
    assert count_classes(Path("data"), (), torch.tensor([0, 9])) == 10
    assert count_classes(Path("data"), tuple("abcdefghijkl"), torch.tensor([0, 9])) == 12
    for labels in ([0, -1], [4, 4], [0, 10**11]):
        with pytest.raises(
            InputError, match=r"^dataset\.root: data: expected at least two classes, numbered from 0, got"
        ):
            count_classes(Path("data"), (), torch.tensor(labels))

"""A fine-tuning's images are resized as its model's were."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from d2v_composer import load_teacher
from d2v_composer.builders.finetune import build_images, count_classes, load_images
from d2v_composer.config.schema import FinetuneConfig, FinetuneLoaderConfig, LabeledSetConfig
from d2v_composer.data.labeled import LabeledImages, load_labeled_set
from d2v_composer.models.data2vec2 import ImageEncoderConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_image, write_mds


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_with_the_models_interpolation(
    interpolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("train/a/0.png", "train/b/1.png", "test/a/2.png", "test/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    model = load_teacher(GOLDEN / "tiny_base.pt")
    monkeypatch.setattr(ImageEncoderConfig, "interpolation", interpolation)
    found = load_images(LabeledSetConfig(format="folder", root=str(tmp_path)), 2, model.encoder.config)
    expected = load_labeled_set("folder", tmp_path, image_size=32, interpolation=interpolation)
    assert torch.equal(found.train.images, expected.train.images)


def write_split(folder: Path, labels: list[int], names: list[str]) -> None:
    write_mds(folder, [encoded_image(seed) for seed in range(len(labels))], labels)
    (folder / "conversion.json").write_text(json.dumps({"classes": names}))


@pytest.mark.parametrize("is_remote", [False, True])
def test_streamed_images_and_test_images_have_the_classes_of_train(tmp_path: Path, is_remote: bool) -> None:
    """A remote data set's names are fetched."""
    root, train = tmp_path / "set", tmp_path / ("store" if is_remote else "set") / "train"
    write_split(train, [0, 1, 2, 2], ["ant", "bee", "cat"])
    write_split(root / "test", [0, 1], ["bee", "cat"])
    loader = FinetuneLoaderConfig(stream=True, num_workers=0, remote=str(train) if is_remote else None)
    dataset = LabeledSetConfig(format="mds", root=str(root))
    config = FinetuneConfig(model="x", dataset=dataset, train_loader=loader, global_train_batch_size=4)
    images = build_images(config, load_teacher(GOLDEN / "tiny_base.pt").encoder.config)
    assert images.test.labels.tolist() == [1, 2]
    assert (images.class_names, images.num_classes) == (("ant", "bee", "cat"), 3)
    (batch,) = images.train_loader
    assert sorted(batch[1].tolist()) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ([0, -1], "its labels must be numbers from 0"),
        ([4, 4], "has one class, expected at least two"),
        ([0, 10**11], "2 classes, but label 100000000000: number them from 0"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[int], fault: str) -> None:
    images = LabeledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor(labels))
    with pytest.raises(InputError, match=rf"^dataset\.root: data: {fault}$"):
        count_classes(Path("data"), (), images)


def test_a_split_may_lack_classes() -> None:
    images = LabeledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 9]))
    assert count_classes(Path("data"), (), images) == 10
    assert count_classes(Path("data"), tuple("abcdefghijkl"), images) == 12

"""A fine-tuning's images are resized as its model's were."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from d2v_composer import load_teacher
from d2v_composer.builders.finetune_images import load_images
from d2v_composer.config.schema import LabelledSetConfig
from d2v_composer.data.labelled_sets import load_labelled_set
from d2v_composer.models.image_encoder import ImageEncoderConfig
from helpers import GOLDEN


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
    found = load_images(LabelledSetConfig("folder", str(tmp_path)), 2, model.encoder.config)
    expected = load_labelled_set("folder", tmp_path, image_size=32, interpolation=interpolation)
    assert torch.equal(found.train.images, expected.train.images)

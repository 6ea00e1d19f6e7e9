"""d2v distill: the settings that it chooses; tests/promises/test_distill.py has the rest."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from d2v_composer.models.configs import ImageEncoderConfig, TeacherConfig
from d2v_composer.runs import auto_config
from helpers import write_images


@pytest.mark.parametrize(
    ("num_gpus", "num_images", "expected"),
    [
        (0, 200, ("600ba", 16, 0.004)),
        (0, 10_000, ("1687ba", 32, 0.004)),
        (30, 200, ("3000ba", 30, 0.002)),
        (1, 10_000, ("3000ba", 256, 0.002)),
        (6, 2_000_000, ("30000ba", 252, 0.002)),
    ],
)
def test_sizes_follow_from_images_teacher_and_device(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_images: int, expected: tuple[str, int, float]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    teacher = TeacherConfig(encoder=ImageEncoderConfig(embed_dim=192), depth=8, average_top_k_layers=8)
    chosen = auto_config.choose_settings(num_images, teacher)
    sizes = tuple(chosen[key] for key in ("max_duration", "global_train_batch_size", "optimizer.lr"))
    assert sizes == expected
    assert "teacher.image_size" not in chosen


def test_the_teacher_of_the_plan_has_the_size_that_it_chose(tmp_path: Path) -> None:
    """It is the run's: a timm model's own images are larger."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    photos = write_images(tmp_path / "photos", [f"{i}.jpg" for i in range(200)])
    changes = (f"teacher.checkpoint={weights}",)
    request = auto_config.Request(str(photos), "timm/test_vit", tmp_path / "run", changes=changes)
    plan = auto_config.make_plan(request, tmp_path / "fetched")
    assert plan.config.teacher.image_size == plan.teacher.config.image_size == 112

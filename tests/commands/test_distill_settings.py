"""d2v distill: the settings that it chooses; tests/promises/test_distill.py has the rest."""

import pytest
import torch

from d2v_composer.commands import distill
from d2v_composer.models.sizes import ImageEncoderConfig, TeacherConfig


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
    chosen = distill.choose(num_images, teacher)
    found = tuple(chosen[key] for key in ("max_duration", "global_train_batch_size", "optimizer.lr"))
    assert found == expected
    assert "teacher.image_size" not in chosen

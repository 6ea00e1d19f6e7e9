"""A teacher with random weights loads like the real one, and has something to teach."""

from pathlib import Path

import pytest
import torch

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.commands import random_teacher
from d2v_composer.models.configs import RELEASED, ImageEncoderConfig, TeacherConfig
from d2v_composer.system.errors import InputError
from helpers import slow

SMALL = TeacherConfig(
    encoder=ImageEncoderConfig(embed_dim=192, num_heads=6, num_extra_tokens=1, image_size=32, patch_size=4),
    depth=6,
    average_top_k_layers=6,
)


@pytest.mark.parametrize(
    "size",
    [
        "small",
        slow("small_audio"),
        "timm/vit_tiny_patch16_224",
        slow("timm/vit_small_patch14_dinov2"),
    ],
)
def test_it_loads_and_its_targets_differ_between_images(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RELEASED, "small", SMALL)
    base = RELEASED["base_audio"]
    small = base.changed(encoder=base.encoder.changed(embed_dim=192), depth=2, average_top_k_layers=2)
    monkeypatch.setitem(RELEASED, "small_audio", small)
    out, kind = tmp_path / "teacher.safetensors", size if size.startswith("timm/") else "data2vec2"
    random_teacher.main([size, str(out)])
    recipe = "distill_audio" if size.endswith("_audio") else "distill"
    assert f" train {recipe}.yaml teacher.model={kind} teacher.checkpoint={out}\n" in capsys.readouterr().out
    teacher = load_teacher(out, model=kind, image_size=112 if kind == size else None)
    torch.manual_seed(0)
    with torch.no_grad():
        encoded = teacher.encode(teacher.encoder.noise(2))
        _, layers = teacher.forward_blocks(encoded)
        targets = teacher.targets(encoded)
    assert all(layer.std() > 0.05 for layer in layers)  # else InstanceNorm's eps would hide it
    assert 0.1 < targets.var(dim=0).mean() < 2


def test_another_size_is_named(tmp_path: Path) -> None:
    sizes = "base, large, huge, base_audio, large_audio, base_eat"
    with pytest.raises(InputError, match=f"^SIZE: must be {sizes} or timm/NAME, got 'big'$"):
        random_teacher.main(["big", str(tmp_path / "teacher.safetensors")])

"""A teacher with random weights loads like the real one, and has something to teach."""

from pathlib import Path

import pytest
import torch

from d2v_composer.benchmarks.step import SMALL
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.commands import random_teacher
from d2v_composer.models.sizes import RELEASED, height_and_width
from d2v_composer.system.errors import InputError


@pytest.mark.parametrize(
    "size",
    [
        "small",
        "timm/vit_tiny_patch16_224",
        pytest.param("base", marks=pytest.mark.slow),
        pytest.param("timm/vit_small_patch14_dinov2", marks=pytest.mark.slow),
    ],
)
def test_it_loads_and_its_targets_differ_between_images(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RELEASED, "small", SMALL)
    out, kind = tmp_path / "teacher.safetensors", size if size.startswith("timm/") else "data2vec2"
    random_teacher.main([size, str(out)])
    assert f"yamls/distill.yaml teacher.model={kind} teacher.checkpoint={out}\n" in capsys.readouterr().out
    teacher = load_teacher(out, model=kind, image_size=112 if kind == size else None)
    assert size != "base" or sum(map(torch.numel, teacher.parameters())) == 85_797_888
    shape = 2, 3, *height_and_width(teacher.config.image_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        encoded = teacher.encode(images)
        layers = list(teacher.target_layers(encoded, "ffn"))
        targets = teacher.targets(encoded)
    assert all(layer.std() > 0.05 for layer in layers)  # else InstanceNorm's eps would hide it
    assert 0.1 < targets.var(dim=0).mean() < 2


def test_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^SIZE is not base, large, huge: no model 'big'; expected timm/NAME"):
        random_teacher.main(["big", str(tmp_path / "teacher.safetensors")])

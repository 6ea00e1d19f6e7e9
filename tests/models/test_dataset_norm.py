"""Targets normalized by fixed numbers: what counts in them, and what does not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_composer import load_teacher
from d2v_composer.objectives.distillation import DistillationModel
from helpers import GOLDEN
from steps import random_images

IMAGES, OTHERS = random_images(), random_images(seed=2)


def build(name: str, **options: Any) -> DistillationModel:
    torch.manual_seed(0)
    teacher: Any = load_teacher(GOLDEN / f"{name}.pt")
    student = teacher.build_student(normalization="dataset", model=options.pop("model", None))
    return DistillationModel(teacher, student, dataset_norm=True, **options)


def measured(model: DistillationModel, *batches: Any) -> Tensor:
    """Return count, means and mean squares, (L, 3, D)."""
    model.measure_targets(batches)
    return model.state_dict()["objectives.tokens.dataset_norm.moments"]


def test_padding_does_not_count() -> None:
    """A clip counts as any other, however short."""
    clips, lengths = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([3000, 8000])
    together = measured(build("audio_base"), {"audio": clips, "lengths": lengths})
    alone = measured(build("audio_base"), clips[:1, :3000], clips[1:])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("extra_tokens", "first"), [("regress", 0), ("drop", 1), ("only", 0)])
def test_dropped_tokens_do_not_count(extra_tokens: Any, first: int) -> None:
    model = build("tiny_base", extra_tokens=extra_tokens)
    teacher: Any = model.teacher
    _, layers = teacher.forward_blocks(teacher.encode(IMAGES))
    expected = torch.stack(layers)[:, :, first:].double()
    count, mean, square = measured(model, IMAGES[:1], IMAGES[1:]).unbind(dim=1)
    assert (count == 4).all()
    torch.testing.assert_close(mean / 4, expected.mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(square / 4, expected.square().mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)


def test_only_the_target_changes() -> None:
    """Forward passes measure nothing; without numbers there is no loss; block outputs and top K have numbers, too."""
    model = build("tiny_base", source="block", average_top_k_layers=2)
    assert model.loss(model(IMAGES), IMAGES).isnan()
    before = measured(model, IMAGES)
    assert before.shape[0] == 2
    regression = model.train()(OTHERS)
    assert torch.equal(model.state_dict()["objectives.tokens.dataset_norm.moments"], before)
    assert model.loss(regression, OTHERS).isfinite()
    plain = DistillationModel(model.teacher, model.student, source="block", average_top_k_layers=2)
    assert plain.layer_mean.normalization == "layer"
    assert torch.equal(plain(OTHERS).prediction, regression.prediction)
    assert not torch.equal(plain(OTHERS).target, regression.target)


def test_a_network_regresses_such_targets() -> None:
    model = build("tiny_base", model="timm/test_byobnet")
    measured(model, IMAGES)
    blocks = build("tiny_base")
    measured(blocks, IMAGES)
    torch.testing.assert_close(model(IMAGES).target, blocks(IMAGES).target)

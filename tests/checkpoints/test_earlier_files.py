"""Files of earlier versions load, compute the same, and are written anew with the kinds of their sizes.

tests/golden/earlier has small random models as 2c37e3d wrote them (and 0af0ac2, the first with EAT), each with inputs
and what that version computed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import small_vits  # noqa: F401  (registers the timm model)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import GOLDEN

EARLIER = GOLDEN / "earlier"
EXPECTED: dict[str, Any] = dict(np.load(EARLIER / "expected.npz"))


def expect(found: torch.Tensor, name: str, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(found.numpy(), EXPECTED[name], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["image", "audio", "eat"])
def test_teachers(kind: str) -> None:
    teacher, inputs = (
        load_teacher(EARLIER / f"{kind}_teacher.safetensors"),
        torch.from_numpy(EXPECTED[f"{kind}_inputs"]),
    )
    expect(teacher.embed(inputs, "mean"), f"{kind}_teacher")
    # Some channels vary by 2e-7 over an image: InstanceNorm multiplies rounding, which depends on the threads, by 300.
    expect(teacher.targets(teacher.encode(inputs)), f"{kind}_targets", atol=1e-3)


@pytest.mark.parametrize("kind", ["image", "audio", "eat", "timm"])
def test_students(kind: str, tmp_path: Path) -> None:
    """The first is narrower than its encoder."""
    student, inputs = (
        load_student(EARLIER / f"{kind}_student.safetensors"),
        torch.from_numpy(EXPECTED[f"{kind}_inputs"]),
    )
    expect(student.embed(inputs, "mean"), f"{kind}_student")
    save_student(student, tmp_path / "student.safetensors")
    with safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])
    assert [sizes["encoder"]["kind"], sizes["student"]["kind"]] == [kind, "blocks"]
    expect(load_student(tmp_path / "student.safetensors").embed(inputs, "mean"), f"{kind}_student")

"""A small student with random weights; its program, which test processes share; a student of timm alone."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import export
from d2v_composer.models.configs import ImageEncoderConfig
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.student import Student, StudentConfig
from helpers import run_command
from made_once import made_once


def random_student(path: Path, seed: int = 0) -> Path:
    """Write a student of 32-pixel images that tells them apart: noise is added to its first weights."""
    torch.manual_seed(seed)
    config = ImageEncoderConfig(embed_dim=32, num_heads=2, prenet_depth=1, image_size=32)
    student = Student(ImageEncoder(config).freeze(), StudentConfig(depth=1))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_student(student, path)
    return path


def student_with_program(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with student.safetensors, and the same as student.onnx; read-only."""
    return made_once(factory, "student_with_program", export_random_student)


def export_random_student(folder: Path) -> None:
    student = random_student(folder / "student.safetensors")
    with pytest.MonkeyPatch.context() as patch:  # beyond this size torch would write the weights beside the program
        patch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
        export.main([str(student), str(folder / "student.onnx")])


# Runs the lines of a student's card where nothing of ours can be imported, and saves their result.
TIMM_ALONE = """
import sys, numpy, torch
for name in list(sys.modules):
    if name.partition(".")[0] in ("d2v_composer", "composer", "streaming"):
        sys.modules[name] = None
images = torch.from_numpy(numpy.load("pixels.npy"))
with torch.no_grad():
    exec(sys.argv[1])
numpy.save("computed.npy", embeddings)
"""


def computed_by_timm_alone(folder: Path, pixels: Tensor) -> Tensor:
    """Return the embeddings that the card of an exported student computes of normalized images."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    [code] = [block for block in blocks if block.startswith("import timm\n")]
    np.save(folder / "pixels.npy", pixels.numpy())
    ended = run_command(sys.executable, "-c", TIMM_ALONE, code, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return torch.from_numpy(np.load(folder / "computed.npy"))

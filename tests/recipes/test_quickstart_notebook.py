"""The notebook runs from its first cell to its last, with the quickstart's student and without it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from helpers import QUICKSTART, ROOT

NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"


def check_outputs(notebook: Any, *, has_student: bool) -> None:
    """Check what the cells show: a table of accuracies, then two pictures."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert ("No student yet" in text) is not has_student
    rows = re.findall(r"^(\w+)" + 3 * r" +[\d.]+" + "$", text, flags=re.MULTILINE)
    assert rows == ["untrained", *["student"] * has_student, "teacher"]
    kinds = [output["output_type"] for output in outputs]
    assert kinds == ["stream"] * kinds.count("stream") + ["display_data"] * 2
    assert all("image/png" in output["data"] for output in outputs[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("has_student", [True, False])
def test_every_cell_runs(has_student: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in ("recipes", "runs/quickstart"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "yamls").symlink_to(ROOT / "yamls")
    if has_student:
        torch.manual_seed(1)
        student = load_teacher(QUICKSTART / "teacher.safetensors").build_student()
        save_student(student, tmp_path / "runs" / "quickstart" / "student.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "recipes")}}).execute()
    check_outputs(notebook, has_student=has_student)


def test_its_outputs_are_committed_and_small() -> None:
    check_outputs(json.loads(NOTEBOOK.read_text()), has_student=True)
    assert NOTEBOOK.stat().st_size < 400_000

"""The quickstarts' shipped files reach what their pages say; the audio quickstart and the notebook run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import load_teacher, retrieval_accuracy
from d2v_composer.checkpoints.load import save_student
from d2v_composer.data.audio import Audio
from d2v_composer.data.modality import collate
from d2v_composer.sources.labeled import LabeledSamples, load_labeled_set
from helpers import QUICKSTART, ROOT, log_of, succeed

SOUND = ROOT / "yamls" / "quickstart_audio"
NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"


def test_the_teacher_knows_words_across_speakers() -> None:
    """The table in yamls/quickstart_audio/README.md, to one query."""
    words, teacher = load_labeled_set("mds", SOUND / "words", Audio()), load_teacher(SOUND / "teacher.safetensors")
    assert words.num_samples == (74, 82)

    def embed(split: LabeledSamples) -> torch.Tensor:
        inputs, lengths = collate(split.samples)
        return teacher.embed(inputs, "mean", lengths=lengths)

    train, test = ((embed(split), split.labels) for split in (words.train, words.test))
    (row,) = re.findall(r"\| teacher, `output` \| (.*) \| (.*) \|", (SOUND / "README.md").read_text())
    for said, (bank, queries) in zip(row, ((train, test), (test, train)), strict=True):
        accuracy = retrieval_accuracy(*bank, *queries, ks=(1,))[1]
        assert abs(accuracy - float(said) / 100) <= 1.01 / len(queries[0])


@pytest.mark.slow
def test_the_quickstart_with_sound_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("train", ROOT / "yamls" / "quickstart_audio.yaml", f"save_folder={out}", "max_duration=3ba", cwd=tmp_path)
    assert (out / "report.html").read_text().count("<audio") >= 12
    assert {"metrics/words/bank_train/top1", "metrics/words/log_mel/bank_test/top3"} <= log_of(out).keys()


def check_outputs(notebook: Any, *, has_student: bool) -> None:
    """Check what the cells show: a table of accuracies, then three pictures."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert ("No student yet" in text) is not has_student
    rows = re.findall(r"^(\w+)" + 3 * r" +[\d.]+" + "$", text, flags=re.MULTILINE)
    assert rows == ["untrained", *["student"] * has_student, "teacher"]
    kinds = [output["output_type"] for output in outputs]
    assert kinds == ["stream"] * kinds.count("stream") + ["display_data"] * 3
    assert all("image/png" in output["data"] for output in outputs[-3:])


@pytest.mark.slow
@pytest.mark.parametrize("has_student", [True, False])
def test_every_cell_of_the_notebook_runs(has_student: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_notebooks_outputs_are_committed_and_small() -> None:
    check_outputs(json.loads(NOTEBOOK.read_text()), has_student=True)
    assert NOTEBOOK.stat().st_size < 400_000

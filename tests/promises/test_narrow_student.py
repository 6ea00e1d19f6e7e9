"""Promises 3, 8, 10, 17 and 21 of a student narrower than its encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_composer import load_student
from helpers import (
    ROOT,
    assert_same_losses,
    datasets_of,
    load_checkpoint,
    losses_of,
    run_ranks,
    run_training,
    small_run,
    student_of,
    succeed,
    train_command,
)

NARROW = ("student.embed_dim=20", "max_duration=6ba")  # of the teacher's 48


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Return the folder of a run in one process."""
    folder = tmp_path_factory.mktemp("narrow") / "run"
    run_training(*small_run(folder, small_data, *NARROW))
    return folder


def test_a_checkpoint_holds_all_that_trains_and_two_ranks_train_as_one(
    narrow: Path, small_data: Path, tmp_path: Path
) -> None:
    """3, 8, 10: the input projection, blocks and the objective's head."""
    shapes = {name: tensor.shape for name, tensor in student_of(narrow).items() if ".blocks." not in name}
    assert shapes == {
        "student.input_proj.weight": (20, 48),
        "student.input_proj.bias": (20,),
        "objectives.tokens.head.weight": (48, 20),
        "objectives.tokens.head.bias": (48,),
    }
    run_ranks(*train_command(small_run(tmp_path / "ranks", small_data, *NARROW))[1:])
    assert_same_losses(losses_of(tmp_path / "ranks"), losses_of(narrow), num_steps=6)


def test_evaluate_embed_and_export_read_the_narrow_embedding(narrow: Path, labeled: Path, tmp_path: Path) -> None:
    """17, 21: from the checkpoint and from its exported file."""
    checkpoint, exported = narrow / "latest-rank0.pt", tmp_path / "student.safetensors"
    succeed("export", checkpoint, exported)
    for model in (checkpoint, exported):
        succeed("embed", model, labeled / "test", tmp_path / f"{model.name}.npy")
    ours, expected = (np.load(tmp_path / f"{model.name}.npy") for model in (exported, checkpoint))
    assert ours.shape == (48, 20)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    datasets = datasets_of(labeled, "cifar10")
    succeed("evaluate", ROOT / "yamls" / "evaluate.yaml", f"model={checkpoint}", datasets)
    student, trained = load_student(exported), load_checkpoint(checkpoint)["state"]["model"]
    assert torch.equal(student.state_dict()["input_proj.weight"], trained["student.input_proj.weight"])
    assert not any("head" in name for name in student.state_dict())

"""Reading the newest checkpoint while a run replaces it."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.checkpoints import load
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.config.reference import load_any
from d2v_composer.system.errors import InputError
from helpers import student_of


def test_a_pointer_that_is_being_replaced_is_waited_for(uninterrupted: Path, tmp_path: Path) -> None:
    pointer = tmp_path / LATEST
    maker = threading.Timer(0.2, lambda: pointer.symlink_to(uninterrupted / "ep2-ba14-rank0.pt"))
    maker.start()
    student, teacher = load_any(pointer)
    maker.join()
    assert student is not None
    assert teacher is not None
    with pytest.raises(InputError, match=r"none\.pt: no such file"):
        load_any(tmp_path / "none.pt")


def test_reads_the_next_checkpoint_if_one_is_removed_while_being_read(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does that keeps only the newest."""
    pointer, old, new = tmp_path / LATEST, tmp_path / "ep1-ba12-rank0.pt", tmp_path / "ep2-ba14-rank0.pt"
    shutil.copyfile(uninterrupted / old.name, old)
    pointer.symlink_to(old.name)
    function = load.load_untrusted

    def late(path: Path) -> Any:
        if path == old and old.exists():
            shutil.copyfile(uninterrupted / new.name, new)
            pointer.unlink()
            pointer.symlink_to(new.name)
            old.unlink()
        return function(path)

    monkeypatch.setattr(load, "load_untrusted", late)
    student: Any = load_any(pointer)[0]
    expected = student_of(uninterrupted)
    assert all(
        torch.equal(tensor, expected[f"student.blocks.{name}"]) for name, tensor in student.blocks.state_dict().items()
    )

    new.write_bytes(new.read_bytes()[:999])
    with pytest.raises(InputError, match=rf"{new}: truncated"):
        load_any(pointer)

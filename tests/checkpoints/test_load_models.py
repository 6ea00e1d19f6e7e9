"""A file of another kind is refused by its name, with what reads it; a moved teacher with how to name it."""

import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints import load as loading
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, evaluate
from d2v_composer.commands import export as export_student
from d2v_composer.config.load import load_evaluate_config
from d2v_composer.config.reference import load_any
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.targets import norm_mean
from d2v_composer.runs.comparison import build_comparison
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT, load_checkpoint, student_of

TEACHER = GOLDEN / "tiny_base.pt"


def refusal(load: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_teacher_names_a_training_checkpoint(uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "latest-rank0.pt"
    assert "is a training checkpoint, not a teacher; " in refusal(load_teacher, checkpoint)


@pytest.mark.parametrize("load", [load_student, load_teacher, load_any])
def test_a_runs_folder_is_no_model(load: Callable[..., Any], uninterrupted: Path) -> None:
    expected = f"{uninterrupted} is the folder of a run, not a model's file; its newest checkpoint is "
    assert refusal(load, uninterrupted) == f"{expected}{uninterrupted / 'latest-rank0.pt'}"


def test_a_moved_teacher_is_asked_for_by_the_commands_own_option(uninterrupted: Path, tmp_path: Path) -> None:
    contents = load_checkpoint(uninterrupted / "latest-rank0.pt")
    contents["state"]["callbacks"]["RunRecord"]["record"]["config"]["teacher"]["checkpoint"] = str(tmp_path / "gone.pt")
    checkpoint = tmp_path / "moved.pt"
    torch.save(contents, checkpoint)
    expected = rf"^{tmp_path}/gone\.pt: no such file; if the teacher of \S*moved\.pt has moved, give its new path: "
    out = str(tmp_path / "out.safetensors")
    for load in (lambda: load_any(checkpoint), lambda: export_student.main([str(checkpoint), out])):
        assert re.search(f"{expected}--teacher PATH", refusal(load))
    arguments = [str(checkpoint), str(tmp_path), str(tmp_path / "out.npy")]
    assert re.search(f"{expected}--teacher PATH", refusal(embed.main, arguments))
    arguments = [str(ROOT / "yamls" / "evaluate.yaml"), f"model={checkpoint}"]
    assert re.search(f"{expected}.*teacher=PATH", refusal(evaluate.main, arguments))
    teacher = shutil.copy(TEACHER, tmp_path / "here.pt")
    assert load_any(checkpoint, teacher=str(teacher))[0] is not None


def test_a_student_has_no_weights_to_choose(uninterrupted: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    save_student(load_teacher(TEACHER).build_student(depth=1), student)
    for path in (student, uninterrupted / "latest-rank0.pt"):
        said = f"weights: {path} is a student, which has no ema weights; set weights=model"
        assert refusal(embed.main, [str(path), str(tmp_path), str(tmp_path / "out.npy"), "--weights", "ema"]) == said
    said = f"weights: {student} is a student, which has no ema weights; set weights=model"
    # Its record says which weights its teacher has.
    assert refusal(partial(load_any, weights="ema", teacher=str(TEACHER)), student) == said


def test_a_teacher_is_compared_in_the_normalization_of_the_students_run(uninterrupted: Path, tmp_path: Path) -> None:
    contents = load_checkpoint(uninterrupted / "latest-rank0.pt")
    sizes = contents["state"]["callbacks"]["RunRecord"]["record"]["student"]["sizes"]["student"]
    assert sizes["normalization"] != "layer"
    sizes["normalization"] = "layer"
    torch.save(contents, tmp_path / "checkpoint.pt")
    config = load_evaluate_config([str(ROOT / "yamls" / "evaluate.yaml"), f"model={tmp_path / 'checkpoint.pt'}"])
    model, evaluation = build_comparison(config, "cpu")
    [embeds] = evaluation.groups.values()
    assert model.layer_mean.normalization == "layer"
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    teacher: Any = load_teacher(TEACHER)
    _, layers = teacher.forward_blocks(teacher.encode(images))
    expected, plain = (norm_mean(layers, normalization=kind).mean(dim=1) for kind in ("layer", "instance"))
    embeddings: Any = embeds["teacher"](images)
    torch.testing.assert_close(embeddings["layer_mean_mean"], expected)
    assert not torch.allclose(expected, plain, atol=0.01)


def test_a_student_keeps_the_number_of_shared_blocks(tmp_path: Path) -> None:
    exported = tmp_path / "student.safetensors"
    save_student(load_teacher(TEACHER, first_blocks=1).build_student(depth=1), exported)
    student, teacher = load_any(exported, teacher=str(TEACHER))
    assert student is not None
    assert isinstance(teacher, Data2Vec2)
    assert (teacher.config.prenet_depth, teacher.config.depth) == (1, 4)
    assert student.encoder.config == teacher.encoder.config
    for ours, theirs in zip(student.encoder.parameters(), teacher.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Beside a run that saves.


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
    function = loading.load_untrusted

    def late(path: Path) -> Any:
        if path == old and old.exists():
            shutil.copyfile(uninterrupted / new.name, new)
            pointer.unlink()
            pointer.symlink_to(new.name)
            old.unlink()
        return function(path)

    monkeypatch.setattr(loading, "load_untrusted", late)
    student: Any = load_any(pointer)[0]
    expected = student_of(uninterrupted)
    assert all(
        torch.equal(tensor, expected[f"student.blocks.{name}"]) for name, tensor in student.blocks.state_dict().items()
    )

    new.write_bytes(new.read_bytes()[:999])
    with pytest.raises(InputError, match=rf"{new}: truncated"):
        load_any(pointer)

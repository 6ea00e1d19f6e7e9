"""Checkpoints of a run: the models that are loaded from them, and the one from which a run resumes."""

import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.checkpoint import LATEST, CorruptCheckpointError, read_checkpoint
from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.resuming import drop_unused_scaler, find_newest
from d2v_composer.commands import embed, evaluate
from d2v_composer.commands import export as export_student
from d2v_composer.config.load import load_evaluate_config
from d2v_composer.config.reference import load_any
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.targets import norm_mean
from d2v_composer.runs.comparison import build_comparison
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, ROOT, load_checkpoint, refused_by, small_run
from recipes import train
from steps import random_images

TEACHER, EVALUATE = GOLDEN / "tiny_base.pt", str(ROOT / "yamls" / "evaluate.yaml")


def newest_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of a run's newest checkpoint, to be changed, and the record in them."""
    contents = load_checkpoint(run / "latest-rank0.pt")
    return contents, contents["state"]["callbacks"]["RunRecord"]["record"]


def test_load_teacher_names_a_training_checkpoint(uninterrupted: Path) -> None:
    said = refused_by(load_teacher, uninterrupted / "latest-rank0.pt")
    assert "is a training checkpoint, not a teacher; " in said


@pytest.mark.parametrize("load", [load_student, load_teacher, load_any])
def test_a_runs_folder_is_no_model(load: Callable[..., Any], uninterrupted: Path) -> None:
    expected = f"{uninterrupted} is the folder of a run, not a model's file; its newest checkpoint is "
    assert refused_by(load, uninterrupted) == f"{expected}{uninterrupted / 'latest-rank0.pt'}"


def embed_model(path: Path, *options: str) -> None:
    """Call ``d2v embed``, which must fail before it reads its source."""
    embed.main([str(path), "nothing", "nothing.npy", *options])


def embed_ema(path: Path) -> None:
    embed_model(path, "--weights", "ema")


COMMANDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "load": (load_any, "--teacher PATH"),
    "export": (lambda path: export_student.main([str(path), f"{path}.safetensors"]), "--teacher PATH"),
    "embed": (embed_model, "--teacher PATH"),
    "evaluate": (lambda path: evaluate.main([EVALUATE, f"model={path}"]), ".*teacher=PATH"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_moved_teacher_is_asked_for_by_the_commands_own_option(
    command: str, uninterrupted: Path, tmp_path: Path
) -> None:
    contents, record = newest_of(uninterrupted)
    record["config"]["teacher"]["checkpoint"] = str(tmp_path / "gone.pt")
    torch.save(contents, checkpoint := tmp_path / "moved.pt")
    expected = rf"^{tmp_path}/gone\.pt: no such file; if the teacher of {checkpoint} has moved, give the new path: "
    load, option = COMMANDS[command]
    assert re.search(f"{expected}{option}", refused_by(load, checkpoint))
    assert load_any(checkpoint, teacher=str(TEACHER))[0] is not None


def test_a_student_has_no_weights_to_choose(uninterrupted: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    save_student(load_teacher(TEACHER).build_student(depth=1), student)
    of_teacher = partial(load_any, weights="ema", teacher=str(TEACHER))  # the record has its teacher's weights
    for path, load in ((student, of_teacher), (student, embed_ema), (uninterrupted / "latest-rank0.pt", embed_ema)):
        said = f"weights: {path} is a student, which has no ema weights; set weights to 'model'"
        assert refused_by(load, path) == said


def test_a_student_without_a_record_is_of_no_teacher(tmp_path: Path) -> None:
    """tests/promises/test_numbers.py shows that another teacher is refused."""
    student = load_teacher(TEACHER).build_student(depth=1)
    student.provenance = {}
    save_student(student, tmp_path / "student.safetensors")
    with pytest.raises(InputError, match=r"not this student's teacher: expected sha256 None, got \w{64}$"):
        load_any(tmp_path / "student.safetensors", teacher=str(TEACHER))


def test_a_teacher_is_compared_in_the_normalization_of_the_students_run(uninterrupted: Path, tmp_path: Path) -> None:
    contents, record = newest_of(uninterrupted)
    record["student"]["sizes"]["student"]["normalization"] = "layer"
    torch.save(contents, checkpoint := tmp_path / "checkpoint.pt")
    config = load_evaluate_config([EVALUATE, f"model={checkpoint}"])
    model, evaluation = build_comparison(config, "cpu")
    [embeds] = evaluation.groups.values()
    assert model.layer_mean.normalization == "layer"
    teacher: Any = load_teacher(TEACHER)
    _, layers = teacher.forward_blocks(teacher.encode(random_images()))
    expected, plain = (norm_mean(layers, normalization=kind).mean(dim=1) for kind in ("layer", "instance"))
    embeddings: Any = embeds["teacher"](random_images())
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


# A run resumes from its newest complete checkpoint, and from no other program's.


@pytest.fixture
def run_folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with the checkpoints of batches 12 and 14."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True))


def newest_in(folder: Path, address: str | None = None) -> Path | None:
    newest = find_newest(RunFolder(folder, address), lambda checkpoint: None)
    return newest and newest.path


ENTRY, END = b"PK\x01\x02", b"PK\x05\x06"
"""The first bytes of an entry of a ZIP archive's directory, and of the directory's end."""


def places_in_directory(archive: bytes, name: bytes) -> list[int]:
    """Return where the bytes of a file's entry are, and those of the directory's end."""
    entry = archive.rindex(ENTRY, 0, archive.rindex(name))
    return [*range(entry, archive.index(ENTRY, entry + 1)), *range(archive.rindex(END), len(archive))]


def test_no_flipped_bit_of_the_directory_changes_a_tensor(tmp_path: Path) -> None:
    """The checkpoint is refused, or its content is unchanged."""
    path, weight = tmp_path / "ep0-ba1-rank0.pt", torch.arange(8.0)
    torch.save({"state": {"algorithms": [], "model": {"weight": weight}}}, path)
    whole, num_refused = path.read_bytes(), 0
    places = places_in_directory(whole, b"/data/0")
    for place, bit in product(places, range(8)):
        contents = bytearray(whole)
        contents[place] ^= 1 << bit
        path.write_bytes(contents)
        try:
            checkpoint = read_checkpoint(path)
        except CorruptCheckpointError:
            num_refused += 1
        else:
            assert torch.equal(checkpoint.tensors["weight"], weight), f"bit {bit} of byte {place}"
    assert num_refused > len(places)  # more than one bit of a byte, on average


def test_the_pointer_says_which_checkpoint_is_the_newest(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a pointer, the checkpoint of the latest batch is."""
    pointer, newest = run_folder / "latest-rank0.pt", run_folder / "ep2-ba14-rank0.pt"
    later = run_folder / "ep10-ba100-rank0.pt"
    shutil.copy(newest, later)
    assert newest_in(run_folder) == newest  # the run was restarted before the later one
    pointer.unlink()
    assert newest_in(run_folder) == later == pointer.resolve()
    pointer.unlink()
    shutil.copy(newest, run_folder / "ep11-ba100-rank0.pt")
    assert newest_in(run_folder) == run_folder / "ep11-ba100-rank0.pt"
    assert caplog.text == ""

    assert newest_in(tmp_path / "new") is None


def test_no_code_of_a_checkpoint_runs(run_folder: Path, small_data: Path, tmp_path: Path) -> None:
    """Composer alone evaluates the representation of a required algorithm when it loads a checkpoint."""
    newest = run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    expression = f"__import__('os').system('touch {tmp_path}/canary')"
    checkpoint["state"]["algorithms"] += [("BlurPool", {"repr": f"BlurPool if {expression} else 0"})]
    torch.save(checkpoint, newest)
    trained = train.main(small_run(tmp_path / "another", small_data, f"load_path={newest}", "max_duration=15ba"))
    assert trained.state.timestamp.batch == 15
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("saved", "precision", "is_loaded"),
    [
        ({"GradScaler": {"scale": 512.0}}, "amp_fp16", True),
        ({"GradScaler": {"scale": 512.0}}, "amp_bf16", False),
        ({"GradScaler": {}}, "amp_fp16", False),  # a CPU's is disabled, and a GPU's refuses an empty state
        ({"ClosureGradScaler": {"scale": 512.0}}, "amp_fp16", False),
    ],
)
def test_precision_and_device_may_change(saved: dict[str, Any], precision: str, is_loaded: bool) -> None:
    checkpoint = {"state": {"scaler": saved, "model": {}}}
    drop_unused_scaler(checkpoint, precision)
    assert ("scaler" in checkpoint["state"]) == is_loaded

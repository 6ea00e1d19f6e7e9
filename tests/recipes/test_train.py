"""The training command as a user runs it: kills, restarts, several ranks, and the files a run leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from d2v_composer import load_student, load_teacher
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_losses,
    command_environment,
    has_trained,
    load_checkpoint,
    losses_of,
    run_command,
    run_ranks,
    small_run,
    start_python,
    student_of,
    train_command,
    train_until_killed,
    wait_until,
)


def assert_same_bits(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


# Batch 6 starts an epoch, 3 and 9 lie within one; the checkpoints before them are those of batches 6, 2 and 8.
@pytest.mark.parametrize("batch", [6, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (3, 9))])
def test_a_killed_run_resumes_bit_for_bit(uninterrupted: Path, small_data: Path, tmp_path: Path, batch: int) -> None:
    arguments = small_run(tmp_path, small_data)
    train_until_killed(arguments, batch)
    assert len(losses_of(tmp_path)) == batch
    again = run_command(*train_command(arguments))
    assert again.returncode == 0, again.stderr
    assert_same_bits(student_of(tmp_path), student_of(uninterrupted))
    assert losses_of(tmp_path) == losses_of(uninterrupted)


def test_a_killed_run_resumes_on_two_ranks(uninterrupted: Path, small_data: Path, tmp_path: Path) -> None:
    arguments = small_run(tmp_path, small_data)
    train_until_killed(arguments, 5)
    run_ranks([*arguments, "train_loader.num_workers=1"])
    assert_same_losses(losses_of(tmp_path), losses_of(uninterrupted), num_steps=14)


@pytest.mark.slow
def test_two_ranks_train_as_one(small_data: Path, tmp_path: Path) -> None:
    """Started by Composer's launcher."""
    for ranks in (1, 2):
        arguments = small_run(tmp_path / str(ranks), small_data, "max_duration=20ba")
        result = run_command(*train_command(arguments, ranks))
        assert result.returncode == 0, result.stderr
    assert_same_losses(losses_of(tmp_path / "2"), losses_of(tmp_path / "1"), num_steps=20)


def batch_of(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint)["state"]["timestamp"]["Timestamp"]["batch"])


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Interrupted")])
def test_a_signal_saves_a_checkpoint_and_exits(
    sent: signal.Signals, name: str, uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """SLURM and systemd send SIGTERM to every process of the run, Ctrl-C sends SIGINT."""
    arguments = small_run(tmp_path, small_data, "save_interval=1000ba", "train_loader.num_workers=2")
    program = start_python(*train_command(arguments)[1:])
    wait_until(lambda: has_trained(tmp_path), seconds=60)
    os.killpg(program.pid, sent)
    assert program.wait(timeout=60) == 128 + sent, program.stderr
    batch = batch_of(tmp_path / "latest-rank0.pt")
    assert f"{name}: saved at batch {batch} in {tmp_path}; the same command resumes" in program.stdout
    assert batch == len(losses_of(tmp_path)) < 14
    assert program.stderr == ""

    again = run_command(*train_command(arguments))
    assert again.returncode == 0, again.stderr
    assert_same_bits(student_of(tmp_path), student_of(uninterrupted))


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, marks=pytest.mark.slow),
    ],
)
def test_ranks_save_and_exit_at_one_batch_when_their_launcher_ends(
    small_data: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """All processes get SIGTERM, and the launcher passes it on once more; or the launcher alone is killed."""
    arguments = small_run(tmp_path, small_data, "save_interval=10000ba", "max_duration=10000ba")
    # Not start_python: the ranks know the launcher by its command line, which a fork has not.
    command = train_command(arguments, ranks=2)
    launcher = subprocess.Popen(command, env=command_environment(), start_new_session=True)
    try:
        wait_until(lambda: has_trained(tmp_path), seconds=120)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        to_all = sent in (signal.SIGTERM, signal.SIGINT)
        (os.killpg if to_all else os.kill)(launcher.pid, sent)
        assert launcher.wait(timeout=60) == (128 + sent if to_all else -sent)
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
    finally:  # a failure must not leave them running beside the other tests
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert batch_of(tmp_path / "latest-rank0.pt") == len(losses_of(tmp_path))


def test_the_quickstart_opens_with_what_it_trains_and_warns_of_nothing(tmp_path: Path) -> None:
    """In a fresh process, with the warnings of all imports and of the interpreter's end."""
    folder = tmp_path / "run"
    options = ("precision=fp32", "max_duration=4ba", "scheduler.t_warmup=2ba", "console_log_interval=2ba")
    options += ("retrieval.max_images=48", "callbacks.health=null", f"save_folder={folder}")
    command = train_command([str(ROOT / "yamls" / "quickstart.yaml"), *options])
    result = run_command("env", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    header = dict(line.split(maxsplit=1) for line in result.stdout.partition("\n\n")[0].splitlines())
    assert header["run"] == f"quickstart, saved in {folder}"
    assert re.fullmatch(r"(cpu, \d+ threads|.+), fp32", header["device"])
    assert header["images"] == f"4,480 in {ROOT}/yamls/quickstart/cifar10/train"
    assert header["model"] == "encoder 0.9 M, teacher 6 blocks 2.7 M, student 5 blocks 1.9 M"
    assert re.fullmatch(r"4 steps \(0\.\d epochs\) of \d+ images", header["training"])
    assert re.fullmatch(r"cifar10 every \d+ba, primary embedding layer_mean_cls", header["retrieval"])
    assert len(header) == 6
    expected = r"retrieval at batch [04]: cifar10 top-1: \w.*%|batch [24]/4 \(\d+ %\)  loss .*  left \d\d:\d\d"
    lines = result.stderr.splitlines()
    assert re.fullmatch(r"retrieval at batch 0: cifar10 top-1: pixels \d+\.\d%", lines[0])  # no model: at once
    assert [line for line in lines if not re.fullmatch(expected, line)] == []


def test_a_finished_run_does_not_change_when_it_starts_again(uninterrupted: Path, small_data: Path) -> None:
    before = (uninterrupted / "latest-rank0.pt").read_bytes()
    result = run_command(*train_command(small_run(uninterrupted, small_data)))
    assert result.returncode == 0, result.stderr
    assert f"{uninterrupted}: finished at 14ba" in result.stdout
    assert (uninterrupted / "latest-rank0.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["optimizer.lr=0.001"], "optimizer.lr: 0.004 in the checkpoint, 0.001 asked", marks=pytest.mark.slow
        ),
        (
            ["seed=18", "student.depth=2", "student.alibi=false"],
            "seed: 17 in the checkpoint, 18 asked; student.depth: 3 in the checkpoint, 2 asked; "
            "student.alibi: True in the checkpoint, False asked",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused(
    uninterrupted: Path, small_data: Path, overrides: list[str], message: str
) -> None:
    result = run_command(*train_command(small_run(uninterrupted, small_data, *overrides)))
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"error: {message}; a new run needs another run_name or save_folder"
    assert "Traceback" not in result.stderr


def test_a_run_leaves_checkpoints_log_and_record(uninterrupted: Path) -> None:
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert names == [".in_use", "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt", "latest-rank0.pt", "log.jsonl", "run.yaml"]
    record = yaml.safe_load((uninterrupted / "run.yaml").read_text())
    assert record["config"]["optimizer"]["lr"] == 0.004
    assert record["versions"]["mosaicml"] == "0.32.1"
    assert record["teacher"]["source"] == "tiny_base.pt"
    checkpoint = load_checkpoint(uninterrupted / "latest-rank0.pt")["state"]
    assert all(name.startswith("student.blocks.") for name in checkpoint["model"])
    assert checkpoint["callbacks"]["RunRecord"]["record"] == record
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert all("step" in line for line in lines)


def test_an_exported_student_has_the_weights_of_its_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.safetensors"
    script = ("-m", "d2v_composer.commands", "export")
    result = run_command(sys.executable, *script, uninterrupted / "latest-rank0.pt", out)
    assert result.returncode == 0, result.stderr
    exported = load_student(out)
    trained = {name.removeprefix("student."): tensor for name, tensor in student_of(uninterrupted).items()}
    assert_same_bits({name: tensor for name, tensor in exported.state_dict().items() if name in trained}, trained)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(exported.encode(images), load_teacher(GOLDEN / "tiny_base.pt").encode(images))
    assert exported.provenance["config"]["run_name"] == "quickstart"

    failed = run_command(sys.executable, *script, GOLDEN / "tiny_base.pt", tmp_path / "none.safetensors")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {GOLDEN / 'tiny_base.pt'}: is a teacher; expected a training checkpoint")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_run_with_a_nan_loss_ends_before_it_saves(small_data: Path, tmp_path: Path) -> None:
    options = ("optimizer.lr=1e20", "algorithms.gradient_clipping=null", "save_interval=1ba", "scheduler.t_warmup=0ba")
    result = run_command(*train_command(small_run(tmp_path, small_data, *options)))
    assert result.returncode == 1
    batch = batch_of(tmp_path / "latest-rank0.pt")
    assert f"FloatingPointError: batch {batch}: the training loss is nan; earlier checkpoints are kept" in result.stderr
    assert all(tensor.isfinite().all() for tensor in student_of(tmp_path).values())


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, small_data: Path) -> None:
    folder = tmp_path / "run"
    result = run_command(*train_command(small_run(folder, small_data, "optimizer.lrr=1")))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: optimizer.lrr: no such key; did you mean lr? "
        "(allowed: lr, betas, eps, weight_decay, decay_norms_and_biases)"
    ]
    assert not folder.exists()

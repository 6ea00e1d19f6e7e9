"""Promises 10 to 15: a run resumes after any kill, stops on signals, and leaves whole checkpoints."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from small_runs import Run

from helpers import (
    ROOT,
    assert_gone,
    assert_same_losses,
    assert_same_student,
    checkpoints_of,
    command_environment,
    contents_of,
    datasets_of,
    failure,
    family_of,
    flip_bit,
    load_checkpoint,
    losses_of,
    run_command,
    run_training,
    slow,
    started_ranks,
    student_of,
    succeed,
    traced,
    train_command,
    truncated,
    wait_until,
    write_files,
)
from programs.preloaded import Program

ENDLESS = ("max_duration=100000ba", "save_interval=3ba")
SHORT = ("max_duration=2ba", "scheduler.t_warmup=1ba")
UNSAVED = "save_interval=1000ba"
ONE_WORKER = "train_loader.num_workers=1"


def batch_of(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint)["state"]["timestamp"]["Timestamp"]["batch"])


# Batch 6 starts an epoch, 3 and 9 are within one; the checkpoints before them are those of batches 6, 2 and 8.
@pytest.mark.parametrize("batch", [6, *(slow(batch) for batch in (3, 9))])
def test_a_killed_run_resumes_bit_for_bit(run: Run, uninterrupted: Path, tmp_path: Path, batch: int) -> None:
    """Promises 3 and 10: it ends with the bits of a run without a kill; resumed on two ranks, it has the same
    losses.
    """
    run.train_until_killed(f"batch_start {batch}")
    assert len(run.losses) == batch
    together = run.copied_to(tmp_path / "together")
    assert "Warning" not in run.train().stderr
    assert_same_student(run.folder, uninterrupted)
    assert run.losses == losses_of(uninterrupted)
    together.train_on_ranks(ONE_WORKER)
    assert_same_losses(together.losses, losses_of(uninterrupted), num_steps=14)


def test_a_run_whose_worker_is_killed_ends_and_resumes(run: Run, uninterrupted: Path) -> None:
    """Promises 10 and 18: the kernel kills a worker when memory is short."""
    program = run.start_until("pauses", ONE_WORKER, AT="batch_end 8 pause")
    _, *workers = family_of(program.pid)
    assert workers
    for worker in workers:
        worker.kill()
    assert program.wait(60) == 1, program.stderr
    assert "killed" in failure(program, 1)
    run.train(ONE_WORKER)
    assert_same_student(run.folder, uninterrupted)


@pytest.mark.parametrize(
    ("sent", "to_all"),
    [
        (signal.SIGTERM, True),
        (signal.SIGINT, False),
        slow(signal.SIGTERM, False),
        slow(signal.SIGINT, True),
    ],
)
def test_a_signal_saves_and_ends(sent: signal.Signals, to_all: bool, run: Run, uninterrupted: Path) -> None:
    """Promises 10 and 11: SLURM, systemd and a terminal signal every process, kill and Docker one; the same
    command resumes.
    """
    program = run.start_training(UNSAVED, "train_loader.num_workers=2")
    family = family_of(program.pid)
    (os.killpg if to_all else os.kill)(program.pid, sent)
    assert program.wait(timeout=60) == 128 + sent, program.stderr
    assert_gone(family)
    batch, name = batch_of(run.newest), "SIGTERM" if sent == signal.SIGTERM else "Interrupted"
    assert f"{name}: saved at batch {batch} in {run.folder}; the same command resumes" in program.stdout
    assert batch == len(run.losses) < 14
    assert program.stderr == ""
    run.train(UNSAVED)
    assert_same_student(run.folder, uninterrupted)


@pytest.mark.parametrize("moment", ["before_forward 0", "batch_start 3"])
def test_a_second_ctrl_c_ends_at_once(moment: str, run: Run) -> None:
    """Promise 11: before the first batch, when there is nothing to save, the first one does."""
    program = run.start_until("hangs", UNSAVED, ONE_WORKER, AT=f"{moment} hang")
    family = family_of(program.pid)
    assert len(family) > 1
    os.killpg(program.pid, signal.SIGINT)
    if moment == "batch_start 3":
        wait_until(lambda: "a second Ctrl-C stops the run immediately" in program.stdout)
        os.killpg(program.pid, signal.SIGINT)
    assert program.wait(timeout=20) == 128 + signal.SIGINT
    assert len(program.stderr.splitlines()) == 1
    assert checkpoints_of(run.folder) == set()
    assert_gone(family)


@pytest.mark.slow
def test_two_ranks_end_at_once(run: Run) -> None:
    """Promise 11: one of them waits for the other in a collective."""
    with started_ranks(*traced(run.arguments), ranks=2, environment={"AT": "batch_start 0 hang"}) as programs:
        wait_until(lambda: "hangs" in programs[0].stdout, seconds=60)
        for program in programs:
            program.send_signal(signal.SIGINT)
        assert [program.wait(timeout=20) for program in programs] == [128 + signal.SIGINT] * 2


@contextmanager
def launched(run: Run, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Start Composer's launcher, and wait until its two ranks have trained; leave none of them behind."""
    # Not start_python: the ranks may know the launcher by its command line, which a fork has not.
    command = train_command([*run.arguments, *overrides], ranks=2)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=command_environment(), start_new_session=True, **output) as launcher:
        try:
            wait_until(run.has_trained, seconds=300)
            ranks = psutil.Process(launcher.pid).children()
            assert len(ranks) == 2
            yield launcher, ranks
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_ranks_save_at_one_batch_when_their_launcher_ends(run: Run, sent: signal.Signals) -> None:
    """Promise 11: all get the signal, and the launcher passes it on once more; or the launcher alone is killed."""
    with launched(run, UNSAVED, "max_duration=10000ba") as (launcher, ranks):
        to_all = sent in (signal.SIGTERM, signal.SIGINT)
        (os.killpg if to_all else os.kill)(launcher.pid, sent)
        assert launcher.wait(timeout=180) == (128 + sent if to_all else -sent)
        assert_gone(ranks, seconds=60)
    assert batch_of(run.newest) == len(run.losses)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_ends_when_one_of_its_ranks_is_killed(victim: int, run: Run) -> None:
    """Promises 10 and 11: the other rank does not wait, and the launcher names the killed one."""
    with launched(run, *ENDLESS) as (launcher, ranks):
        ranks[victim].kill()
        said, _ = launcher.communicate(timeout=60)
        assert launcher.returncode != 0
        assert_gone(ranks)
    assert f"Rank {victim} crashed with exit code -9" in said


@pytest.mark.slow
def test_a_signal_in_a_retrieval(small_data: Path, labeled: Path, tmp_path: Path) -> None:
    """Promises 10 and 11: the resumed run repeats batch 10's retrieval, which was cut short; the last one is
    finished at once.
    """
    options = f"retrieval.{datasets_of(labeled)}", "retrieval.baselines=[]", "retrieval.interval=5ba", UNSAVED
    undisturbed, run = (Run(tmp_path / name, small_data, *options) for name in ("undisturbed", "stopped"))
    undisturbed.train()
    stopped = run.start(AT="batch_start 9 retrieval_int")
    assert stopped.wait(120) == 130, stopped.stderr
    assert f"Interrupted: saved at batch 10 in {run.folder}; the same command resumes" in stopped.stdout
    key = "metrics/small/bank_train/top1"
    assert list(run.log[key]) == [0, 5]
    again = run.start(AT="batch_start 13 retrieval_int")
    assert again.wait(120) == 130, again.stderr
    assert_same_student(run.folder, undisturbed.folder)
    assert run.log[key] == undisturbed.log[key]
    assert list(run.log[key]) == [0, 5, 10, 14]


def test_a_resumes_log_has_no_number_of_weights_that_no_file_holds(run: Run, labeled: Path) -> None:
    """Promises 10 and 23: the retrieval of batch 6 is of weights that the kill took, and the resumed run
    measures others.
    """
    key = "metrics/small/bank_train/top1"
    sets = f"retrieval.{datasets_of(labeled)}", "retrieval.baselines=[]"
    options = (*sets, "save_interval=4ba", "alignment.max_samples=0")
    run.train_until_killed("batch_start 7", *options, "retrieval.interval=3ba")
    with (run.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "loss/tr')
    assert [*run.log[key]] == [0, 3, 6]
    succeed("report", run.folder)
    report = (run.folder / "report.html").read_text()
    assert "Zero-shot retrieval on small, embedding: raw output_cls, batch 3<" in report
    run.train(*options, "retrieval.interval=100ba")
    assert [*run.log[key]] == [0, 3, 14]
    assert steps_in(run) == [0, 1, 2, 3, 4, *range(4, 14)]


def steps_in(run: Run) -> list[int]:
    """Return the step of each loss that was logged, in the order of the file."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/train/total" in line]


@pytest.mark.parametrize(
    ("sent", "name"),
    [(signal.SIGTERM, "SIGTERM"), slow(signal.SIGINT, "Interrupted")],
)
def test_after_training_a_run_ends_at_once_and_the_same_command_makes_its_report(
    sent: signal.Signals, name: str, run: Run
) -> None:
    """Promise 11: the signal comes while a plot hangs."""
    options = "max_duration=1ba", "scheduler.t_warmup=0ba", "report=true"
    program = run.start_until("hangs", *options, HANG="matplotlib.figure Figure savefig")
    program.send_signal(sent)
    assert program.wait(timeout=20) == 128 + sent
    line = program.stderr.splitlines()[-1]
    assert line.startswith(f"{name}: the model is saved, but the report is not; to write the report, run ")
    assert line.endswith(f" report {run.folder}")
    assert len(checkpoints_of(run.folder)) == 1
    run.train(*options)
    assert (run.folder / "report.html").is_file()


@pytest.mark.parametrize("damage", [truncated, flip_bit, slow(lambda content: b"")])
def test_a_damaged_newest_checkpoint_is_skipped(
    damage: Callable[[bytes], bytes], uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Promise 12: a warning names it, and the run ends with the same bits."""
    run = Run(uninterrupted, small_data).copied_to(tmp_path / "run")
    newest = run.folder / "ep2-ba14-rank0.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    ended = run.train()
    assert "ep2-ba14-rank0.pt" in ended.stderr
    assert f"from {run.folder}/ep1-ba12-rank0.pt at batch 12" in ended.stdout
    assert_same_student(run.folder, uninterrupted)


def test_what_a_run_is_cannot_be_changed(uninterrupted: Path, small_data: Path, labeled: Path) -> None:
    """Promise 12: the line names each change."""
    changes = ["seed=18", "student.depth=1", "student.alibi=false", "optimizer.lr=0.001"]
    changes += ["objectives.tokens.extra_tokens=drop", "objectives.tokens.prediction=last_block"]
    changes += ["global_train_batch_size=8", "train_loader.column=image", "teacher.first_blocks=1"]
    changes += ["alignment.pooling=cls", "alignment.representation=output"]
    before, run = contents_of(uninterrupted), Run(uninterrupted, small_data)
    line = run.refused(*changes)
    names = [change.partition("=")[0] for change in changes]
    assert [name for name in names if f"{name}: checkpoint has " not in line] == [], line
    assert "seed: checkpoint has 17, this run has 18" in line, line
    assert "train_loader.column: checkpoint has None, this run has image" in line
    assert "training data" in run.refused(f"train_loader.local={labeled / 'test'}")
    assert contents_of(uninterrupted) == before


def test_other_images_of_the_same_sizes_are_another_data_set(small_data: Path, tmp_path: Path) -> None:
    """Promise 12: also if the index has no hashes, as Streaming's has none by default."""
    data = shutil.copytree(small_data, tmp_path / "data")
    run = Run(tmp_path / "run", data, "max_duration=4ba")
    run.train_until_killed("batch_start 3")
    shard = min(data.glob("shard.*.mds"))
    shard.write_bytes(flip_bit(shard.read_bytes()))
    before = contents_of(run.folder)
    assert "training data (sha256 of the samples): checkpoint has " in run.refused()
    assert contents_of(run.folder) == before
    shutil.copyfile(small_data / shard.name, shard)
    run.train()


@pytest.mark.parametrize("name", ["run.yaml", "notes.txt"])
def test_a_folder_of_other_files_is_refused(name: str, run: Run) -> None:
    """Promises 7 and 11: the folder stays as it was."""
    write_files(run.folder, {name: b"mine"})
    line = run.refused()
    assert f"save_folder: {run.folder} holds foreign files, such as {name}; choose another" in line
    assert contents_of(run.folder) == {name: b"mine"}


def test_a_used_folder_is_refused_unless_it_is_resumed(uninterrupted: Path, small_data: Path) -> None:
    """Promises 7 and 11: another run's checkpoints, log, record and report stay."""
    before = contents_of(uninterrupted)
    line = Run(uninterrupted, small_data).refused("autoresume=false", "save_interval=1ba", "report=true")
    said = f"autoresume: must be true, because {uninterrupted} holds a run's checkpoints; a new run needs another save_"
    assert said in line
    assert contents_of(uninterrupted) == before


def test_a_checkpoint_that_does_not_fit_is_named(uninterrupted: Path, run: Run, tmp_path: Path) -> None:
    """Promises 11 and 12: it is a finished run's, or has other settings or tensors; nothing is left behind
    each time.
    """
    finished, foreign = uninterrupted / "latest-rank0.pt", tmp_path / "foreign.pt"
    checkpoint = load_checkpoint(uninterrupted / "ep1-ba12-rank0.pt")
    del checkpoint["state"]["callbacks"]["RunRecord"]
    torch.save(checkpoint, foreign)
    for load_path, changes, named in (
        (finished, [], "max_duration"),
        (finished, ["max_duration=2ep"], "max_duration"),
        (finished, ["max_duration=20ba", "seed=18"], "seed"),
        (foreign, ["student.depth=1"], str(foreign)),
    ):
        assert named in run.refused(f"load_path={load_path}", *changes)
        assert not run.folder.exists()
    assert "at batch 12" in run.train(f"load_path={foreign}").stdout
    assert_same_student(run.folder, uninterrupted)


def test_a_run_takes_only_the_weights_of_a_checkpoint(uninterrupted: Path, run: Run) -> None:
    """Promises 10 and 12: steps, order and optimizer are the new run's, whose settings may differ; then it
    resumes itself.
    """
    finished = uninterrupted / "latest-rank0.pt"
    options = f"load_path={finished}", "load_weights_only=true", "seed=18", "optimizer.lr=1e-30", "max_duration=4ba"
    said = run.train(*options, "save_interval=1ba", "save_num_checkpoints_to_keep=-1").stdout
    assert f"weights   from {finished}\n" in said
    assert len(losses_of(run.folder)) == 4
    first, last = (load_checkpoint(run.folder / f"ep0-ba{batch}-rank0.pt")["state"] for batch in (1, 4))
    theirs = {name: tensor for name, tensor in student_of(uninterrupted).items() if ".alignment." not in name}
    assert first["model"].keys() == theirs.keys()  # the map of other weights is not taken
    for name, tensor in theirs.items():
        torch.testing.assert_close(last["model"][name], tensor, rtol=0, atol=1e-6)
    steps = [int(moments["step"]) for moments in last["optimizers"]["AdamW"]["state"].values()]
    assert set(steps) == {4}
    assert "at batch 4" in run.train(*options, "max_duration=5ba").stdout
    assert "load_weights_only: must be false without a load_path" in run.refused("load_weights_only=true")


def test_a_record_starts_another_run(small_data: Path, tmp_path: Path) -> None:
    """Promises 10 and 18: the run has a folder of its own name and the precision asked for, and prints next
    commands that exist.
    """
    Run(Path("runs/{run_name}"), small_data, *SHORT, "precision=auto", cwd=tmp_path).train()
    run = tmp_path / "runs" / "quickstart"
    before, record = contents_of(run), yaml.safe_load((run / "run.yaml").read_text())
    assert (record["config"]["save_folder"], record["config"]["precision"]) == ("runs/{run_name}", "auto")
    used = record["hardware"]["precision"]
    assert used in ("fp32", "amp_bf16", "amp_fp16")
    said = run_training(str(run / "run.yaml"), "run_name=again", cwd=tmp_path).stdout
    assert all(words in said for words in ("saved in runs/again", f", {used}\n", "export runs/again/latest-rank0.pt"))
    assert checkpoints_of(tmp_path / "runs" / "again") == {"ep0-ba2-rank0.pt"}
    assert contents_of(run) == before


def test_a_run_killed_before_its_first_checkpoint_leaves_no_log_to_the_next(run: Run) -> None:
    """Promise 7: the next run in this folder may have other settings."""
    run.train_until_killed("batch_start 5", UNSAVED)
    assert len(run.losses) == 5
    run.train(*SHORT, "seed=18")
    assert sorted(run.losses) == [0, 1]


def test_a_run_with_a_nan_loss_ends_before_it_saves(run: Run) -> None:
    """Promises 13 and 18: the newest checkpoint has finite weights."""
    options = "optimizer.lr=1e20", "algorithms.gradient_clipping=null", "save_interval=1ba", "scheduler.t_warmup=0ba"
    line = run.refused(*options, status=1)
    assert f"batch {batch_of(run.newest) + 1}: the training loss is nan; earlier checkpoints are kept" in line
    assert all(tensor.isfinite().all() for tensor in student_of(run.folder).values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints of 0.6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "none", folder]).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_ends_the_run_in_one_line(small_data: Path, small_disk: Path) -> None:
    """Promise 14: the checkpoint before is whole, and the run goes on where there is room."""
    run = Run(small_disk / "run", small_data)
    line = run.refused(status=1)
    assert "No space left" in line
    assert str(small_disk) in line
    assert checkpoints_of(run.folder) == {"ep0-ba2-rank0.pt"}
    assert batch_of(run.newest) == 2


def test_a_run_whose_folder_vanishes_ends_in_one_line(run: Run) -> None:
    """Promise 14: the line names the folder."""
    program = run.start_training(*ENDLESS)
    shutil.rmtree(run.folder, ignore_errors=True)
    shutil.rmtree(run.folder, ignore_errors=True)  # it may have written meanwhile
    assert program.wait(60) in (1, 2), program.stderr
    assert str(run.folder) in failure(program, program.wait(1))


def test_a_callback_that_cannot_close_hides_no_error(run: Run) -> None:
    """Promise 18: a log on a full disk, whose rest cannot be written at the end, either."""
    assert "/dev/full cannot be written: No space left" in run.refused("loggers.jsonl.filename=/dev/full", status=1)


def test_a_run_leaves_two_checkpoints_a_log_and_a_record(uninterrupted: Path) -> None:
    """Promise 15: the record says what the run was."""
    names = {path.name for path in uninterrupted.iterdir() if not path.name.startswith(".")}
    assert names == {"ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt", "latest-rank0.pt", "log.jsonl", "run.yaml"}
    record = yaml.safe_load((uninterrupted / "run.yaml").read_text())
    assert record["config"]["optimizer"]["lr"] == 0.004
    assert record["versions"]["mosaicml"]
    assert record["teacher"]["source"] == "tiny_base.pt"
    assert all(name.startswith("student.blocks.") for name in student_of(uninterrupted))
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert all("step" in line for line in lines)


@pytest.fixture
def saving(run: Run) -> Iterator[Program]:
    """The run trains for ever, saves every third batch, and keeps five checkpoints."""
    program = run.start(*ENDLESS, "save_num_checkpoints_to_keep=5", SLOW="0.2")
    try:
        wait_until(run.newest.exists, seconds=90)
        yield program
    finally:
        program.kill()


def test_readers_and_a_second_run_beside_a_run_that_saves(
    run: Run, saving: Program, labeled: Path, tmp_path: Path
) -> None:
    """Promise 20: evaluate, export, embed and report; 7, 18: a second run is refused, and told which process to stop.

    15: at the end of the first, five checkpoints are left.
    """
    second = run.start(*ENDLESS)  # waits ten seconds
    succeed("export", run.newest, tmp_path / "student.safetensors")
    succeed("embed", run.newest, labeled / "test", tmp_path / "embeddings.npy", "--workers", "0")
    succeed("evaluate", f"model={run.newest}", datasets_of(labeled), "ks=[1]", f"out={tmp_path / 'out'}")
    succeed("report", run.folder)
    second.wait(60)
    line = failure(second, 2)
    assert str(run.folder) in line
    assert f"process {saving.pid} on {platform.node()}" in line
    assert saving.poll() is None
    saving.send_signal(signal.SIGTERM)
    assert saving.wait(timeout=60) == 143, saving.stderr
    steps = steps_in(run)
    assert steps == list(range(len(steps)))  # one run wrote them
    assert len(checkpoints_of(run.folder)) == 5


@pytest.mark.slow
def test_the_quickstart_opens_with_what_it_trains_and_warns_of_nothing(tmp_path: Path) -> None:
    """Promise 19: a fresh process shows the warnings of all imports; a pipe gets lines, no bar."""
    folder = tmp_path / "run"
    options = ["precision=fp32", "max_duration=4ba", "scheduler.t_warmup=2ba", "global_train_batch_size=8"]
    options += ["retrieval.max_images=16", "alignment.max_samples=20", "callbacks.health=null", "report=false"]
    command = train_command([str(ROOT / "yamls" / "quickstart.yaml"), *options, f"save_folder={folder}"])
    ended = run_command("env", *command, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    header = dict(line.split(maxsplit=1) for line in ended.stdout.partition("\n\n")[0].splitlines())
    assert header["run"] == f"quickstart, saved in {folder}"
    assert {"device", "images", "model", "training", "retrieval"} <= header.keys()
    lines = ended.stderr.splitlines()
    assert [line for line in lines if not line.startswith("batch ")] == []
    assert lines[-1].startswith("batch 4/4 (100 %)  loss ")
    for batch, row in (0, "teacher/"), (0, ""), (4, ""):
        accuracy = rf"batch {batch}: metrics/cifar10/{row}bank_train/top1 \d+\.\d%"
        assert any(re.fullmatch(accuracy, line) for line in lines), lines
    for name in ("evaluate", "export"):  # the next commands are named
        assert f" {name} " in ended.stdout
    assert all(tensor.isfinite().all() for tensor in student_of(folder).values())

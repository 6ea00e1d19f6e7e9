"""Ctrl-C sends SIGINT to all processes of a command. Each command ends with one line and status 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from d2v_composer.evaluation.metrics import read_jsonl
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_student,
    checkpoints_of,
    encoded_image,
    run_command,
    small_run,
    start_python,
    started_ranks,
    train_command,
    wait_until,
)
from programs.preloaded import Program

STATUS = 128 + signal.SIGINT

# A training that stays in one event of Composer's for ever.
STUCK = """
import sys, time
from composer import Callback
from d2v_composer.callbacks import graceful_stop
from d2v_composer.system import cli
from recipes import train

class Stay(Callback):
    def run_event(self, event, state, logger):
        if event.value == sys.argv[1] and state.timestamp.batch == int(sys.argv[2]):
            print("is stuck", flush=True)
            time.sleep(600)

graceful_stop.NOTICE_SECONDS = 0.0
event, batch, *sys.argv[1:] = sys.argv[1:]
sys.argv[1:1] = [event, batch]
cli.run(lambda argv: train.main(argv[2:], [Stay()]))
"""

# A training that gets SIGINT in the retrieval of a batch, once the first images are embedded.
IN_RETRIEVAL = """
import os, signal, sys
from d2v_composer.callbacks import zero_shot_retrieval
from d2v_composer.system import cli
from recipes import train

look_up, calls = zero_shot_retrieval.look_up, []

def interrupted(*arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")
    yield from look_up(*arguments)

zero_shot_retrieval.look_up = interrupted
cli.run(lambda argv: train.main(argv[1:]))
"""

# A training whose report takes for ever.
IN_REPORT = """
import sys, time
from d2v_composer.builders import finish
from d2v_composer.system import cli
from recipes import train

def stay(*arguments):
    print("is stuck", flush=True)
    time.sleep(600)

finish.write_report = stay
cli.run(train.main)
"""

# A command that reads an image for ever, in its workers.
STUCK_WORKERS = """
import runpy, sys, time
from pathlib import Path

read_bytes = Path.read_bytes

def stay(path):
    if path.suffix != ".jpg":
        return read_bytes(path)
    print("is stuck", flush=True)
    time.sleep(600)

Path.read_bytes = stay
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def interrupt(program: Program) -> list[psutil.Process]:
    """Send SIGINT to a program and its workers, and return the workers."""
    workers = psutil.Process(program.pid).children(recursive=True)
    os.killpg(program.pid, signal.SIGINT)
    return workers


def assert_gone(workers: list[psutil.Process]) -> None:
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def pretend_composer(folder: Path) -> None:
    """Write a package that handles signals as Composer does, once its engine is imported."""
    core = folder / "composer" / "core"
    core.mkdir(parents=True)
    for package in (core, core.parent):
        (package / "__init__.py").touch()
    handler = "lambda signum, frame: sys.exit(128 + signum)"
    (core / "engine.py").write_text(f"import signal, sys\nsignal.signal(signal.SIGINT, {handler})\n")


@pytest.mark.parametrize("recipe", ["preflight", "supervised_resnet", "train"])
def test_ctrl_c_ends_the_imports(recipe: str, tmp_path: Path) -> None:
    """Also those after Composer's engine, which installs a handler of its own."""
    pretend_composer(tmp_path)
    (tmp_path / "composer" / "__init__.py").write_text("import torch")
    (tmp_path / "torch.py").write_text(
        "import composer.core.engine, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", ROOT / "yamls" / "quickstart.yaml"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (STATUS, "", "Interrupted\n")


def test_before_the_first_batch_a_run_ends_at_once(small_data: Path, tmp_path: Path) -> None:
    arguments = small_run(tmp_path, small_data, "train_loader.num_workers=1")
    program = start_python("-c", STUCK, "before_forward", "0", *arguments)
    wait_until(lambda: "is stuck" in program.stdout, seconds=60)
    workers = interrupt(program)
    assert workers
    assert program.wait(timeout=20) == STATUS
    assert program.stderr == "Interrupted\n"
    assert checkpoints_of(tmp_path) == set()
    assert_gone(workers)


def test_two_ranks_end_at_once(small_data: Path, tmp_path: Path) -> None:
    """One of them waits for the other in a collective."""
    arguments = small_run(tmp_path, small_data)
    with started_ranks("-c", STUCK, "batch_start", "0", *arguments, ranks=2) as programs:
        for program in programs:
            wait_until(lambda program=program: "is stuck" in program.stdout, seconds=60)
        for program in programs:
            interrupt(program)
        assert [program.wait(timeout=20) for program in programs] == [STATUS, STATUS]
        assert [program.stderr for program in programs] == ["Interrupted\n", "Interrupted\n"]


def test_a_second_ctrl_c_ends_at_once(small_data: Path, tmp_path: Path) -> None:
    arguments = small_run(tmp_path, small_data, "train_loader.num_workers=1", "save_interval=1000ba")
    program = start_python("-c", STUCK, "batch_start", "3", *arguments)
    wait_until(lambda: "is stuck" in program.stdout, seconds=60)
    interrupt(program)
    wait_until(lambda: "a second Ctrl-C ends the run at once" in program.stdout)
    workers = interrupt(program)
    assert workers
    assert program.wait(timeout=20) == STATUS
    assert program.stderr == "Interrupted again: ended at once\n"
    assert checkpoints_of(tmp_path) == set()
    assert_gone(workers)


def test_a_retrieval_that_was_cut_short_is_measured_by_the_resumed_run(
    small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    def run(name: str) -> list[str]:
        retrieval = f"retrieval.datasets={{small: {{format: mds, root: {labeled}}}}}"
        options = (retrieval, "retrieval.baselines=[]", "retrieval.interval=5ba", "save_interval=1000ba")
        return small_run(tmp_path / name, small_data, *options)

    undisturbed = run_command(*train_command(run("undisturbed")))
    assert undisturbed.returncode == 0, undisturbed.stderr
    stopped = start_python("-c", IN_RETRIEVAL, "3", *run("stopped"))  # after those of batches 0 and 5
    assert stopped.wait(timeout=60) == STATUS, stopped.stderr
    folder = tmp_path / "stopped"
    assert f"Interrupted: saved at batch 10 in {folder}; the same command resumes" in stopped.stdout
    key = "metrics/small/bank_train/top1"
    assert list(read_jsonl(folder / "log.jsonl")[key]) == [0, 5]
    again = run_command(*train_command(run("stopped")))
    assert again.returncode == 0, again.stderr
    assert f"resumed   from {folder}/ep1-ba10-rank0.pt at batch 10" in again.stdout
    assert_same_student(folder, tmp_path / "undisturbed")
    ours, theirs = (read_jsonl(tmp_path / name / "log.jsonl")[key] for name in ("stopped", "undisturbed"))
    assert ours == theirs
    assert list(ours) == [0, 5, 10, 14]


@pytest.mark.parametrize(("sent", "name"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "SIGTERM")])
def test_after_training_a_run_ends_at_once_and_the_same_command_makes_its_report(
    sent: signal.Signals, name: str, small_data: Path, tmp_path: Path
) -> None:
    arguments = small_run(tmp_path, small_data, "max_duration=1ba", "scheduler.t_warmup=0ba", "report=true")
    program = start_python("-c", IN_REPORT, *arguments)
    wait_until(lambda: "is stuck" in program.stdout, seconds=60)
    program.send_signal(sent)
    assert program.wait(timeout=20) == 128 + sent
    _, line = program.stderr.splitlines()  # the first one is the progress
    assert line.startswith(f"{name}: the model is saved, not its report; later: ")
    assert line.endswith(f" report {tmp_path}")
    assert len(checkpoints_of(tmp_path)) == 1
    if sent == signal.SIGTERM:
        again = run_command(*train_command(arguments))
        assert (again.returncode, (tmp_path / "report.html").is_file()) == (0, True), again.stderr


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["convert_images.py"], "finished shards are kept, the same command resumes"),
        (["embed.py", GOLDEN / "tiny_base.pt"], "0 of 3 images are done, the same command resumes"),
    ],
)
def test_workers_end_silently(arguments: list[str | Path], left: str, tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "out.npy"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(encoded_image(i))
    script, *others = arguments
    program = start_python("-c", STUCK_WORKERS, ROOT / "recipes" / script, *others, source, out, "--workers", "2")
    wait_until(lambda: "is stuck" in program.stdout, seconds=60)
    workers = interrupt(program)
    assert len(workers) >= 2
    assert program.wait(timeout=20) == STATUS
    lines = [line for line in program.stderr.splitlines() if not line.startswith("converting:")]
    assert [line for line in lines if line] == [f"Interrupted: {left}"]
    assert not out.is_file()
    assert_gone(workers)


# A command with a main of its own.
SIGNALLED = """
import os, signal
from d2v_composer.system import cli
{before}
cli.run(lambda argv: {main})
"""
SIGINT = "os.kill(os.getpid(), signal.SIGINT)"


def test_a_job_in_the_background_ignores_ctrl_c() -> None:
    code = SIGNALLED.format(before="signal.signal(signal.SIGINT, signal.SIG_IGN)", main=SIGINT)
    assert run_command(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize(
    ("before", "main", "status", "stderr"),
    [
        pytest.param(
            "signal.signal(signal.SIGINT, signal.SIG_IGN); cli.begin(None); import composer.core.engine; " + SIGINT,
            SIGINT,
            0,
            "",
            id="in the background",
        ),
        pytest.param(
            "signal.signal(signal.SIGINT, signal.default_int_handler)",
            f"(__import__('composer.core.engine'), {SIGINT})",
            STATUS,
            "Interrupted\n",
            id="imported by the command",
        ),
    ],
)
def test_composers_handler_does_not_replace_ours(
    before: str, main: str, status: int, stderr: str, tmp_path: Path
) -> None:
    pretend_composer(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", SIGNALLED.format(before=before, main=main)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (status, stderr)


def test_a_failure_after_ctrl_c_is_its_consequence() -> None:
    """Such as a lost connection to another rank, when KeyboardInterrupt comes inside its cleanup."""
    code = SIGNALLED.format(
        before="""
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        raise RuntimeError("connection lost")
""",
        main="main()",
    )
    ended = run_command(sys.executable, "-c", code)
    assert (ended.returncode, ended.stderr) == (STATUS, "Interrupted\n")


def test_sigterm_ends_a_command_and_foreign_workers_silently() -> None:
    code = SIGNALLED.format(
        before="""
import multiprocessing, time

def stay(started):
    started.set()
    time.sleep(600)

def main():
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=stay, args=[started])
    worker.start()
    started.wait()
    worker.terminate()
    worker.join()
    print(worker.exitcode)
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("went on")
""",
        main="main()",
    )
    ended = run_command(sys.executable, "-c", code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "-15\n", "SIGTERM\n")


def test_ctrl_c_after_sigterm_ends_at_once_as_sigterm_does() -> None:
    code = SIGNALLED.format(
        before="""
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
""",
        main="main()",
    )
    ended = run_command(sys.executable, "-c", code)
    assert (ended.returncode, ended.stderr) == (143, "Interrupted again: ended at once\n")


@pytest.mark.parametrize(("main", "status"), [("None", 0), ("fail()", 2)])
def test_sigterm_after_the_end_does_not_change_the_status(main: str, status: int) -> None:
    """Composer's launcher sends it to the last of the ranks that end by one error, while its interpreter ends."""
    code = SIGNALLED.format(
        before="""
from d2v_composer.system.errors import InputError

def fail():
    raise InputError("wrong")

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)

signal.late = Late()  # goes with the interpreter's modules
""",
        main=main,
    )
    ended = run_command(sys.executable, "-c", code)
    assert (ended.returncode, ended.stderr) == (status, "error: wrong\n" if status else "")


def test_lines_arrive_at_once_in_a_pipe() -> None:
    code = SIGNALLED.format(before="import time", main="(print('a line'), time.sleep(600))")
    program = start_python("-c", code)
    wait_until(lambda: program.stdout == "a line\n")
    program.kill()

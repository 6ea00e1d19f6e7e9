"""Signals reach one thread of a command, its children live no longer than it does, and processes share the cores."""

import os
import signal
import subprocess
import sys

from d2v_composer.system.processes import start_program

# A command that ends while it has a worker that sleeps for ever, which multiprocessing would wait for.
WITH_WORKER = """
import multiprocessing, time
from d2v_composer.system import command_line

def main(argv):
    import numpy  # which starts threads
    masks = [each.read_text().split("SigBlk:")[1].split()[0] for each in Path("/proc/self/task").glob("*/status")]
    print(len(masks), *{int(mask, 16) & 0x4002 for mask in masks})
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()

from pathlib import Path
command_line.run(main)
"""


def test_all_threads_block_the_signals_and_a_command_ends_its_workers() -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "3"}
    ended = subprocess.run([sys.executable, "-c", WITH_WORKER], capture_output=True, env=environment, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, b"")
    threads, *masks = map(int, ended.stdout.split())
    assert threads > 2
    # SIGINT is number 2, SIGTERM 15. The kernel shows none of them as blocked in the thread that waits for them.
    assert sorted(masks) == [0, 0x4002]


# A command where the kernel cannot block signals, as on Windows.
WITHOUT_MASKS = """
import signal, sys, time
for name in ("pthread_sigmask", "sigwait", "SIGCHLD"):
    delattr(signal, name)
from d2v_composer.system import command_line

def main(argv):
    print("ready", flush=True)
    time.sleep(600)

command_line.run(main)
"""


def test_ctrl_c_ends_a_command_where_signals_cannot_be_blocked() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WITHOUT_MASKS], **pipes) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=60)[1] == "Interrupted\n"
    assert program.returncode == 130


def test_programs_of_others_are_started_without_the_mask() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        program = start_program(["sleep", "600"])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    program.terminate()
    assert program.wait(30) == -signal.SIGTERM


def words_of(program: str, **variables: str) -> list[str]:
    """Run a program in a process of its own; return the words of its output."""
    ours = ("OMP_", "GOMP_", "TORCHINDUCTOR_COMPILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=kept | variables, check=True, capture_output=True, text=True).stdout.split()


def test_commands_divide_the_cores_among_the_ranks_of_a_machine() -> None:
    names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "GOMP_SPINCOUNT")  # before torch, which reads them
    program = f"import d2v_composer.commands, os, sys; print('torch' in sys.modules, *map(os.getenv, {names}))"
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert words_of(program, LOCAL_WORLD_SIZE="2") == ["False", share, share, "1000"]


def test_settings_of_the_user_are_kept() -> None:
    program = "import os; before = {**os.environ}; import d2v_composer.system.machine; print(before == os.environ)"
    settings = {"OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "5", "GOMP_SPINCOUNT": "7"}
    assert words_of(program, LOCAL_WORLD_SIZE="2", **settings) == ["True"]
    assert words_of(program, OMP_WAIT_POLICY="active") == ["True"]
    assert words_of(program) == ["False"]

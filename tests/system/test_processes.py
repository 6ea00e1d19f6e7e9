"""Signals reach one thread of a command; its children live no longer than it does."""

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

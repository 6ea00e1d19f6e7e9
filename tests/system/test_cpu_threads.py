"""Processes share a machine's cores."""

import os
import subprocess
import sys


def start(program: str, **variables: str) -> list[str]:
    """Run a program in a process of its own, where torch is not imported yet; return the words of its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=kept | variables, check=True, capture_output=True, text=True).stdout.split()


def test_commands_divide_the_cores_among_the_ranks_of_a_machine() -> None:
    program = "import d2v_composer.commands, os, torch; print(torch.get_num_threads(), os.environ['GOMP_SPINCOUNT'])"
    threads, spin_count = start(program, LOCAL_WORLD_SIZE="2")
    assert (int(threads), int(spin_count)) == (max(1, len(os.sched_getaffinity(0)) // 2), 1000)


def test_settings_of_the_user_are_kept() -> None:
    program = "import os; before = {**os.environ}; import d2v_composer.system.cpu_threads; print(before == os.environ)"
    assert start(program, LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="3", GOMP_SPINCOUNT="7") == ["True"]
    assert start(program, OMP_WAIT_POLICY="active") == ["True"]
    assert start(program) == ["False"]

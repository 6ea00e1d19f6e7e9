"""Processes share a machine's cores."""

import os
import subprocess
import sys


def start(program: str, **variables: str) -> list[str]:
    """Run a program in a process of its own; return the words of its output."""
    ours = ("OMP_", "GOMP_", "TORCHINDUCTOR_COMPILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=kept | variables, check=True, capture_output=True, text=True).stdout.split()


def test_commands_divide_the_cores_among_the_ranks_of_a_machine() -> None:
    names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "GOMP_SPINCOUNT")  # before torch, which reads them
    program = f"import d2v_composer.commands, os, sys; print('torch' in sys.modules, *map(os.getenv, {names}))"
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert start(program, LOCAL_WORLD_SIZE="2") == ["False", share, share, "1000"]


def test_settings_of_the_user_are_kept() -> None:
    program = "import os; before = {**os.environ}; import d2v_composer.system.machine; print(before == os.environ)"
    settings = {"OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "5", "GOMP_SPINCOUNT": "7"}
    assert start(program, LOCAL_WORLD_SIZE="2", **settings) == ["True"]
    assert start(program, OMP_WAIT_POLICY="active") == ["True"]
    assert start(program) == ["False"]

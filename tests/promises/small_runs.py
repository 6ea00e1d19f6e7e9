"""A tiny run, as most promises need it: it is trained, killed, signaled or refused, and then looked into."""

import shutil
import signal
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from helpers import (
    ROOT,
    has_trained,
    log_of,
    refused_run,
    run_ranks,
    run_training,
    small_run,
    start_python,
    traced,
    train_command,
    wait_until,
)
from programs.preloaded import Program


class Run:
    """A run of :func:`helpers.small_run`; each method takes further overrides.

    Args:
        folder: Its folder; of a run whose ``save_folder`` is in a store, its local one.
        data: Its samples, or their cache.
        overrides: Its settings.
        cwd: The working folder of its programs.
        environment: What is added to their environment.
    """

    def __init__(
        self, folder: Path, data: Path, *overrides: str, cwd: Path = ROOT, environment: dict[str, str] | None = None
    ) -> None:
        self.folder, self.data, self.arguments = folder, data, small_run(folder, data, *overrides)
        self.options: dict[str, Any] = {"cwd": cwd, "environment": environment or {}}

    def copied_to(self, folder: Path) -> "Run":
        """Return the run that goes on in a copy of its folder."""
        return Run(shutil.copytree(self.folder, folder, symlinks=True), self.data)

    def train(self, *overrides: str) -> CompletedProcess[str]:
        """Train it, which must succeed."""
        return run_training(*self.arguments, *overrides, **self.options)

    def train_on_ranks(self, *overrides: str, **options: Any) -> None:
        run_ranks(*train_command([*self.arguments, *overrides])[1:], **options)

    def start(self, *overrides: str, **variables: str) -> Program:
        """Start it with variables, such as AT, that command the callback in programs/traced.py."""
        arguments, environment = [*self.arguments, *overrides], self.options["environment"] | variables
        command = traced(arguments) if variables else train_command(arguments)[1:]
        return start_python(*command, cwd=self.options["cwd"], environment=environment)

    def start_until(self, said: str, *overrides: str, **variables: str) -> Program:
        """Start it, and wait until it says a word."""
        program = self.start(*overrides, **variables)
        wait_until(lambda: said in program.stdout, seconds=60)
        return program

    def start_training(self, *overrides: str, **variables: str) -> Program:
        """Start it, and wait until it has finished a batch."""
        program = self.start(*overrides, **variables)
        wait_until(self.has_trained, seconds=90)
        return program

    def train_until_killed(self, moment: str, *overrides: str) -> None:
        """Train it until it is killed at an event of a batch, such as ``batch_start 3``."""
        killed = self.start(*overrides, AT=f"{moment} kill")
        assert killed.wait(300) == -signal.SIGKILL, killed.stderr

    def refused(self, *overrides: str, status: int = 2) -> str:
        """Train it, which must fail, and return its last line."""
        return refused_run([*self.arguments, *overrides], status, **self.options)

    def has_trained(self) -> bool:
        return has_trained(self.folder)

    @property
    def newest(self) -> Path:
        return self.folder / "latest-rank0.pt"

    @property
    def log(self) -> dict[str, dict[int, float]]:
        """Its log: key → step → value."""
        return log_of(self.folder)

    @property
    def losses(self) -> dict[int, float]:
        return self.log.get("loss/train/total", {})

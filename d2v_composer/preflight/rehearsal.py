"""The run itself, small: started, stopped by SIGTERM, resumed, exported; in a folder of its own."""

import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from d2v_composer.callbacks.graceful_stop import EXIT_STATUS
from d2v_composer.callbacks.jsonl_logger import read_jsonl
from d2v_composer.callbacks.yaml_names import CALLBACKS
from d2v_composer.checkpoints.load import load_any, load_student, save_student
from d2v_composer.checkpoints.resume import LATEST, find_newest_checkpoint
from d2v_composer.config.schema import TrainConfig
from d2v_composer.preflight.command import RunningCommand, running
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError

__all__ = ["IMAGES_PER_SET", "Rehearsal"]

STOP_AFTER_BATCHES = 3
# The pace is logged every ten batches; the first ten hold torch.compile.
BATCHES_AFTER_RESUME = 20
# What the first half does at most, should nothing stop it.
LONGEST = 500
IMAGES_PER_SET = 128
SHUFFLED_SAMPLES = 2048
# Without a line printed: longer than compiling, and than collectives take to give up.
STALL_SECONDS = 1800.0
STOP_SECONDS = 120.0
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


class Rehearsal(NamedTuple):
    """The user's run, made small.

    Every method returns what was done, in words and as a value, and raises :class:`InputError` where the run failed.
    """

    train_script: Path
    argv: Sequence[str]
    """The YAML and the user's overrides."""
    config: TrainConfig
    nodes: Nodes
    port: str
    """Of the rendezvous, for several nodes."""
    run_name: str
    save_folder: str
    cache: Path
    """Instead of ``train_loader.local``, for a remote data set."""

    @property
    def folder(self) -> Path:
        """The run's folder on this machine."""
        return RunFolder.parse(self.save_folder).local

    @property
    def log(self) -> Path:
        """The first node's log."""
        return self.folder / "log.jsonl"

    def started(self) -> AbstractContextManager[RunningCommand]:
        """The run from its start, with every callback at every batch."""
        return self._running(f"max_duration={LONGEST}ba", *every_batch(self.config))

    def resumed(self, batch: int) -> AbstractContextManager[RunningCommand]:
        """The run from a batch on, with the intervals of the YAML, for long enough to measure its pace."""
        return self._running(f"max_duration={batch + BATCHES_AFTER_RESUME}ba", "callbacks.memory_monitor={}")

    def train(self, command: RunningCommand) -> tuple[str, None]:
        """Wait for the first batches."""
        batches = 0
        if self.nodes.rank == 0:
            command.wait(lambda: num_batches(self.log) >= STOP_AFTER_BATCHES, STALL_SECONDS)
            batches = num_batches(self.log)
        batches = int(self.nodes.exchange("trained", str(batches))[0])
        if batches < STOP_AFTER_BATCHES:
            raise failure(command, f"{batches} of {STOP_AFTER_BATCHES} batches were trained")
        return f"{batches} batches, with every callback at every batch", None

    def stop(self, command: RunningCommand) -> tuple[str, int]:
        """Send SIGTERM to every process; find the checkpoint. The value is its batch."""
        command.signal(signal.SIGTERM)
        status = command.wait_for_end(STOP_SECONDS)
        batch = self._saved_batch() if self.nodes.rank == 0 else 0
        batch = int(self.nodes.exchange("stopped", str(batch))[0])
        if status is None:
            raise failure(command, f"still runs {STOP_SECONDS:.0f} s after SIGTERM")
        if status != EXIT_STATUS or not batch:
            saved = f"a checkpoint of batch {batch}" if batch else "no checkpoint"
            raise failure(command, f"SIGTERM to all processes: status {status} instead of {EXIT_STATUS}, {saved}")
        return f"SIGTERM to all processes: status {status}, a checkpoint of batch {batch}", batch

    def resume(self, command: RunningCommand, batch: int, logged: int) -> tuple[str, None]:
        """Wait for the end.

        Args:
            command: :meth:`resumed`.
            batch: Where it goes on.
            logged: Bytes of the log before it.
        """
        command.wait_for_end(STALL_SECONDS)
        if command.process.poll() != 0:
            raise failure(command, f"the resumed run ended with status {command.process.poll()}")
        if self.nodes.rank == 0:
            batches = batches_in(self.log, logged)
            if batches != list(range(batch, batch + BATCHES_AFTER_RESUME)):
                raise InputError(f"the resumed run trained batches {batches[:1]} to {batches[-1:]}, not {batch} on")
        return f"from batch {batch}, {BATCHES_AFTER_RESUME} batches more", None

    def retrieve(self) -> tuple[str, None]:
        """Find an accuracy of every labelled set in the log."""
        logged = read_jsonl(self.log)
        sets = [name for name, labelled in self.config.retrieval.datasets.items() if labelled is not None]
        for name in sets:
            if f"metrics/{name}/bank_train/top{self.config.retrieval.ks[0]}" not in logged:
                raise InputError(f"no accuracy of {name} was logged")
        return f"{', '.join(sets) or 'none'}: {IMAGES_PER_SET} images of each split", None

    def export(self) -> tuple[str, None]:
        """Export the student of the newest checkpoint, and load it again."""
        with TemporaryDirectory() as folder:
            out = Path(folder) / "student.safetensors"
            student, _ = load_any(str(self.folder / LATEST), teacher_path=self.config.teacher.checkpoint)
            assert student is not None  # of a checkpoint
            save_student(student, out)
            load_student(out)
            return f"{out.stat().st_size / 1e6:.1f} MB, loads without the teacher", None

    def _saved_batch(self) -> int:
        """The batch of the newest checkpoint, where a restart looks for it; 0 for none."""
        with TemporaryDirectory() as elsewhere:  # as on a machine that has no copy
            folder = RunFolder.parse(self.save_folder)
            local = self.folder if folder.address is None else Path(elsewhere)
            newest = find_newest_checkpoint(folder._replace(local=local))
        match = None if newest is None else re.search(r"-ba(\d+)-", newest.name)
        return 0 if match is None else int(match[1])

    def _running(self, *overrides: str) -> AbstractContextManager[RunningCommand]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        arguments = [*self._launcher(), str(self.train_script), *self.argv, *self._own_folders(), *overrides]
        return running(arguments, environment)

    def _own_folders(self) -> list[str]:
        """Overrides that keep the rehearsal apart, and make it read little."""
        loader = self.config.train_loader
        overrides = [
            f"run_name={self.run_name}",
            f"save_folder={self.save_folder}",
            "load_path=null",
            "autoresume=true",
            "save_interval=100000ba",  # at SIGTERM and at the end
            "scheduler.t_warmup=1ba",
            "loggers={jsonl: {}}",  # others would show a run that is none
            "progress_bar=false",
            "log_to_console=true",
            "console_log_interval=1ba",
            f"retrieval.max_images={IMAGES_PER_SET}",
            f"train_loader.shuffle_block_size={min(loader.shuffle_block_size, SHUFFLED_SAMPLES)}",
        ]
        return overrides if loader.remote is None else [*overrides, f"train_loader.local={self.cache}"]

    def _launcher(self) -> list[str]:
        nodes, world_size = self.nodes, self.nodes.num_nodes * self.nodes.ranks_per_node
        if world_size == 1:
            return [sys.executable]
        launcher = [sys.executable, "-m", "composer.cli", "--nproc", str(nodes.ranks_per_node)]
        if nodes.num_nodes > 1:
            launcher += ["--world_size", str(world_size), "--node_rank", str(nodes.rank)]
            launcher += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", self.port]
        return launcher


def every_batch(config: TrainConfig) -> list[str]:
    """Overrides that make every callback with an interval act at every batch."""
    overrides = ["retrieval.interval=1ba"]
    for name, arguments in config.callbacks.items():
        if arguments is not None:
            parameters = inspect.signature(CALLBACKS[name]).parameters
            values: Mapping[str, object] = {"interval": "1ba", "batch_log_interval": 1}
            overrides += [f"callbacks.{name}.{key}={value}" for key, value in values.items() if key in parameters]
    return overrides


def num_batches(log: Path) -> int:
    """Trained batches, as a log says."""
    return len(read_jsonl(log).get("loss/train/total", {})) if log.is_file() else 0


def batches_in(log: Path, start: int) -> list[int]:
    """The batches whose loss stands in a log behind a byte."""
    with log.open("rb") as file:
        file.seek(start)
        entries = map(json.loads, file)
        return [entry["step"] for entry in entries if "loss/train/total" in entry]


def failure(command: RunningCommand, what: str) -> InputError:
    """The error of a rehearsal, after the end of what its command printed."""
    lines = command.last_lines()
    print("\n".join(f"    | {line}" for line in lines), file=sys.stderr, flush=True)
    last = next((line.strip() for line in reversed(lines) if re.search(r"error|Error", line)), "")
    return InputError(f"{what}{f' ({last})' if last else ''}")

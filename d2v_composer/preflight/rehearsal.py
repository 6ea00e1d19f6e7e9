"""Run the user's training command, small: start it, stop it by SIGTERM, resume it, export its student."""

import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from d2v_composer.callbacks.yaml_names import CALLBACKS
from d2v_composer.checkpoints.load import load_any, load_student, save_student
from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.checkpoints.resume import find_newest_checkpoint
from d2v_composer.config.schema import TrainConfig
from d2v_composer.evaluation.metrics_log import read_jsonl
from d2v_composer.preflight.command import RunningCommand, running
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError

__all__ = ["IMAGES_PER_SET", "Rehearsal"]

STOP_AFTER_BATCHES = 3
# The pace is logged every ten batches; the first ten hold torch.compile.
BATCHES_AFTER_RESUME = 20
LONGEST = 500  # batches, if nothing stops the first half
IMAGES_PER_SET = 128
SHUFFLED_SAMPLES = 2048
# Without a printed line: longer than compiling, and than the timeout of collectives.
STALL_SECONDS = 1800.0
STOP_SECONDS = 120.0
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Rehearsal:
    """The user's run, made small.

    The phases return what they did as one line, and raise :class:`InputError` if the run failed.
    """

    train_script: Path
    argv: Sequence[str]
    """The YAML and the user's overrides."""
    config: TrainConfig
    nodes: Nodes
    port: str
    """The port for the rendezvous of several nodes."""
    save_folder: str
    cache: Path
    """Replaces ``train_loader.local`` of a remote data set."""
    batch: int = 0
    """The batch of the checkpoint that SIGTERM left."""
    logged: int = 0
    """The bytes of the log at that time."""

    @property
    def folder(self) -> Path:
        """The run's folder on this machine."""
        return RunFolder.parse(self.save_folder).local

    @property
    def log(self) -> Path:
        """The log of node 0."""
        return self.folder / "log.jsonl"

    def started(self) -> AbstractContextManager[RunningCommand]:
        """Run from the start, with every callback at every batch."""
        return self._running(f"max_duration={LONGEST}ba", *every_batch(self.config))

    def resumed(self) -> AbstractContextManager[RunningCommand]:
        """Run from the checkpoint, with the intervals of the YAML, for long enough to measure the pace."""
        return self._running(f"max_duration={self.batch + BATCHES_AFTER_RESUME}ba", "callbacks.memory_monitor={}")

    def train(self, command: RunningCommand) -> str:
        """Wait for the first batches."""
        batches = 0
        if self.nodes.rank == 0:
            command.wait(lambda: num_batches(self.log) >= STOP_AFTER_BATCHES, STALL_SECONDS)
            batches = num_batches(self.log)
        batches = int(self.nodes.exchange("trained", str(batches))[0])
        if batches < STOP_AFTER_BATCHES:
            raise failure(command, f"{batches} of {STOP_AFTER_BATCHES} batches were trained")
        return f"{batches} batches, with every callback at every batch"

    def stop(self, command: RunningCommand) -> str:
        """Send SIGTERM to every process, and find the checkpoint."""
        command.signal(signal.SIGTERM)
        status = command.wait_for_end(STOP_SECONDS)
        batch = self._saved_batch() if self.nodes.rank == 0 else 0
        self.batch = int(self.nodes.exchange("stopped", str(batch))[0])
        self.logged = self.log.stat().st_size if self.log.is_file() else 0
        if status is None:
            raise failure(command, f"still running {STOP_SECONDS:.0f} s after SIGTERM")
        expected = 128 + signal.SIGTERM
        if status != expected or not self.batch:
            saved = f"a checkpoint of batch {self.batch}" if self.batch else "no checkpoint"
            raise failure(command, f"SIGTERM to all processes: status {status} instead of {expected}, {saved}")
        return f"SIGTERM to all processes: status {status}, a checkpoint of batch {self.batch}"

    def resume(self, command: RunningCommand) -> str:
        """Wait for the end of the resumed run."""
        command.wait_for_end(STALL_SECONDS)
        if command.process.poll() != 0:
            raise failure(command, f"the resumed run ended with status {command.process.poll()}")
        if self.nodes.rank == 0:
            batches = batches_in(self.log, self.logged)
            if batches != list(range(self.batch, self.batch + BATCHES_AFTER_RESUME)):
                raise InputError(
                    f"the resumed run trained batches {batches[:1]} to {batches[-1:]} instead of {self.batch} and later"
                )
        return f"from batch {self.batch}, {BATCHES_AFTER_RESUME} more batches"

    def retrieve(self) -> str:
        """Find an accuracy of every labelled set in the log."""
        logged = read_jsonl(self.log)
        sets = [name for name, labelled in self.config.retrieval.datasets.items() if labelled is not None]
        for name in sets:
            if f"metrics/{name}/bank_train/top{self.config.retrieval.ks[0]}" not in logged:
                raise InputError(f"no accuracy of {name} was logged")
        return f"{', '.join(sets) or 'none'}: {IMAGES_PER_SET} images of each split"

    def export(self) -> str:
        """Export the student of the newest checkpoint, and load it again."""
        with TemporaryDirectory() as folder:
            out = Path(folder) / "student.safetensors"
            student, _ = load_any(str(self.folder / LATEST), teacher_path=self.config.teacher.checkpoint)
            assert student is not None  # a checkpoint has one
            save_student(student, out)
            load_student(out)
            return f"{out.stat().st_size / 1e6:.1f} MB, loads without the teacher"

    def _saved_batch(self) -> int:
        """Return the batch of the newest checkpoint that a restart finds; 0 without one."""
        with TemporaryDirectory() as elsewhere:  # like a machine without a copy
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
        """Return overrides that keep the rehearsal apart from the run, and let it read little."""
        loader = self.config.train_loader
        overrides = [
            f"run_name={self.config.run_name}",
            f"save_folder={self.save_folder}",
            "load_path=null",
            "autoresume=true",
            "save_interval=100000ba",  # at SIGTERM and at the end
            "scheduler.t_warmup=1ba",
            "loggers={jsonl: {}}",  # other loggers would show a run that does not exist
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
    """Return overrides that make every callback with an interval act at every batch."""
    overrides = ["retrieval.interval=1ba"]
    for name, arguments in config.callbacks.items():
        if arguments is not None:
            parameters = inspect.signature(CALLBACKS[name]).parameters
            values: Mapping[str, object] = {"interval": "1ba", "batch_log_interval": 1}
            overrides += [f"callbacks.{name}.{key}={value}" for key, value in values.items() if key in parameters]
    return overrides


def num_batches(log: Path) -> int:
    """Count the trained batches in a log."""
    return len(read_jsonl(log).get("loss/train/total", {})) if log.is_file() else 0


def batches_in(log: Path, start: int) -> list[int]:
    """Return the batches whose loss is in a log after a byte."""
    with log.open("rb") as file:
        file.seek(start)
        entries = map(json.loads, file)
        return [entry["step"] for entry in entries if "loss/train/total" in entry]


def failure(command: RunningCommand, what: str) -> InputError:
    """Print the last lines of the command, and return the error."""
    lines = command.last_lines()
    print("\n".join(f"    | {line}" for line in lines), file=sys.stderr, flush=True)
    last = next((line.strip() for line in reversed(lines) if re.search(r"error|Error", line)), "")
    return InputError(f"{what}{f' ({last})' if last else ''}")

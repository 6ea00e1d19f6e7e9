"""Try a run for a few batches, before the whole run starts."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from math import inf
from operator import truediv
from os import killpg
from pathlib import Path
from statistics import fmean, harmonic_mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from composer.utils import dist

from d2v_composer.checkpoints.checkpoint import LATEST, LOG
from d2v_composer.checkpoints.load import load_student, save_student
from d2v_composer.config.reference import load_any
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data import MODALITIES
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.models.provenance import Record
from d2v_composer.sources.mds import INDEX
from d2v_composer.sources.shards import fetch_index
from d2v_composer.system.addresses import PREFLIGHT, RunFolder
from d2v_composer.system.errors import InputError, RunError, reason
from d2v_composer.system.fetch import list_store, open_store
from d2v_composer.system.processes import if_interrupted, start_program

STOP_AFTER_BATCHES = 3
INTERVAL = 10  # batches from one logged pace to the next
SHUFFLED_SAMPLES = 2048
PHASE_SECONDS, STOP_SECONDS = 3600.0, 120.0  # compiling takes minutes, the timeout of collectives too


def preflight(argv: Sequence[str], config: TrainConfig, train_script: Path) -> bool:
    """Try a run for a few batches; print a table of the checks and, if all pass, an estimate for the whole run.

    Call this function in one process, before a process group exists.

    Returns:
        True if all checks passed.
    """
    failed = None
    with closing(Rehearsal(argv, config, train_script)) as run, if_interrupted(run.close):
        print_row("check", "verdict", "found")
        phases = {
            "data": run.check_shards,
            "training": run.train,
            "SIGTERM": run.stop,
            "resume": run.resume,
            "export": run.export,
            "save_folder": run.remove,
        }
        for name, phase in phases.items():
            if failed is not None:
                print_row(name, "skipped", "fix the failure above first")
                continue
            try:
                print_row(name, "ok", phase())
            except Exception as error:  # noqa: BLE001  (the run would fail with it too)
                failed = error
                print_row(name, "FAILED", reason(error))
        if failed is None:
            print("\nEstimate for the whole run, if nothing else used the machine during the preflight:")
            print(run.needs(), flush=True)
    return failed is None


def print_row(name: str, verdict: str, result: str) -> None:
    print(f"{name:14} {verdict:7} {result}", flush=True)


class Rehearsal:
    """A short run with the user's arguments, in separate folders.

    A method that checks something returns a text for the table, and raises an exception if the check fails.
    """

    def __init__(self, argv: Sequence[str], config: TrainConfig, train_script: Path) -> None:
        self.command, self.config, self.ranks = [str(train_script), *argv], config, dist.get_local_world_size()
        self.data: Record = {}
        """The section ``data`` of the run's record."""
        self.logged: dict[str, dict[int, float]] = {}
        self.temporary = TemporaryDirectory()
        self.output = Path(self.temporary.name, "output.txt")
        self.save_folder = f"{config.run_folder or self.temporary.name}/{PREFLIGHT}"
        self.folder, self.cache = RunFolder.parse(self.save_folder), Path(config.train_loader.local, PREFLIGHT)
        self.log, self.latest = self.folder.local / LOG, self.folder.local / LATEST
        self.process: subprocess.Popen[Any] | None = None
        # Only the last intervals count for the pace. Earlier batches include torch.compile and, on a GPU, were loaded
        # while it ran, so that a slow loader does not show in them.
        loader, on_gpu = config.train_loader, torch.cuda.is_available()
        self.intervals = 10 if on_gpu else 1
        self.batches = (self.intervals + 1) * INTERVAL + on_gpu * loader.num_workers * loader.prefetch_factor

    def check_shards(self) -> str:
        """Check that the store of the training data, if any, has all shards."""
        remote = self.config.train_loader.remote
        if remote is None:
            return "the shards are on this machine, not in a store"
        fetch_index(remote, Path(self.temporary.name))
        shards = json.loads(Path(self.temporary.name, INDEX).read_bytes())["shards"]
        names = [(shard.get("zip_data") or shard["raw_data"])["basename"] for shard in shards]
        stored = {file.path for file in list_store(remote)}
        if missing := [name for name in names if name not in stored]:
            raise InputError(f"{remote}: {len(missing)} of {len(names)} shards missing; the first is {missing[0]}")
        return f"{remote} has {len(names)} of {len(names)} shards"

    def train(self) -> str:
        """Start the run, and wait until it has trained a few batches."""
        self.remove()  # what a killed preflight left
        self.start("max_duration=500ba")
        self.wait(PHASE_SECONDS, STOP_AFTER_BATCHES)
        if (trained := self.num_batches()) < STOP_AFTER_BATCHES:
            raise self.fault(f"trained only {trained} of {STOP_AFTER_BATCHES} batches")
        self.data = yaml.safe_load((self.folder.local / "run.yaml").read_text())["data"]
        return f"{trained} batches"

    def stop(self) -> str:
        """Send SIGTERM to all processes; the run must exit with status 143."""
        self.signal(signal.SIGTERM)
        if self.wait(STOP_SECONDS) != 128 + signal.SIGTERM:
            raise self.fault(f"the run did not exit with status 143 within {STOP_SECONDS:.0f} s of SIGTERM")
        return f"the run exited with status 143 after batch {self.num_batches()}"

    def resume(self) -> str:
        """Resume the run, and train long enough to measure the speed."""
        batch = self.num_batches()
        if self.folder.address is not None:
            for copy in self.folder.local.glob("*.pt"):  # the store's must do, as on another machine
                copy.unlink()
        self.start(f"max_duration={batch + self.batches}ba")
        if (status := self.wait(PHASE_SECONDS)) != 0:
            ended = "it was still running" if status is None else f"it exited with status {status}"
            raise self.fault(f"the resumed run must end with status 0 within {PHASE_SECONDS:.0f} s, but {ended}")
        if f" at batch {batch}\n" not in self.output.read_text(errors="replace"):
            raise self.fault(f"the run started over instead of resuming at batch {batch}")
        self.logged = read_jsonl(self.log)
        size = f"a checkpoint takes {self.latest.stat().st_size / 1e6:,.0f} MB"
        return f"resumed at batch {batch} and trained {self.batches} more batches; {size}"

    def export(self) -> str:
        """Export the student of the newest checkpoint, and load the file."""
        out = Path(self.temporary.name, "student.safetensors")
        student, _ = load_any(self.latest, teacher=self.config.teacher.checkpoint)
        save_student(student, out)
        load_student(out)
        return f"the student's file takes {out.stat().st_size / 1e6:.1f} MB and loads without the teacher"

    def num_batches(self) -> int:
        return self.log.read_text().count('"loss/train/total"') if self.log.is_file() else 0

    def start(self, *overrides: str) -> None:
        """Start or resume the short run, with further overrides."""
        loader = self.config.train_loader
        launcher = [sys.executable, "-m", "composer.cli", "--nproc", str(self.ranks)]
        settings = [
            f"save_folder={self.save_folder}",
            "load_path=null",
            "autoresume=true",
            "save_interval=100000ba",  # at SIGTERM and at the end
            "scheduler.t_warmup=1ba",
            "loggers={jsonl: {}}",  # other loggers would show a run that does not exist
            f"train_loader.shuffle_block_size={min(loader.shuffle_block_size, SHUFFLED_SAMPLES)}",
            *([f"train_loader.local={self.cache}"] if loader.remote else []),
        ]
        with self.output.open("wb") as output:
            command = [*launcher, *self.command, *settings, *overrides]
            self.process = start_program(command, stdout=output, stderr=subprocess.STDOUT)

    def wait(self, seconds: float, batches: float = inf) -> int | None:
        """Wait until the run has trained ``batches`` or ended, at most ``seconds``; return the exit status, if any."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and self.num_batches() < batches and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.process.poll()

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to every process of the run."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                killpg(self.process.pid, signum)

    def fault(self, what: str) -> RunError:
        """Print the last lines of the run's output, and return an error that begins with ``what``."""
        lines = self.output.read_text(errors="replace").splitlines()[-15:]
        print("\n".join(f"    | {line}" for line in lines), file=sys.stderr, flush=True)
        return RunError(f"{what}: {next((line for line in reversed(lines) if 'rror' in line), 'see the lines above')}")

    def remove(self) -> str:
        """Remove the preflight's files on this machine and in S3."""
        for folder in (self.folder.local, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
        if self.save_folder.startswith("s3://"):  # Composer cannot delete a file of another store
            store, key = open_store(self.save_folder)
            bucket: Any = store
            for file in list_store(self.save_folder):
                bucket.client.delete_object(Bucket=bucket.bucket, Key=f"{key}/{file.path}")
            return "the preflight's files on this machine and in S3 are removed"
        left = "" if self.folder.address is None else f"; those in {self.folder.address} are not, and may be deleted"
        return f"the preflight's files on this machine are removed{left}"

    def close(self) -> None:
        """Kill any process that is still running, and remove the files."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            with suppress(Exception):  # a store that denies it was named in the table
                self.remove()
        self.temporary.cleanup()

    def in_batches(self, duration: str) -> int:
        """Convert a duration, such as 600ba or 100ep, to a number of batches."""
        per_unit = self.data["samples"] // self.config.global_train_batch_size if duration.endswith("ep") else 1
        return int(duration[:-2]) * per_unit

    def needs(self) -> str:
        """Return lines that state the pace and the time of the whole run, and on how many nodes it can train."""
        config, batches = self.config, self.in_batches(self.config.max_duration)
        logged = (self.logged[f"throughput/{name}"] for name in ("samples_per_sec", "data_wait"))
        paces, waits = ([*series.values()][-self.intervals :] for series in logged)
        pace = harmonic_mean(paces)
        waiting = pace * fmean(map(truediv, waits, paces))  # of the time, not of the intervals
        *_, seconds = self.logged.get("time/zero_shot_retrieval", {0: 0.0}).values()
        retrievals = batches // self.in_batches(config.retrieval.interval) if seconds else 0
        evaluating = retrievals * seconds / 3600
        hours = batches * config.global_train_batch_size / pace / 3600 + evaluating
        return (
            f"pace          {pace:,.0f} {MODALITIES[self.data['modality']].unit}/s on {self.ranks} rank(s), "
            f"{waiting:.0%} of the time waiting for data\n"
            f"time          {hours:.1f} h ({hours * self.ranks:.1f} "
            f"{'GPU' if torch.cuda.is_available() else 'rank'}-hours) for {batches:,} batches, "
            f"including {evaluating:.1f} h for retrievals ({retrievals})\n"
            f"nodes         any number that divides num_canonical_nodes, {config.train_loader.num_canonical_nodes}"
        )

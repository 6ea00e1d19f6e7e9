"""Rehearse a run: check rights and disk space, train it small with a SIGTERM and a resume, compute its needs."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any
from uuid import uuid4

import torch
from composer.core import Time, TimeUnit
from composer.utils import maybe_create_object_store_from_uri
from composer.utils.file_helpers import list_remote_objects
from composer.utils.object_store import ObjectStore, S3ObjectStore
from torch._C._distributed_c10d import TCPStore  # torch.distributed's, which pyright does not see there
from typing_extensions import Self

from d2v_composer.builders.data import count_samples, room_of_node
from d2v_composer.builders.loggers import check_logging_servers
from d2v_composer.builders.models import build_labeled_sets, build_teacher, check_fit
from d2v_composer.callbacks.checkpointing import IMPATIENT_CLIENT
from d2v_composer.checkpoints.load import load_any, load_student, save_student
from d2v_composer.checkpoints.safe_load import LATEST
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.index import check_room, fetch_index, read_image_index
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.system.addresses import Address, RunFolder
from d2v_composer.system.errors import InputError, RunError, reason, writing
from d2v_composer.system.files import existing_folder
from d2v_composer.system.processes import die_with_parent, if_interrupted

FOLDER = ".d2v-preflight"
"""Folder of a rehearsal, in the run's folder and cache; removed at the start and at the end."""
STOP_AFTER_BATCHES = 3
BATCHES_AFTER_RESUME = 20  # the pace is logged every ten batches; the first ten hold torch.compile
IMAGES_PER_SET = 128
SHUFFLED_SAMPLES = 2048
# Seconds without a printed line: longer than compiling, and than the timeout of collectives.
STALL_SECONDS, STOP_SECONDS = 1800.0, 120.0
OTHER_NODES = timedelta(hours=1)  # the slowest may still be fetching the teacher
BYTES_PER_WEIGHT = 3 * 4  # the weight and Adam's two moments in float32
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

log = logging.getLogger(__name__)


class Node:
    """This node among those of the run, one process each.

    The nodes share one of torch's stores, not a process group: the devices stay free for the rehearsal.
    """

    def __init__(self) -> None:
        """Read the variables of Composer's launcher; without it, one node of one rank."""
        self.ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // self.ranks
        self.rank = int(os.environ.get("NODE_RANK", "0"))
        self.store = None
        if self.num_nodes > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = TCPStore(address, port, self.num_nodes, is_master=self.rank == 0, timeout=OTHER_NODES)

    def exchange(self, key: str, text: str) -> list[str]:
        """Send a text to the other nodes under a new key, wait for theirs, and return all in the nodes' order."""
        if self.store is None:
            return [text]
        self.store.set(f"{key}/{self.rank}", text)
        return [self.store.get(f"{key}/{rank}").decode() for rank in range(self.num_nodes)]

    def check(self, name: str, look: Callable[[], str]) -> bool:
        """Make a check on every node and print its row.

        Args:
            name: The row's name, a new one each time.
            look: Returns what it found; raises if the run would fail.

        Returns:
            True if the check passed on all nodes.
        """
        found, fault = "", ""
        try:
            found = look()
        except Exception as error:  # the run would fail with it too
            log.debug("%s", name, exc_info=True)
            fault = reason(error)
        faults = [(rank, each) for rank, each in enumerate(self.exchange(name, fault)) if each]
        if not faults:
            print_row(name, "ok", found)
        for rank, each in faults:
            print_row(name, "FAILED", each if self.num_nodes == 1 else f"node {rank}: {each}")
        return not faults


def print_row(name: str, verdict: str, found: str) -> None:
    print(f"{name:14} {verdict:7} {found}", flush=True)


def preflight(argv: Sequence[str], config: TrainConfig, train_script: Path) -> bool:
    """Check and rehearse a run, and print a table and what the whole run will need.

    Call it in one process of each node, before a process group exists.

    Args:
        argv: The YAML and its overrides.
        config: The same, as read.
        train_script: ``recipes/train.py``.

    Returns:
        True if all checks passed on all nodes.
    """
    node = Node()
    print_row("check", "verdict", "found")
    checks = Checks(config, node)
    passed = [node.check(name, look) for name, look in checks.by_name().items()]
    ready = all(passed)
    with Rehearsal(argv, config, train_script, node) as rehearsal, if_interrupted(rehearsal.close):
        for name, phase in rehearsal.phases().items():
            if ready:
                ready = node.check(name, phase)
            else:
                print_row(name, "skipped", "fix the failure above first")
        if ready and node.rank == 0:
            print("\nThe whole run will need (if nothing else used the machine during the rehearsal):")
            print("\n".join(needs(checks, read_jsonl(rehearsal.log), rehearsal.checkpoint_bytes)), flush=True)
    node.exchange("end", "")  # node 0 holds the store until all have read it
    return ready


class Checks:
    """What the short run cannot show, or shows only one fault at a time.

    Each check returns what it found, and keeps what :func:`needs` reads.
    """

    def __init__(self, config: TrainConfig, node: Node) -> None:
        self.config, self.node = config, node
        self.shards: list[dict[str, Any]] = []
        self.num_trained = 0
        self.image_size, self.interpolation = 224, "bicubic"
        self.num_labeled: dict[str, int] = {}

    def by_name(self) -> dict[str, Callable[[], str]]:
        return {
            "models": self.check_models,
            "data": self.check_data,
            "disk space": self.check_disk_space,
            "save_folder": lambda: check_rights(self.config.save_folder),
            "labeled sets": self.check_labeled_sets,
            "loggers": self.check_loggers,
        }

    def check_models(self) -> str:
        teacher = build_teacher(self.config.teacher)
        check_fit(self.config, teacher)
        student = teacher.build_student(**vars(self.config.student))
        self.image_size, self.interpolation = teacher.config.image_size, teacher.config.interpolation
        self.num_trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in teacher.parameters())
        return f"teacher of {total / 1e6:.1f} M parameters, student of {self.num_trained / 1e6:.1f} M"

    def check_data(self) -> str:
        """Read the index, and find every shard of it: here in its full size, or by name in the store."""
        loader = self.config.train_loader
        options: dict[str, Any] = {"option": "train_loader.column", "source": loader.remote or loader.local}
        if loader.remote is None:
            self.shards = read_image_index(Path(loader.local), loader.column, **options)
            return f"{loader.local}: {count_samples(self.shards)} samples in {len(self.shards)} shards"
        with TemporaryDirectory() as folder:
            fetch_index(loader.remote, Path(folder))
            self.shards = read_image_index(Path(folder), loader.column, shards_may_be_missing=True, **options)
        stored = {key.rsplit("/", 1)[-1] for key in list_remote_objects(f"{loader.remote.rstrip('/')}/")}
        names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in self.shards]
        missing = [name for name in names if name.rsplit("/", 1)[-1] not in stored]
        if missing:
            raise InputError(f"{loader.remote}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
        return f"{loader.remote}: {count_samples(self.shards)} samples in {len(self.shards)} shards, all in the store"

    def check_disk_space(self) -> str:
        """Compare the free space with what this node's cache and checkpoints need."""
        found = []
        if self.config.train_loader.remote is not None and self.shards:
            need = room_of_node(self.config, self.shards, self.node.num_nodes)
            check_room([need])
            found.append(f"cache in {need.local}: {need.bytes / 1e9:.1f} GB of {need.free / 1e9:.1f} GB free")
        if self.config.save_folder is not None:
            folder = RunFolder.parse(self.config.save_folder).local
            kept = max(self.config.save_num_checkpoints_to_keep, 1) + 1  # the next is written before the oldest goes
            needed = kept * self.num_trained * BYTES_PER_WEIGHT
            free = shutil.disk_usage(existing_folder(folder)).free
            if needed > free:
                raise InputError(
                    f"{folder}: {kept} checkpoints need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            found.append(f"{kept} checkpoints in {folder}: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
        return "; ".join(found) or "nothing is stored here"

    def check_labeled_sets(self) -> str:
        """Load the labeled sets; download CIFAR if the run would."""
        sets = build_labeled_sets(self.config.retrieval, self.image_size, self.interpolation)
        for name, labeled in sets.items():
            if max(self.config.retrieval.ks) > min(labeled.num_images):
                raise InputError(f"retrieval.ks: {name} has {min(labeled.num_images)} images in its smaller split")
        self.num_labeled = {name: sum(labeled.num_images) for name, labeled in sets.items()}
        return ", ".join(f"{name}: {count} images" for name, count in self.num_labeled.items()) or "none"

    def check_loggers(self) -> str:
        """Ask the servers of W&B and MLflow from the first node, which logs."""
        if self.node.rank == 0:
            check_logging_servers(self.config)
        return ", ".join(name for name, arguments in self.config.loggers.items() if arguments is not None) or "none"


def check_rights(save_folder: str | None) -> str:
    """Write a small file into a ``save_folder``, which may not exist yet; in S3 also list, read and delete it.

    boto3's error names the operation that is denied.
    """
    if save_folder is None:
        return "none"
    store, key = open_store(save_folder), f"{Address.parse(save_folder).path}/.preflight-{uuid4().hex}".lstrip("/")
    if store is None:
        with writing(save_folder):
            TemporaryFile(dir=existing_folder(Path(save_folder))).close()
        return f"{save_folder}: writable"
    if not isinstance(store, S3ObjectStore):  # Composer could not delete the file
        return f"{save_folder}: the rehearsal writes and reads"
    target = {"Bucket": store.bucket, "Key": key}
    store.client.put_object(**target, Body=b"preflight")
    store.client.list_objects_v2(Bucket=store.bucket, Prefix=key)
    store.client.get_object(**target)
    store.client.delete_object(**target)
    return f"{save_folder}: write, list, read, delete"


def open_store(address: str) -> ObjectStore | None:
    """Return the object store of an address; ``None`` for a local path."""
    backend, bucket, _ = Address.parse(address)
    if backend == "s3":
        return S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT))
    return maybe_create_object_store_from_uri(address)


class Command:
    """A command in a session of its own, with the signals of a user's shell; it dies with this process."""

    def __init__(self, arguments: Sequence[str]) -> None:
        def start() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            die_with_parent()

        self.output = TemporaryFile()  # noqa: SIM115 (as long as this object)
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            preexec_fn=start,
        )

    def wait(self, until: Callable[[], bool] = lambda: False, stall_seconds: float = STALL_SECONDS) -> int | None:
        """Wait until a condition holds, or the command exits or prints nothing for a time; return its exit status."""
        size, since = -1, time.monotonic()
        while self.process.poll() is None and not until() and time.monotonic() - since < stall_seconds:
            if (printed := os.fstat(self.output.fileno()).st_size) != size:
                size, since = printed, time.monotonic()
            time.sleep(0.2)
        return self.process.poll()

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to every process of the command, as systemd and SLURM do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def fault(self, what: str) -> RunError:
        """Print the command's last lines, and return the error."""
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()[-15:]
        print("\n".join(f"    | {line}" for line in lines), file=sys.stderr, flush=True)
        return RunError(f"{what}: {next((line for line in reversed(lines) if 'rror' in line), 'see its last lines')}")


class Rehearsal:
    """The user's run, made small, in folders of its own. Each phase returns what it did, and raises if it failed."""

    def __init__(self, argv: Sequence[str], config: TrainConfig, train_script: Path, node: Node) -> None:
        self.argv, self.config, self.train_script, self.node = argv, config, train_script, node
        self.temporary = TemporaryDirectory()
        self.save_folder = f"{(config.save_folder or self.temporary.name).rstrip('/')}/{FOLDER}"
        self.folder = RunFolder.parse(self.save_folder).local
        self.cache = Path(config.train_loader.local, FOLDER)
        self.log = self.folder / "log.jsonl"  # node 0's
        self.made_in = {each: existing_folder(each).absolute() for each in (self.folder, self.cache)}
        self.commands: list[Command] = []
        self.batch = self.checkpoint_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs, and remove the files."""
        for command in self.commands:
            command.signal(signal.SIGKILL)
        if self.commands:
            self.remove()
        self.temporary.cleanup()

    def remove(self) -> None:
        """Remove the rehearsal's files, and the folders above them that it made."""
        for folder, existing in self.made_in.items():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # a parent is not empty
                for parent in folder.absolute().parents:
                    if parent == existing:
                        break
                    parent.rmdir()
        store, prefix = open_store(self.save_folder), Address.parse(self.save_folder).path
        if self.node.rank == 0 and isinstance(store, S3ObjectStore):
            for key in store.list_objects(f"{prefix}/"):
                store.client.delete_object(Bucket=store.bucket, Key=key)

    def phases(self) -> dict[str, Callable[[], str]]:
        return {
            "training": self.train,
            "SIGTERM": self.stop,
            "resume": self.resume,
            "export": self.export,
        }

    def train(self) -> str:
        """Train a few batches, with retrieval and health at every batch."""
        overrides = ["retrieval.interval=1ba"]
        if self.config.callbacks.get("health") is not None:
            overrides.append("callbacks.health.interval=1ba")
        self.remove()  # what a killed preflight left
        command = self.start("max_duration=500ba", *overrides)
        if self.node.rank == 0:
            command.wait(lambda: self.num_batches() >= STOP_AFTER_BATCHES)
        trained = int(self.node.exchange("trained", str(self.num_batches()))[0])
        if trained < STOP_AFTER_BATCHES:
            raise command.fault(f"{trained} of {STOP_AFTER_BATCHES} batches were trained")
        return f"{trained} batches, with retrieval and health at each"

    def stop(self) -> str:
        """Send SIGTERM to all processes, which must save and exit with 143."""
        [command] = self.commands
        command.signal(signal.SIGTERM)
        status = command.wait(stall_seconds=STOP_SECONDS)
        self.batch = int(self.node.exchange("stopped", str(self.num_batches()))[0])
        if status != 128 + signal.SIGTERM:
            raise command.fault(f"status {status} instead of 143 within {STOP_SECONDS:.0f} s of SIGTERM")
        return f"all processes exited with status 143 after batch {self.batch}"

    def resume(self) -> str:
        """Go on with the intervals of the YAML, long enough to measure the pace."""
        if RunFolder.parse(self.save_folder).address is not None:
            for copy in self.folder.glob("*.pt"):  # the store's must do, as on another machine
                copy.unlink()
        size = self.log.stat().st_size if self.log.is_file() else 0
        last = self.batch + BATCHES_AFTER_RESUME
        command = self.start(f"max_duration={last}ba", "callbacks.memory_monitor={}")
        if status := command.wait():
            raise command.fault(f"the resumed run failed with status {status}")
        if self.node.rank == 0:
            entries = map(json.loads, self.log.read_bytes()[size:].splitlines())
            batches = [entry["step"] for entry in entries if "loss/train/total" in entry]
            if batches != list(range(self.batch, last)):
                raise RunError(f"trained batches {batches[:1]} to {batches[-1:]} instead of {self.batch} to {last - 1}")
            logged = read_jsonl(self.log)
            for name, labeled in self.config.retrieval.datasets.items():
                if labeled is not None and f"metrics/{name}/bank_train/top{self.config.retrieval.ks[0]}" not in logged:
                    raise RunError(f"no accuracy of {name} was logged")
            self.checkpoint_bytes = (self.folder / LATEST).stat().st_size
        return f"from batch {self.batch}, {BATCHES_AFTER_RESUME} more batches, then retrieval"

    def export(self) -> str:
        """Export the student of the newest checkpoint, and load it again."""
        if self.node.rank != 0:
            return "on node 0"
        out = Path(self.temporary.name, "student.safetensors")
        student, _ = load_any(str(self.folder / LATEST), teacher_path=self.config.teacher.checkpoint)
        assert student is not None  # a checkpoint has one
        save_student(student, out)
        load_student(out)
        return f"{out.stat().st_size / 1e6:.1f} MB, loads without the teacher"

    def num_batches(self) -> int:
        return len(read_jsonl(self.log).get("loss/train/total", {})) if self.log.is_file() else 0

    def start(self, *overrides: str) -> Command:
        """Start the run with overrides that keep it apart from the user's, and let it read little."""
        loader, node = self.config.train_loader, self.node
        launcher = [sys.executable]
        if node.num_nodes * node.ranks > 1:
            launcher += ["-m", "composer.cli", "--nproc", str(node.ranks)]
        if node.num_nodes > 1:
            with socket() as probe:
                probe.bind(("", 0))
                port = node.exchange(f"port {len(self.commands)}", str(probe.getsockname()[1]))[0]
            launcher += ["--world_size", str(node.num_nodes * node.ranks), "--node_rank", str(node.rank)]
            launcher += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", port]
        own = [
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
            "report=false",
            f"retrieval.max_images={IMAGES_PER_SET}",
            f"train_loader.shuffle_block_size={min(loader.shuffle_block_size, SHUFFLED_SAMPLES)}",
        ]
        if loader.remote is not None:
            own.append(f"train_loader.local={self.cache}")
        self.commands.append(Command([*launcher, str(self.train_script), *self.argv, *own, *overrides]))
        return self.commands[-1]


def needs(checks: Checks, logged: Mapping[str, Mapping[int, float]], checkpoint_bytes: int) -> Iterator[str]:
    """Yield what the whole run will need, a line each.

    Args:
        checks: The run, its shards and its labeled sets.
        logged: The rehearsal's log.
        checkpoint_bytes: The size of a checkpoint.
    """

    def last(key: str) -> float:
        values = logged.get(key, {})
        return values[max(values)] if values else 0.0

    config, num_ranks = checks.config, checks.node.num_nodes * checks.node.ranks
    batch_size = config.global_train_batch_size
    per_epoch = count_samples(checks.shards) // batch_size
    batches = in_batches(config.max_duration, 0, per_epoch)
    pace, wait = last("throughput/images_per_sec"), last("throughput/data_wait")
    yield f"pace          {pace:,.0f} images/s on {num_ranks} rank(s), {wait:.0%} of it waiting for data"

    evaluations = batches // in_batches(config.retrieval.interval, batches, per_epoch) if checks.num_labeled else 0
    larger = sum(checks.num_labeled.values()) / (2 * IMAGES_PER_SET * max(len(checks.num_labeled), 1))
    evaluating = evaluations * last("time/zero_shot_retrieval") * max(larger, 1.0)
    hours = (batches * batch_size / pace + evaluating) / 3600
    yield (
        f"time          {hours:.1f} h for {batches:,} batches, {evaluating / 3600:.1f} h of it in {evaluations} "
        f"retrievals (at most): {hours * num_ranks:.1f} {'GPU' if torch.cuda.is_available() else 'rank'}-hours"
    )

    saved = batches // in_batches(config.save_interval, batches, per_epoch) + 1
    kept = config.save_num_checkpoints_to_keep
    most = saved if kept < 0 else min(kept + 1, saved)
    yield (
        f"checkpoints   {saved} of {checkpoint_bytes / 1e6:,.0f} MB, {'all' if kept < 0 else kept} kept: "
        f"{checkpoint_bytes * most / 1e9:.1f} GB at most at a time"
    )
    if config.train_loader.remote is not None:
        gigabytes = sum(shard["raw_data"]["bytes"] for shard in checks.shards) / 1e9
        how = "once" if config.train_loader.cache_limit is None else "in each epoch, less what cache_limit holds,"
        yield f"store         {gigabytes:,.1f} GB, read {how} by the nodes that need it"
    if peak := max(logged.get("memory/peak_reserved_mem", {0: 0.0}).values()):
        size = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield f"GPU memory    {peak:.1f} GB of {size:.0f} GB reserved at the peak"


def in_batches(text: str, total: int, per_epoch: int) -> int:
    """Convert a duration to batches, at least one; ``dur`` is a share of ``total``."""
    time = Time.from_timestring(text)
    if time.unit == TimeUnit.EPOCH:
        return max(int(time.value) * per_epoch, 1)
    if time.unit == TimeUnit.DURATION:
        return max(round(time.value * total), 1)
    return max(int(time.value), 1)

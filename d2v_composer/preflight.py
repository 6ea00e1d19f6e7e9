"""Make the checks of a preflight in their order, and print one row for each."""

import inspect
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NamedTuple
from uuid import uuid4

import psutil
import torch
from composer.core import Time, TimeUnit
from composer.utils import maybe_create_object_store_from_uri
from composer.utils.file_helpers import list_remote_objects
from composer.utils.object_store import S3ObjectStore
from PIL import Image
from streaming.base.util import bytes_to_int
from torch._C._distributed_c10d import TCPStore  # torch.distributed's, which pyright does not see there
from typing_extensions import Self

from d2v_composer.builders.data import build_transform, count_samples, room_of_node, shared_memory_of_node
from d2v_composer.builders.loggers import check_logging_servers
from d2v_composer.builders.models import build_labeled_sets, build_teacher
from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks.checkpointing import IMPATIENT_CLIENT
from d2v_composer.callbacks.yaml_names import CALLBACKS
from d2v_composer.checkpoints.load import load_any, load_student, save_student
from d2v_composer.checkpoints.resume import LATEST, find_newest_checkpoint
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.images import decode_rgb, sample_rng
from d2v_composer.data.index import check_room, fetch_index, keep_encoded, read_image_index
from d2v_composer.data.labeled import LabeledSet
from d2v_composer.data.shards import Shards
from d2v_composer.data.streaming import check_shared_memory
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.models.encoder import ImageSize
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.addresses import Address, RunFolder
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.files import existing_folder
from d2v_composer.system.machine import describe_machine, find_wrong_packages

# MERGED FROM d2v_composer/preflight.py: Check the permissions that a run needs in its ``save_folder``.


def check_permissions(save_folder: str) -> str:
    """Write, list, read and delete a small file in a ``save_folder``, and return one line about it.

    Args:
        save_folder: A folder, which may not exist yet, or an address in an object store.

    Raises:
        InputError: A permission is missing; the message names it.
    """
    backend, bucket, prefix = Address.parse(save_folder)
    name = f".preflight-{uuid4().hex}"
    if not backend:
        return _check_folder(Path(save_folder), name)
    key = f"{prefix}/{name}".lstrip("/")
    if backend == "s3":
        client = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT)).client
        _try_each(
            save_folder,
            write=lambda: client.put_object(Bucket=bucket, Key=key, Body=b"preflight"),
            list=lambda: client.list_objects_v2(Bucket=bucket, Prefix=key),
            read=lambda: client.get_object(Bucket=bucket, Key=key)["Body"].read(),
            delete=lambda: client.delete_object(Bucket=bucket, Key=key),
        )
        return f"{save_folder}: write, list, read, delete"
    store = maybe_create_object_store_from_uri(save_folder)
    assert store is not None  # the address has a backend
    _try_each(save_folder, list=lambda: store.list_objects(prefix))
    return f"{save_folder}: list; the rehearsal writes and reads; nothing can be deleted from {backend}://"


def _check_folder(folder: Path, name: str) -> str:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())  # maybe a file
    probe = existing / name
    _try_each(
        str(folder),
        write=lambda: probe.write_bytes(b"preflight"),
        list=lambda: list(existing.iterdir()),
        read=probe.read_bytes,
        delete=probe.unlink,
    )
    return f"{folder}: write, list, read, delete"


def _try_each(place: str, **attempts: Callable[[], object]) -> None:
    for permission, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            raise InputError(f"{place}: no permission to {permission} ({reason(error)})") from error


def remove_prefix(address: str) -> None:
    """Delete everything below an address in S3; in other stores, do nothing."""
    backend, bucket, prefix = Address.parse(address)
    if backend != "s3":
        return
    store = S3ObjectStore(bucket, client_config=dict(IMPATIENT_CLIENT))
    for key in store.list_objects(f"{prefix}/"):
        store.client.delete_object(Bucket=bucket, Key=key)


# MERGED FROM d2v_composer/preflight.py: Exchange texts between the nodes of a preflight, one process each, without

# The slowest node may still be fetching the teacher or CIFAR.
RETRY_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Nodes:
    """This node and the others of the run.

    They share a store of torch, not a process group: the preflight must not hold the devices that the rehearsal needs.
    """

    rank: int
    num_nodes: int
    ranks_per_node: int
    store: TCPStore | None
    """``None`` for one node."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables of Composer's launcher; one node of one rank without it."""
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // ranks_per_node
        rank = int(os.environ.get("NODE_RANK", "0"))
        if num_nodes == 1:
            return cls(0, 1, ranks_per_node, None)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls(
            rank,
            num_nodes,
            ranks_per_node,
            TCPStore(address, port, num_nodes, is_master=rank == 0, timeout=RETRY_TIMEOUT),
        )

    def exchange(self, key: str, text: str) -> list[str]:
        """Send a text to the other nodes, wait for theirs, and return all in the order of the nodes.

        Args:
            key: A name, used once in a preflight.
            text: This node's text.
        """
        if self.store is None:
            return [text]
        self.store.set(f"{key}/{self.rank}", text)
        return [self.store.get(f"{key}/{rank}").decode() for rank in range(self.num_nodes)]

    def leave(self) -> None:
        """Leave the exchange. Node 0, which holds the store, waits for the others."""
        if self.store is None:
            return
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"left/{rank}" for rank in range(self.num_nodes)])


# MERGED FROM d2v_composer/preflight.py: Run a command next to the preflight: wait for it, signal it, measure its

POLL_SECONDS = 0.2
MEASURE_SECONDS = 1.0
LINES_SHOWN = 15


class RunningCommand:
    """A command in a process group of its own.

    Args:
        process: The leader of the group.
        output: The file that receives the output.

    Attributes:
        peak_bytes: The most memory that its processes held at a time, shared pages counted once (PSS).
    """

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self.process = process
        self.output = output
        self.peak_bytes = 0
        self.measured_at = 0.0

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, the command ends, or it prints nothing for a time.

        Args:
            until: The condition.
            seconds: The longest time without output.

        Returns:
            Whether the condition holds.
        """
        size, since = -1, time.monotonic()
        while not until():
            if self.process.poll() is not None:
                return until()
            if (printed := os.fstat(self.output.fileno()).st_size) != size:
                size, since = printed, time.monotonic()
            elif time.monotonic() - since > seconds:
                return False
            self._measure()
            time.sleep(POLL_SECONDS)
        return True

    def wait_for_end(self, seconds: float) -> int | None:
        """Wait for the end and return the exit status; ``None`` if the command is still running."""
        self.wait(lambda: self.process.poll() is not None, seconds)
        return self.process.poll()

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to every process of the command, as systemd and SLURM do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def last_lines(self) -> list[str]:
        """Return the end of the output."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace").splitlines()[-LINES_SHOWN:]

    def _measure(self) -> None:
        if time.monotonic() - self.measured_at < MEASURE_SECONDS:
            return
        self.measured_at = time.monotonic()
        total = 0
        with suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            for each in (first, *first.children(recursive=True)):
                with suppress(psutil.Error):  # the process has just ended
                    total += each.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[RunningCommand]:
    """Run a command while the block lasts; then kill its remaining processes."""
    with TemporaryFile() as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        command = RunningCommand(process, output)
        try:
            yield command
        finally:
            command.signal(signal.SIGKILL)
            process.wait()


# MERGED FROM d2v_composer/preflight.py: Checks that need no training: versions, machine, teacher, data, disk

OPEN_FILES = 1024  # sockets, shards and worker pipes of one process; the usual default
SHARD_TIMEOUT = 30.0
DECODING_SECONDS = 1.0
FLOAT32_BYTES, TENSORS_PER_WEIGHT = 4, 3  # a weight and Adam's two moments


def check_versions() -> str:
    """Compare the installed packages with the requirements of this one.

    Raises:
        InputError: A package is missing or has another version.
    """
    if wrong := list(find_wrong_packages()):
        raise InputError("; ".join(wrong))
    return f"torch {metadata.version('torch')}, Composer {metadata.version('mosaicml')}, and the rest as required"


@dataclass
class Checks:
    """The checks of one run on one node.

    Each method returns what it found as one line, raises if the run would fail, and keeps what later ones need.
    """

    config: TrainConfig
    nodes: Nodes
    teacher: Teacher = field(init=False)
    image_size: ImageSize = 224
    interpolation: str = "bicubic"
    num_trained: int = 0
    """Trained parameters."""
    shards: list[dict[str, Any]] = field(init=False)
    """As the index of the training images lists them."""
    decoded_per_core: float = field(init=False)
    """Images that one core decodes and augments per second."""
    sets: Mapping[str, LabeledSet] = field(init=False)

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard["raw_data"]["bytes"] for shard in self.shards)

    def check_machine(self) -> str:
        """Compare the number of GPUs with that of ranks, and check the limit of open files."""
        machine, num_gpus, nodes = describe_machine(), torch.cuda.device_count(), self.nodes
        if num_gpus and nodes.ranks_per_node > num_gpus:
            raise InputError(f"{nodes.ranks_per_node} ranks on {num_gpus} GPUs")
        if 0 <= (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < OPEN_FILES:
            raise InputError(f"a process may open {limit} files, {OPEN_FILES} are needed (ulimit -n)")
        devices = f"{num_gpus} × {machine['gpu']}" if num_gpus else f"no GPU, {machine['cpu']}"
        ranks = f"{nodes.num_nodes} node(s) × {nodes.ranks_per_node} rank(s)"
        return f"{devices}, {machine['cores']} cores, {machine['memory_gib']} GiB, {ranks}"

    def check_teacher(self) -> str:
        """Load the teacher."""
        self.teacher = build_teacher(self.config.teacher)
        millions = sum(parameter.numel() for parameter in self.teacher.parameters()) / 1e6
        sizes = self.teacher.config
        self.image_size, self.interpolation = sizes.image_size, sizes.interpolation
        return f"{millions:.1f} M parameters, {sizes.depth} blocks of {sizes.embed_dim}, {sizes.image_size} px"

    def check_student(self) -> str:
        """Build the student."""
        student = self.teacher.build_student(**asdict(self.config.student))
        self.num_trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        return f"{self.num_trained / 1e6:.1f} M trained parameters"

    def check_data(self) -> str:
        """Read the index; of a local data set, find every shard in its full size."""
        loader = self.config.train_loader
        source = loader.remote or loader.local
        with TemporaryDirectory() as folder:
            if loader.remote is not None:
                fetch_index(loader.remote, Path(folder))
            self.shards = read_image_index(
                Path(loader.local if loader.remote is None else folder),
                loader.column,
                option="train_loader.column",
                source=source,
                shards_may_be_missing=loader.remote is not None,
            )
        num_samples = count_samples(self.shards)
        if num_samples < self.config.global_train_batch_size:
            raise InputError(f"{num_samples} samples, fewer than global_train_batch_size")
        return f"{source}: {num_samples} samples in {len(self.shards)} shards, {self.num_bytes / 1e9:.2f} GB"

    def check_listing(self) -> str:
        """List the store, and find every shard of the index there."""
        remote = self.config.train_loader.remote
        if remote is None:
            return "all shards of the index are here"
        try:
            keys = list_remote_objects(f"{remote.rstrip('/')}/")
        except Exception as error:
            raise InputError(f"{remote}: no permission to list ({reason(error)})") from error
        stored = {key.rsplit("/", 1)[-1] for key in keys}
        names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in self.shards]
        missing = [name for name in names if name.rsplit("/", 1)[-1] not in stored]
        if missing:
            raise InputError(f"{remote}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
        return f"all {len(names)} shards of the index are in the store"

    def check_shards(self) -> str:
        """Fetch and verify a shard of each kind (compression and encodings), and measure the pace of decoding."""
        loader = self.config.train_loader
        kinds = {
            (shard["compression"], *shard["column_encodings"]): i for i, shard in reversed([*enumerate(self.shards)])
        }
        with TemporaryDirectory() as folder:
            local = loader.local if loader.remote is None else folder
            shards = Shards(local=local, remote=loader.remote, timeout=SHARD_TIMEOUT)
            keep_encoded(shards.readers, loader.column)
            rates = []
            for shard_id in kinds.values():
                shards.prepare(shard_id)
                rates.append(self._measure_decoding(shards.readers[shard_id]))
        self.decoded_per_core = min(rates)
        names = ", ".join(self.shards[i]["raw_data"]["basename"] for i in kinds.values())
        return f"{names}: verified; one core decodes {self.decoded_per_core:.0f} images/s"

    def check_shared_memory(self) -> str:
        """Compare the free shared memory with what the data of this node's ranks needs."""
        needed = shared_memory_of_node(self.config, self.shards, self.image_size)
        if (fault := check_shared_memory(needed)) is not None:
            raise InputError(fault)
        return f"{needed / 1e6:,.0f} MB for the data of this node's ranks"

    def check_room(self) -> str:
        """Compare the free disk space with what this node's cache and checkpoints need."""
        found = []
        if self.config.train_loader.remote is not None:
            need = room_of_node(self.config, self.shards, self.nodes.num_nodes)
            check_room([need])
            found.append(f"cache in {need.local}: {need.bytes / 1e9:.1f} GB of {need.free / 1e9:.1f} GB free")
        if (run_folder := find_run_folder(self.config)) is not None:
            folder = run_folder.local
            kept = max(self.config.save_num_checkpoints_to_keep, 1) + 1  # the next is written before the oldest goes
            needed = kept * self.num_trained * FLOAT32_BYTES * TENSORS_PER_WEIGHT
            free = shutil.disk_usage(existing_folder(folder)).free
            if needed > free:
                raise InputError(
                    f"{folder}: {kept} checkpoints need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            found.append(f"checkpoints in {folder}: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
        return "; ".join(found) or "nothing is stored here"

    def check_save_folder(self) -> str:
        """Check the permissions in the run's folder."""
        return "none" if self.config.save_folder is None else check_permissions(self.config.save_folder)

    def check_labeled_sets(self) -> str:
        """Load the labeled sets of the retrieval; fetch CIFAR if the run would."""
        self.sets = build_labeled_sets(self.config.retrieval, self.image_size, self.interpolation)
        for name, labeled in self.sets.items():
            if max(self.config.retrieval.ks) > min(labeled.num_images):
                raise InputError(f"retrieval.ks: {name} has {min(labeled.num_images)} images in its smaller split")
        found = [f"{name}: {' + '.join(map(str, labeled.num_images))} images" for name, labeled in self.sets.items()]
        return "; ".join(found) or "none"

    def check_loggers(self) -> str:
        """Ask the servers of W&B and MLflow on the first node, which logs."""
        if self.nodes.rank == 0:
            check_logging_servers(self.config)
        return ", ".join(name for name, arguments in self.config.loggers.items() if arguments is not None) or "none"

    def _measure_decoding(self, reader: Any) -> float:
        loader = self.config.train_loader
        transform = build_transform(loader, self.image_size, self.interpolation)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a data worker
        try:
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < DECODING_SECONDS:
                i = done % reader.samples
                stored, source = reader[i][loader.column], f"sample {i}"
                image = decode_rgb(stored, source) if isinstance(stored, Image.Image) else stored
                transform(image, sample_rng(self.config.seed, 0, i), source)
                done += 1
            return done / (time.perf_counter() - start)
        finally:
            torch.set_num_threads(threads)


# MERGED FROM d2v_composer/preflight.py: Run the user's training command, small: start it, stop it by SIGTERM,

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
        """Find an accuracy of every labeled set in the log."""
        logged = read_jsonl(self.log)
        sets = [name for name, labeled in self.config.retrieval.datasets.items() if labeled is not None]
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


# MERGED FROM d2v_composer/preflight.py: Compute the needs of a whole run from the pace of its rehearsal.

HOUR = 3600


class Measured(NamedTuple):
    """The figures of the rehearsal."""

    images_per_second: float
    """The pace of all ranks together, without evaluations."""
    data_wait: float
    """The share of the time spent waiting for images, from 0 to 1."""
    evaluation_seconds: float
    """The time of one retrieval of the small sets."""
    gpu_gigabytes: float
    """The most that the allocator of one GPU reserved; 0 without a GPU."""
    process_bytes: int
    """The most memory that this node's processes held."""
    checkpoint_bytes: int

    @classmethod
    def from_log(cls, logged: Mapping[str, Mapping[int, float]], process_bytes: int, checkpoint: Path) -> "Measured":
        """Read the figures of a log, and the size of a checkpoint."""

        def values(key: str) -> list[float]:
            return list(logged.get(key, {0: 0.0}).values())

        return cls(
            values("throughput/images_per_sec")[-1],
            values("throughput/data_wait")[-1],
            values("time/zero_shot_retrieval")[-1],
            max(values("memory/peak_reserved_mem")),
            process_bytes,
            checkpoint.stat().st_size,
        )


def needs(checks: Checks, measured: Measured) -> Iterator[str]:
    """Yield what the whole run will need, a line each."""
    config, nodes, sets = checks.config, checks.nodes, checks.sets
    batch_size, num_ranks = config.global_train_batch_size, nodes.num_nodes * nodes.ranks_per_node
    per_epoch = count_samples(checks.shards) // batch_size
    batches = in_batches(config.max_duration, 0, per_epoch)
    pace = measured.images_per_second
    yield f"pace          {pace:,.0f} images/s on {num_ranks} rank(s), {measured.data_wait:.0%} of it waiting for data"

    evaluations = batches // in_batches(config.retrieval.interval, batches, per_epoch) if sets else 0
    larger = sum(sum(each.num_images) for each in sets.values()) / (2 * IMAGES_PER_SET * len(sets)) if sets else 0.0
    evaluating = evaluations * measured.evaluation_seconds * max(larger, 1.0)
    hours = (batches * batch_size / pace + evaluating) / HOUR
    device = "GPU" if torch.cuda.is_available() else "rank"
    yield (
        f"time          {hours:.1f} h for {batches:,} batches, {evaluating / HOUR:.1f} h of it in {evaluations} "
        f"retrievals (at most): {hours * num_ranks:.1f} {device}-hours"
    )

    saved = batches // in_batches(config.save_interval, batches, per_epoch) + 1
    size, kept = measured.checkpoint_bytes / 1e6, config.save_num_checkpoints_to_keep
    yield (
        f"checkpoints   {saved} of {size:,.0f} MB, {'all' if kept < 0 else kept} kept: "
        f"{size * (saved if kept < 0 else min(kept + 1, saved)) / 1e3:.1f} GB at most at a time"
    )
    if config.train_loader.remote is not None:
        yield f"store         {_from_store(checks, batches / per_epoch)}"
    if measured.gpu_gigabytes:
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield f"GPU memory    {measured.gpu_gigabytes:.1f} GB of {total:.0f} GB reserved at the peak"
    yield f"memory        {measured.process_bytes / 1e9:.1f} GB of this node's processes at the peak"

    needed = pace / (1 - min(measured.data_wait, 0.99)) / nodes.num_nodes
    yield (
        f"data workers  {needed / checks.decoded_per_core:.1f} cores per node decode the {needed:,.0f} images/s that "
        f"its ranks could train on; configured: {config.train_loader.num_workers * nodes.ranks_per_node} worker(s)"
    )


def in_batches(text: str, total: int, per_epoch: int) -> int:
    """Convert a duration to batches, at least one; ``dur`` is a share of ``total``."""
    time = Time.from_timestring(text)
    if time.unit == TimeUnit.EPOCH:
        return max(int(time.value) * per_epoch, 1)
    if time.unit == TimeUnit.DURATION:
        return max(round(time.value * total), 1)
    return max(int(time.value), 1)


def _from_store(checks: Checks, epochs: float) -> str:
    config, total = checks.config, checks.num_bytes
    limit = bytes_to_int(config.train_loader.cache_limit or 0)
    if limit and limit < total:
        return f"up to {total * epochs / 1e9:,.1f} GB read by each node: cache_limit holds a part of an epoch"
    to_come = room_of_node(config, checks.shards, checks.nodes.num_nodes).bytes
    return f"{to_come / 1e9:,.1f} GB read once by each node, {total / 1e9:,.1f} GB in the store"


# The run could start although these failed.
WARNINGS = {"versions", "listing"}
PHASES = ("training", "SIGTERM", "resume", "retrieval", "export")
SEE_LOG = "see the lines above; `python recipes/train.py` with the same arguments shows the whole log"
NAME_WIDTH, VERDICT_WIDTH = 14, 7

log = logging.getLogger(__name__)


class CheckRow(NamedTuple):
    """The result of one check."""

    name: str
    verdict: str
    """``ok``, ``FAILED``, or ``skipped`` after an earlier failure."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        row = f"{self.name:{NAME_WIDTH}} {self.verdict:{VERDICT_WIDTH}} {self.found}"
        return row if not self.remedy else f"{row}\n{'':{NAME_WIDTH + VERDICT_WIDTH + 1}} to do: {self.remedy}"


class CheckTable:
    """The rows of all checks, printed as they are added."""

    def __init__(self) -> None:
        self.rows: list[CheckRow] = []
        print(f"{'check':{NAME_WIDTH}} verdict found", flush=True)

    @property
    def failed(self) -> set[str]:
        """The names of the failed checks."""
        return {row.name for row in self.rows if row.verdict == "FAILED"}

    def add(self, row: CheckRow) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def check(self, name: str, look: Callable[[], str], remedy: str, after: Sequence[str] = ()) -> bool:
        """Make one check and add its row.

        Args:
            name: The name of the row.
            look: Return what was found; raise if the run would fail.
            remedy: The advice after a failure.
            after: Skip the check unless these passed.

        Returns:
            Whether the check passed.
        """
        broken = [row.name for row in self.rows if row.name in after and row.verdict != "ok"]
        if broken:
            self.add(CheckRow(name, "skipped", f"{broken[0]} did not pass"))
            return False
        try:
            self.add(CheckRow(name, "ok", look()))
        except Exception as error:  # the run would fail with it too
            log.debug("%s", name, exc_info=True)
            self.add(CheckRow(name, "FAILED", reason(error), remedy))
            return False
        return True

    def share(self, nodes: Nodes, key: str) -> None:
        """Add the failures of the other nodes."""
        failed = [row for row in self.rows if row.verdict == "FAILED"]
        for rank, rows in enumerate(nodes.exchange(key, json.dumps(failed))):
            if rank != nodes.rank:
                for name, verdict, found, remedy in json.loads(rows):
                    self.add(CheckRow(name, verdict, f"on node {rank}: {found}", remedy))


def preflight(argv: Sequence[str], config: TrainConfig, train_script: Path) -> bool:
    """Check everything that a run needs, rehearse it, and print a table and the needs of the whole run.

    Call it in one process of each node, before a process group exists. It leaves nothing behind.

    Args:
        argv: The YAML and its overrides.
        config: The same, as read.
        train_script: ``recipes/train.py``.

    Returns:
        Whether all checks passed on all nodes.
    """
    nodes = Nodes.from_environment()
    try:
        checks, table = Checks(config, nodes), CheckTable()
        check_before_training(checks, table)
        table.share(nodes, "before the rehearsal")
        if table.failed - WARNINGS:
            for phase in PHASES:
                table.add(CheckRow(phase, "skipped", "fix the failures above first"))
            return False
        with own_folders(argv, config, train_script, nodes) as rehearsal:
            measured = rehearse(rehearsal, table)
            table.share(nodes, "after the rehearsal")
        if measured is not None:
            print("\nThe whole run will need (from the rehearsal, if nothing else used the machine):")
            print("\n".join(needs(checks, measured)), flush=True)
        return not table.failed
    finally:
        nodes.leave()


def check_before_training(checks: Checks, table: CheckTable) -> None:
    """Make all checks that need no training."""
    logging_remedy = "log in or start the server, or turn the logger off: loggers.NAME=null"
    room = "free disk space, or set train_loader.cache_limit or save_num_checkpoints_to_keep"
    rows = (
        ("versions", check_versions, "pip install -e . in a fresh environment", ()),
        ("machine", checks.check_machine, "composer -n GPUS …; ulimit -n 65536", ()),
        ("teacher", checks.check_teacher, "set teacher.checkpoint", ()),
        ("data", checks.check_data, "set train_loader.remote or .local, and the credentials", ()),
        ("student", checks.check_student, "change the section student", ("teacher",)),
        ("listing", checks.check_listing, "convert again, or allow listing", ("data",)),
        ("shards", checks.check_shards, "convert again", ("data",)),
        ("shared memory", checks.check_shared_memory, "enlarge it as the row says", ("data",)),
        ("room", checks.check_room, room, ("data",)),
        ("save_folder", checks.check_save_folder, "grant the permission, or choose another save_folder", ()),
        ("labeled sets", checks.check_labeled_sets, "change retrieval.datasets", ("teacher",)),
        ("loggers", checks.check_loggers, logging_remedy, ()),
    )
    for row in rows:
        table.check(*row)


def rehearse(rehearsal: Rehearsal, table: CheckTable) -> Measured | None:
    """Start, stop and resume a small run; return its figures on node 0 if all phases passed."""
    with rehearsal.started() as command:
        table.check("training", partial(rehearsal.train, command), SEE_LOG)
        stopped = table.check("SIGTERM", partial(rehearsal.stop, command), SEE_LOG, after=("training",))
    if not stopped:
        for phase in PHASES[2:]:
            table.add(CheckRow(phase, "skipped", "SIGTERM did not pass"))
        return None
    with rehearsal.resumed() as command:
        resumed = table.check("resume", partial(rehearsal.resume, command), SEE_LOG)
    if rehearsal.nodes.rank != 0 or not resumed:
        return None
    table.check("retrieval", rehearsal.retrieve, SEE_LOG)
    table.check("export", rehearsal.export, SEE_LOG)
    return Measured.from_log(read_jsonl(rehearsal.log), command.peak_bytes, rehearsal.folder / LATEST)


@contextmanager
def own_folders(argv: Sequence[str], config: TrainConfig, train_script: Path, nodes: Nodes) -> Iterator[Rehearsal]:
    """Give the rehearsal folders of its own inside the run's, and remove them when the block ends."""
    name = nodes.exchange("name", f"preflight-{uuid4().hex[:8]}")[0]
    port = nodes.exchange("port", str(free_port()))[0]
    with tempfile.TemporaryDirectory() as temporary:
        save_folder = f"{(config.save_folder or temporary).rstrip('/')}/{name}"
        cache = Path(config.train_loader.local, name)
        rehearsal = Rehearsal(train_script, argv, config, nodes, port, save_folder, cache)
        made_in = {folder: existing_folder(folder) for folder in (cache, rehearsal.folder)}
        try:
            yield rehearsal
        finally:
            for folder, existing in made_in.items():
                remove(folder, existing)
            if nodes.rank == 0 and RunFolder.parse(save_folder).address is not None:
                remove_prefix(save_folder)


def remove(folder: Path, existing: Path) -> None:
    """Remove a folder, and its empty parents below ``existing``."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # a parent is not empty
        for parent in folder.absolute().parents:
            if parent == existing.absolute():
                return
            parent.rmdir()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]

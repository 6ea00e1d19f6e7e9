"""Checks that need no training: versions, machine, teacher, data, disk space, memory, retrieval sets."""

import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from composer.utils.file_helpers import list_remote_objects
from PIL import Image
from streaming.base.format import reader_from_json

from d2v_composer.builders.data import build_transform, count_samples, room_of_node, shared_memory_of_node
from d2v_composer.builders.evaluation import build_labelled_sets
from d2v_composer.builders.loggers import check_logging_servers
from d2v_composer.builders.model import build_teacher
from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.augmentation import sample_rng
from d2v_composer.data.decode import rgb_of
from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.data.mds_index import check_room, fetch_index, keep_encoded, read_image_index
from d2v_composer.data.shared_memory import check_shared_memory
from d2v_composer.data.verified_stream import VerifiedStream
from d2v_composer.models.sizes import ImageSize
from d2v_composer.models.teacher import Teacher
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.preflight.permissions import check_permissions
from d2v_composer.system.atomic_files import existing_folder
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine_info import describe_machine
from d2v_composer.system.packages import find_wrong_packages
from d2v_composer.system.retry import reason

__all__ = ["Checks", "check_versions"]

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
    sets: Mapping[str, LabelledSet] = field(init=False)

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
        kinds = {(shard["compression"], *shard["column_encodings"]): shard for shard in reversed(self.shards)}
        with TemporaryDirectory() as folder:
            local = loader.local if loader.remote is None else folder
            stream = VerifiedStream(local=local, remote=loader.remote, timeout=SHARD_TIMEOUT)
            rates = []
            for shard in kinds.values():
                reader = reader_from_json(local, "", shard)
                stream.fetch_shard(reader)
                keep_encoded([reader], loader.column)
                rates.append(self._measure_decoding(reader))
        self.decoded_per_core = min(rates)
        names = ", ".join(shard["raw_data"]["basename"] for shard in kinds.values())
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
            need = room_of_node(self.config, self.shards, self.nodes.rank, self.nodes.num_nodes)
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

    def check_labelled_sets(self) -> str:
        """Load the labelled sets of the retrieval; fetch CIFAR if the run would."""
        self.sets = build_labelled_sets(self.config.retrieval, self.image_size, self.interpolation)
        for name, labelled in self.sets.items():
            if max(self.config.retrieval.ks) > min(labelled.num_images):
                raise InputError(f"retrieval.ks: {name} has {min(labelled.num_images)} images in its smaller split")
        found = [f"{name}: {' + '.join(map(str, labelled.num_images))} images" for name, labelled in self.sets.items()]
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
                image = rgb_of(stored, source) if isinstance(stored, Image.Image) else stored
                transform(image, sample_rng(self.config.seed, 0, i), source)
                done += 1
            return done / (time.perf_counter() - start)
        finally:
            torch.set_num_threads(threads)

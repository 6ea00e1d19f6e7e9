"""Checks of a preflight that need no training: versions, machine, teacher, data, room, retrieval sets.

Each returns what it found, in words and as a value, and raises where the run would fail.
"""

import resource
import shutil
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from composer.utils.file_helpers import list_remote_objects
from packaging.requirements import Requirement
from PIL import Image
from streaming.base.format import reader_from_json

from d2v_composer.builders.data import room_of_node, shared_memory_of_node
from d2v_composer.builders.evaluation import build_labelled_sets
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.augmentation import RandomResizedCropFlip, sample_rng
from d2v_composer.data.decode import rgb_of
from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.data.mds_index import check_image_column, check_room, fetch_index, keep_encoded, read_index
from d2v_composer.data.shared_memory import check_shared_memory
from d2v_composer.data.verified_stream import VerifiedStream
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.system.atomic_files import existing_folder
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine_info import describe_machine
from d2v_composer.system.retry import reason

__all__ = [
    "DataSet",
    "check_data",
    "check_listing",
    "check_machine",
    "check_memory_shared",
    "check_retrieval_sets",
    "check_room_for_run",
    "check_shards",
    "check_student",
    "check_teacher",
    "check_versions",
]

# Sockets, shards and worker pipes of one process; the usual default.
OPEN_FILES = 1024
SHARD_TIMEOUT = 30.0
# How long one core decodes images for its pace.
DECODING_SECONDS = 1.0
FLOAT32_BYTES, TENSORS_PER_WEIGHT = 4, 3  # a weight and Adam's two moments


class DataSet(NamedTuple):
    """The training images, as their index describes them."""

    shards: list[dict[str, Any]]
    num_samples: int
    num_bytes: int


def check_versions() -> tuple[str, None]:
    """Compare the installed packages with what this one requires.

    Raises:
        InputError: One is missing, or of another version.
    """
    wrong = []
    for line in metadata.requires("d2v-composer") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, required {requirement.specifier}")
    if wrong:
        raise InputError("; ".join(wrong))
    return f"torch {metadata.version('torch')}, Composer {metadata.version('mosaicml')}, and the rest as required", None


def check_machine(nodes: Nodes) -> tuple[str, None]:
    """Compare GPUs with ranks, and look at the limit of open files.

    Raises:
        InputError: There are more ranks than GPUs, or too few files may be open.
    """
    machine, num_gpus = describe_machine(), torch.cuda.device_count()
    if num_gpus and nodes.ranks_per_node > num_gpus:
        raise InputError(f"{nodes.ranks_per_node} ranks on {num_gpus} GPUs")
    if 0 <= (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < OPEN_FILES:
        raise InputError(f"a process may open {limit} files, {OPEN_FILES} are needed (ulimit -n)")
    devices = f"{num_gpus} × {machine['gpu']}" if num_gpus else f"no GPU, {machine['cpu']}"
    ranks = (
        f"{nodes.num_nodes} × {nodes.ranks_per_node} ranks"
        if nodes.num_nodes > 1
        else f"{nodes.ranks_per_node} rank(s)"
    )
    return f"{devices}, {machine['cores']} cores, {machine['memory_gib']} GiB, {ranks}", None


def check_teacher(config: TrainConfig) -> tuple[str, Data2Vec2]:
    """Load the teacher.

    Raises:
        InputError: It cannot be used.
    """
    teacher = load_teacher(config.teacher.checkpoint, config.teacher.weights)
    size = sum(parameter.numel() for parameter in teacher.parameters())
    sizes = teacher.config
    return f"{size / 1e6:.1f} M parameters, {sizes.depth} blocks of {sizes.embed_dim}, {sizes.image_size} px", teacher


def check_student(config: TrainConfig, teacher: Data2Vec2) -> tuple[str, int]:
    """Build the student; the value is the number of its trained parameters.

    Raises:
        ValueError: It does not fit the teacher.
    """
    student = teacher.build_student(**asdict(config.student))
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return f"{trained / 1e6:.1f} M trained parameters", trained


def check_data(config: TrainConfig) -> tuple[str, DataSet]:
    """Read the index; of a local data set, find every shard in its full size.

    Raises:
        InputError: It cannot be read, or a shard is missing.
    """
    loader = config.train_loader
    if loader.remote is None:
        shards = read_index(Path(loader.local), columns=(loader.column,), option="train_loader.column")
    else:
        with TemporaryDirectory() as folder:
            fetch_index(loader.remote, Path(folder))
            option = "train_loader.column"
            shards = read_index(Path(folder), columns=(loader.column,), option=option, shards_may_be_missing=True)
    check_image_column(shards, loader.column, loader.remote or loader.local)
    data = DataSet(
        shards, sum(shard["samples"] for shard in shards), sum(shard["raw_data"]["bytes"] for shard in shards)
    )
    if data.num_samples < config.global_train_batch_size:
        raise InputError(f"{data.num_samples} samples, fewer than global_train_batch_size")
    where = loader.remote or loader.local
    return f"{where}: {data.num_samples} samples in {len(shards)} shards, {data.num_bytes / 1e9:.2f} GB", data


def check_listing(config: TrainConfig, data: DataSet) -> tuple[str, None]:
    """List the store, and find every shard of the index there.

    Raises:
        InputError: It names the first shards that are missing.
    """
    remote = config.train_loader.remote
    if remote is None:
        return "all shards of the index are here", None
    try:
        keys = list_remote_objects(f"{remote.rstrip('/')}/")
    except Exception as error:
        raise InputError(f"{remote}: no right to list ({reason(error)})") from error
    stored = {key.rsplit("/", 1)[-1] for key in keys}
    names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in data.shards]
    missing = [name for name in names if name.rsplit("/", 1)[-1] not in stored]
    if missing:
        raise InputError(f"{remote}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
    return f"all {len(names)} shards of the index are in the store", None


def check_shards(config: TrainConfig, data: DataSet, image_size: int) -> tuple[str, float]:
    """Fetch a shard of each kind, compare it with its hash, and decode images of it.

    A kind is a compression and the columns' encodings.

    Returns:
        What was done, and the images that one core decodes and augments in a second.

    Raises:
        ShardError: One cannot be fetched, or is damaged.
        InputError: One holds no images.
    """
    kinds = {(shard["compression"], *shard["column_encodings"]): shard for shard in reversed(data.shards)}
    with TemporaryDirectory() as folder:
        local = folder if config.train_loader.remote is not None else config.train_loader.local
        stream = VerifiedStream(local=local, remote=config.train_loader.remote, timeout=SHARD_TIMEOUT)
        rates = []
        for shard in kinds.values():
            reader = reader_from_json(local, "", shard)
            stream.fetch_shard(reader)
            keep_encoded([reader], config.train_loader.column)
            rates.append(_decoding_rate(config, reader, image_size))
    names = ", ".join(shard["raw_data"]["basename"] for shard in kinds.values())
    return f"{names}: whole; one core decodes {min(rates):.0f} images/s", min(rates)


def _decoding_rate(config: TrainConfig, reader: Any, image_size: int) -> float:
    loader = config.train_loader
    scale, ratio = (loader.crop_scale[0], loader.crop_scale[1]), (loader.crop_ratio[0], loader.crop_ratio[1])
    transform = RandomResizedCropFlip(image_size, scale, ratio, loader.flip)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a data worker
    try:
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < DECODING_SECONDS:
            i = done % reader.samples
            transform(_image(reader[i][loader.column], i), sample_rng(config.seed, 0, i), f"sample {i}")
            done += 1
        return done / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def _image(stored: Any, i: int) -> Any:
    return rgb_of(stored, f"sample {i}") if isinstance(stored, Image.Image) else stored


def check_room_for_run(
    config: TrainConfig, nodes: Nodes, data: DataSet, folder: Path | None, trained: int
) -> tuple[str, None]:
    """Compare the free space with what the cache and the checkpoints will take on this node.

    Args:
        config: The run's.
        nodes: Its nodes; each reads its share of the shards.
        data: Its images.
        folder: Where checkpoints lie on this machine, or ``None``.
        trained: Trained parameters.

    Raises:
        InputError: One of the disks has too little.
    """
    loader, found = config.train_loader, []
    if loader.remote is not None:
        need = room_of_node(config, data.shards, nodes.rank, nodes.num_nodes)
        check_room([need])
        found.append(f"cache in {need.local}: {need.bytes / 1e9:.1f} GB of {need.free / 1e9:.1f} GB free")
    if folder is not None:
        kept = max(config.save_num_checkpoints_to_keep, 1) + 1  # the next one is written before the oldest goes
        needed = kept * trained * FLOAT32_BYTES * TENSORS_PER_WEIGHT
        free = shutil.disk_usage(existing_folder(folder)).free
        if needed > free:
            raise InputError(f"{folder}: {kept} checkpoints take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        found.append(f"checkpoints in {folder}: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
    return "; ".join(found) or "nothing is stored here", None


def check_memory_shared(config: TrainConfig, data: DataSet, image_size: int) -> tuple[str, None]:
    """Compare the free shared memory with what the data of this node's ranks takes.

    Raises:
        InputError: There is too little.
    """
    needed = shared_memory_of_node(config, len(data.shards), data.num_samples, image_size)
    if (fault := check_shared_memory(needed)) is not None:
        raise InputError(fault)
    return f"{needed / 1e6:,.0f} MB for the data of this node's ranks", None


def check_retrieval_sets(config: TrainConfig, image_size: int) -> tuple[str, dict[str, LabelledSet]]:
    """Load the labelled sets, and fetch CIFAR where the run would.

    Raises:
        InputError: One cannot be used, or has fewer images than the largest of ``retrieval.ks``.
    """
    sets = build_labelled_sets(config.retrieval.datasets, image_size)
    for name, labelled in sets.items():
        if max(config.retrieval.ks) > min(labelled.num_images):
            raise InputError(f"retrieval.ks: {name} has {min(labelled.num_images)} images in its smaller set")
    found = [f"{name}: {' + '.join(map(str, labelled.num_images))} images" for name, labelled in sets.items()]
    return "; ".join(found) or "none", sets

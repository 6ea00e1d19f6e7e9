"""Fixtures of several tests: small data sets, and a run that was never interrupted."""

import functools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import streaming.base.dataset
import torch
from composer.utils import dist
from filelock import FileLock
from streaming import MDSWriter
from streaming.base.shared import get_shm_prefix

from gated_store import GatedStore, running_store
from helpers import NUM_IMAGES, encoded_image, run_training, small_run, succeed, write_mds
from made_once import made_once
from programs.preloaded import know_the_machine

signal.signal(signal.SIGINT, signal.default_int_handler)  # else programs that tests start ignore it in the background

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores

# Each S3 client reads its JSON models anew, for a quarter of a second; here all of a process share them.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)
know_the_machine()


def name_one_at_a_time(*arguments: Any) -> Any:
    """Find a free name in shared memory as Streaming does, and take it before another test process finds it."""
    with FileLock(Path(tempfile.gettempdir(), "streaming-names.lock")):
        return get_shm_prefix(*arguments)


setattr(streaming.base.dataset, get_shm_prefix.__name__, name_one_at_a_time)


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Initialize a process group of one rank."""
    if torch.distributed.is_initialized():  # by a test before, in this process
        yield
        return
    for name, value in {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    dist.initialize_dist("cpu")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """Hide the process group of another test: a forked process lacks its threads, and would hang in a collective."""
    member = torch.distributed.distributed_c10d.GroupMember
    before = member.WORLD
    member.WORLD = None
    yield
    member.WORLD = before


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after hundredths of a second."""
    monkeypatch.setattr("d2v_composer.system.fetch.FIRST_PAUSE", 0.01)


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of 32 px without labels in some thirty hashed shards; read-only."""
    folder = tmp_path_factory.mktemp("many") / "images"
    with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit=4096, hashes=["sha1", "xxh64"]) as writer:
        for i in range(NUM_IMAGES):
            writer.write({"image": encoded_image(i)})
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of 32 px with labels; read-only."""
    files, labels = [encoded_image(i) for i in range(NUM_IMAGES)], [i % 4 for i in range(NUM_IMAGES)]
    return made_once(tmp_path_factory, "small", lambda folder: write_mds(folder / "train", files, labels)) / "train"


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """144 images of 32 px with labels, in two splits; read-only."""
    folder = tmp_path_factory.mktemp("labeled")
    for split, num in {"train": 96, "test": 48}.items():
        write_mds(folder / split, [encoded_image(i) for i in range(num)], [i % 4 for i in range(num)])
    return folder


@pytest.fixture(scope="session")
def object_store() -> Iterator[GatedStore]:
    """An S3 server; each file of tests has buckets of its own, made once a process, and restores what it changes."""
    with running_store() as store:
        yield store


@pytest.fixture
def reachable_store(object_store: GatedStore, monkeypatch: pytest.MonkeyPatch) -> GatedStore:
    """The same server, which this process reaches too."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Return the folder of a run of 14 batches, 6 an epoch, in one process."""
    runs = made_once(tmp_path_factory, "small_run", lambda folder: run_training(*small_run(folder / "run", small_data)))
    return runs / "run"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, uninterrupted: Path) -> Path:
    """The student of that run, two blocks with ALiBi; read-only."""
    name, checkpoint = "student.safetensors", uninterrupted / "latest-rank0.pt"
    return made_once(tmp_path_factory, "exported", lambda folder: succeed("export", checkpoint, folder / name)) / name

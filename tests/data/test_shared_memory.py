"""Shared memory for the batches of data workers: counted before the run, and without names that outlive it."""

import os
import signal
from collections import namedtuple
from pathlib import Path

import pytest

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.config.load import load_config
from d2v_composer.data import streaming
from d2v_composer.system.errors import InputError
from helpers import small_run
from streams import open_batches, open_images

MEMORY = Path("/dev/shm")
Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_killed_worker_leaves_no_names(many_shards: Path) -> None:
    def names() -> set[str]:
        return {path.name for path in MEMORY.iterdir() if f"_{os.getpid()}_" in path.name or path.name[0].isdigit()}

    before = names()
    with open_batches(open_images(many_shards), workers=2) as batches:
        next(batches)
        assert names() == before
        os.kill(batches._workers[1].pid, signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises((RuntimeError, ConnectionError, EOFError)):
            list(batches)
    assert names() == before


def test_refuses_to_start_with_too_little_shared_memory(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker would be killed by SIGBUS."""
    options = ("train_loader.num_workers=2", "train_loader.prefetch_factor=6")
    config = load_config(small_run(tmp_path, small_data, *options))
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: Usage(64 << 20, 60 << 20, 4 << 20))
    build_train_loader(config, read_train_index(config), 24, "bicubic")
    with pytest.raises(InputError, match=r"^/dev/shm: 4,194,304 of 67,108,864 bytes are free, .* needs 33,9") as caught:
        build_train_loader(config, read_train_index(config), 224, "bicubic")  # 16 x 3 x 224 x 224 bytes, 14 times
    assert "docker run --shm-size=" in str(caught.value)


def test_counts_the_shared_memory_of_the_papers_run() -> None:
    """On eight GPUs: 32 images of 224 pixels a rank, two batches in each of 64 workers and two in use per rank."""
    batch_bytes = 32 * 3 * 224 * 224
    needed = streaming.shared_memory_needed(ranks=8, workers=8, prefetch_factor=2, batch_bytes=batch_bytes)
    assert needed == pytest.approx(8 * 18 * batch_bytes, rel=0.01)
    assert streaming.shared_memory_needed(ranks=8, workers=0, prefetch_factor=2, batch_bytes=batch_bytes) == 0

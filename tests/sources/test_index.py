"""Checks before training: the same data on each node, space on the disk, and shared memory for batches."""

import shutil
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import pytest
from composer.utils import dist

from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainLoaderConfig
from d2v_composer.data.images import Images
from d2v_composer.sources import shards
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import fetch_index
from d2v_composer.system.errors import InputError
from d2v_composer.training_data import loader as builders_data
from d2v_composer.training_data.loader import build_train_loader, read_train_index
from helpers import small_run

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_cache_on_a_full_disk_is_refused(many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(small_run(tmp_path, tmp_path / "cache", f"train_loader.remote={many_shards}"))
    index = read_train_index(config.train_loader, Images(24), 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    with pytest.raises(InputError, match=r"cache: 0\.0 GB of shards must still be fetched, but only 0\.0 GB is free"):
        build_train_loader(config, config.train_loader, index)


def test_nodes_with_other_data_are_refused(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_node_rank", lambda: 0)
    monkeypatch.setattr(
        builders_data.dist, "all_gather_object", lambda this: [this, this, (1, this[1]), (2, "another")]
    )
    with pytest.raises(InputError, match=rf"^{small_data}: the data set on node 2 differs from the one on node 0$"):
        read_train_index(TrainLoaderConfig(local=str(small_data)), Images(24), 16)


def test_another_programs_index_is_named(tmp_path: Path) -> None:
    for content in ('{"pages": []}', "[]"):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(InputError, match=rf"^{tmp_path}: no MDS index\.json: not an MDS data set$"):
            Index(tmp_path, Images())


def test_the_index_in_a_cache_suffices_if_the_store_is_unreachable(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a data set of another program, which has no summary."""
    monkeypatch.setattr(shards, "transfer", Mock(side_effect=ConnectionError("no network")))
    with pytest.raises(InputError, match=r"s3://bucket/x/index\.json cannot be fetched \(no network\)"):
        fetch_index("s3://bucket/x", tmp_path)
    shutil.copy(small_data / "index.json", tmp_path)
    fetch_index("s3://bucket/x", tmp_path)
    assert caplog.messages[-1].endswith(f"cannot be fetched (no network); using the file in {tmp_path}")
    assert (tmp_path / "index.json").read_bytes() == (small_data / "index.json").read_bytes()


def test_refuses_to_start_with_too_little_shared_memory(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker would be killed by SIGBUS."""
    options = ("train_loader.num_workers=2", "train_loader.prefetch_factor=6")
    config = load_config(small_run(tmp_path, small_data, *options))
    loader = config.train_loader
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 60 << 20, 4 << 20))
    build_train_loader(config, loader, read_train_index(loader, Images(24), 16))
    with pytest.raises(InputError, match=r"^/dev/shm: 4,194,304 of 67,108,864 bytes are free, .* needs 33,9") as caught:
        # 16 x 3 x 224 x 224 bytes, 14 times
        build_train_loader(config, loader, read_train_index(loader, Images(224), 16))
    assert "docker run --shm-size=" in str(caught.value)

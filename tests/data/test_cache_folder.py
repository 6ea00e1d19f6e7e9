"""The folder that keeps a remote data set's shards: other people's files in it, and what is done to it under a run."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.config.load import load_config
from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system import retry
from d2v_composer.system.errors import InputError
from helpers import NUM_IMAGES, small_run, time_limit

ALL = list(range(NUM_IMAGES))
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


def images(local: Path, remote: Path, cache_limit: int | None = None) -> StreamingImages:
    return StreamingImages(
        local=local,
        remote=str(remote),
        batch_size=16,
        transform=RandomResizedCropFlip(24),
        seed=5,
        cache_limit=cache_limit,
        timeout=5,
    )


def epoch(dataset: StreamingImages, workers: int = 0) -> Iterator[int]:
    with time_limit(30):
        for batch in DataLoader(dataset, 16, num_workers=workers, timeout=20 if workers else 0):
            yield from batch["sample_id"].tolist()


FOREIGN = [
    "notes.partial",
    "model.safetensors.partial",
    "movie.mp4.12-34.partial",
    "shard.00005.mds.partial",
    "shard.00005.mds.7-7.partial.keep-this",
    "shard.99999.mds.7-7.partial",
    "2024.partial.d/letter.txt",
    "mine/shard.00005.mds.7-7.partial",
    "shard.00006.mds.7-7.partial/a-folder-of-that-name",
]


def test_only_our_own_partial_files_are_deleted(many_shards: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    for name in FOREIGN:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text(name)
    (cache / "shard.00008.mds.7-7.partial").symlink_to(cache / "notes.partial")
    ours = [f"shard.00005.mds.7-7.partial{end}" for end in ("", ".tmp", ".aB3dE5g7")]
    for name in ours:
        (cache / name).write_text("what a killed process left")
    assert sorted(epoch(images(cache, many_shards))) == ALL
    assert [name for name in FOREIGN if (cache / name).read_text() != name] == []
    assert (cache / "shard.00008.mds.7-7.partial").is_symlink()
    assert [name for name in ours if (cache / name).exists()] == []


def test_partial_files_of_shards_in_subfolders_are_deleted(many_shards: Path, tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(many_shards, remote / "b")
    index = json.loads((remote / "b" / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"b/{shard['raw_data']['basename']}"
    (remote / "index.json").write_text(json.dumps(index))
    shutil.copytree(remote, cache)
    left = cache / "b" / "shard.00000.mds.7-7.partial"
    left.write_text("what a killed process left")
    (cache / "b" / "c.partial").write_text("another's")
    assert sorted(epoch(images(cache, remote))) == ALL
    assert not left.exists()
    assert (cache / "b" / "c.partial").exists()


@WORKERS
@pytest.mark.parametrize("cache_limit", [None, 60_000])
def test_a_cache_that_is_removed_under_a_run_is_filled_again(
    many_shards: Path, tmp_path: Path, workers: int, cache_limit: int | None
) -> None:
    cache = tmp_path / "cache"
    dataset = images(cache, many_shards, cache_limit)
    seen: list[int] = []
    for sample_id in epoch(dataset, workers):
        seen.append(sample_id)
        if len(seen) in (1, 40):
            shutil.rmtree(cache, ignore_errors=True)  # a worker may be writing there
    assert sorted(seen) == ALL
    assert sorted(epoch(dataset, workers)) == ALL


def forbid(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let nothing in a folder be removed, as in one that is immutable; root may do so in a read-only one."""
    remove, unlink = os.remove, Path.unlink

    def check(path: os.PathLike[str] | str) -> None:
        if Path(path).parent == folder and Path(path).exists():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    def checked_remove(path: os.PathLike[str] | str) -> None:
        check(path)
        remove(path)

    def checked_unlink(path: Path, missing_ok: bool = False) -> None:
        check(path)
        unlink(path, missing_ok)

    patch.setattr(os, "remove", checked_remove)
    patch.setattr(Path, "unlink", checked_unlink)


@WORKERS
def test_a_cache_in_which_nothing_can_be_evicted_says_so(many_shards: Path, tmp_path: Path, workers: int) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    dataset = images(cache, many_shards, cache_limit=30_000)
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch, cache)
        with pytest.raises(ShardError, match=r"cache: shard \d+ cannot be evicted: .*Operation not permitted"):
            list(epoch(dataset, workers))
    assert sorted(epoch(dataset, workers)) == ALL  # and it has not lost count


def test_a_damaged_shard_that_cannot_be_deleted_is_named(many_shards: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    (cache / "shard.00004.mds").write_bytes(b"cut")
    config = load_config(small_run(tmp_path / "run", cache, f"train_loader.remote={many_shards}"))
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch, cache)
        with pytest.raises(InputError, match=r"shard\.00004\.mds: is not .*cannot be deleted \(Operation not"):
            build_train_loader(config, read_train_index(config), 24)


def test_a_folder_in_a_shards_place_is_named_at_once(many_shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "shard.00003.mds" / "thing").mkdir(parents=True)
    dataset = images(cache, many_shards)
    dataset.stream.timeout = 600
    with pytest.raises(ShardError, match=r"shard\.00003\.mds.*Is a directory"), time_limit(20):
        dataset.prepare_shard(3)

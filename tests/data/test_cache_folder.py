"""The folder that keeps a remote data set's shards: other people's files in it, and changes to it during a run."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.config.load import load_config
from d2v_composer.system.errors import InputError, ShardError
from helpers import NUM_IMAGES, small_run, time_limit
from streams import open_batches, open_images, read_epoch

ALL = list(range(NUM_IMAGES))
WORKERS = pytest.mark.parametrize("workers", [0, 2])

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


def test_deletes_only_its_own_partial_files(many_shards: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    for name in FOREIGN:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text(name)
    (cache / "shard.00008.mds.7-7.partial").symlink_to(cache / "notes.partial")
    ours = [f"shard.00005.mds.7-7.partial{end}" for end in ("", ".tmp", ".aB3dE5g7")]
    for name in ours:
        (cache / name).write_text("left by a killed process")
    assert read_epoch(open_images(cache, many_shards)) == ALL
    assert [name for name in FOREIGN if (cache / name).read_text() != name] == []
    assert (cache / "shard.00008.mds.7-7.partial").is_symlink()
    assert [name for name in ours if (cache / name).exists()] == []


def test_deletes_partial_files_of_shards_in_subfolders(many_shards: Path, tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(many_shards, remote / "b")
    index = json.loads((remote / "b" / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"b/{shard['raw_data']['basename']}"
    (remote / "index.json").write_text(json.dumps(index))
    shutil.copytree(remote, cache)
    left = cache / "b" / "shard.00000.mds.7-7.partial"
    left.write_text("left by a killed process")
    (cache / "b" / "c.partial").write_text("another's")
    assert read_epoch(open_images(cache, remote)) == ALL
    assert not left.exists()
    assert (cache / "b" / "c.partial").exists()


@WORKERS
@pytest.mark.parametrize("cache_limit", [None, 60_000])
def test_fills_a_cache_again_that_is_removed_during_an_epoch(
    many_shards: Path, tmp_path: Path, workers: int, cache_limit: int | None
) -> None:
    cache = tmp_path / "cache"
    dataset = open_images(cache, many_shards, cache_limit=cache_limit, timeout=5)
    seen: list[int] = []
    with time_limit(30), open_batches(dataset, workers) as batches:
        for number, batch in enumerate(batches):
            seen += batch["sample_id"].tolist()
            if number in (0, 2):
                shutil.rmtree(cache, ignore_errors=True)  # a worker may be writing there
    assert sorted(seen) == ALL
    assert read_epoch(dataset, workers) == ALL


def forbid_removal(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let nothing in a folder be removed, as if it were immutable; root may remove files from a read-only one."""
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
def test_names_a_shard_that_cannot_be_evicted(many_shards: Path, tmp_path: Path, workers: int) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    dataset = open_images(cache, many_shards, cache_limit=30_000)
    with pytest.MonkeyPatch.context() as patch:
        forbid_removal(patch, cache)
        with pytest.raises(ShardError, match=r"cache: shard \d+ cannot be evicted: .*Operation not permitted"):
            read_epoch(dataset, workers)
    assert read_epoch(dataset, workers) == ALL  # its states and its count of bytes are still right


@WORKERS
def test_another_program_may_delete_a_shard_while_it_is_evicted(
    many_shards: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    remove, raced = os.remove, tmp_path / "raced"

    def deleted_by_another(path: os.PathLike[str] | str) -> None:
        remove(path)
        if Path(path).parent == cache and Path(path).suffix == ".mds":
            raced.touch()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(os, "remove", deleted_by_another)
    assert read_epoch(open_images(cache, many_shards, cache_limit=30_000), workers) == ALL
    assert raced.exists()


def test_names_a_corrupt_shard_that_cannot_be_deleted(many_shards: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    (cache / "shard.00004.mds").write_bytes(b"truncated")
    config = load_config(small_run(tmp_path / "run", cache, f"train_loader.remote={many_shards}"))
    with pytest.MonkeyPatch.context() as patch:
        forbid_removal(patch, cache)
        with pytest.raises(InputError, match=r"shard\.00004\.mds: is not .*cannot be deleted \(Operation not"):
            build_train_loader(config, read_train_index(config), 24, "bicubic")


def test_names_a_folder_in_the_place_of_a_shard_at_once(many_shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "shard.00003.mds" / "thing").mkdir(parents=True)
    dataset = open_images(cache, many_shards, timeout=600)
    with pytest.raises(ShardError, match=r"shard\.00003\.mds.*Is a directory"), time_limit(20):
        dataset.prepare_shard(3)

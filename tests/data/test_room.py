"""Space on the disks for the shards that are still to be fetched: each node's share, also if nodes share a disk."""

import contextlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from composer.utils import dist

from d2v_composer.builders import data as builders_data
from d2v_composer.builders.data import build_train_loader, check_same_data, read_train_index, room_of_node
from d2v_composer.config.load import load_config
from d2v_composer.data.index import RoomNeeded, check_room, read_index, room_needed
from d2v_composer.system.errors import InputError
from helpers import small_run

GB = 10**9
Usage = namedtuple("Usage", "total used free")


def test_refuses_a_disk_that_is_too_small(many_shards: Path, tmp_path: Path) -> None:
    shards, free = read_index(many_shards, columns=()), shutil.disk_usage(tmp_path).free
    check_room([room_needed(shards[:1], tmp_path)._replace(bytes=free // 2)])
    shards[0]["raw_data"]["bytes"] = 2 * free
    with pytest.raises(InputError, match=r"GB of shards are still to come, .* GB of the disk are free: make room, or"):
        check_room([room_needed(shards[:1], tmp_path)])
    check_room([room_needed(shards[:1], tmp_path, free // 2)])


def test_complete_shards_that_are_here_need_no_room(many_shards: Path, tmp_path: Path) -> None:
    shards = read_index(many_shards, columns=())
    sizes = [shard["raw_data"]["bytes"] for shard in shards]
    for shard in shards[:3]:
        shutil.copy(many_shards / shard["raw_data"]["basename"], tmp_path)
    (tmp_path / shards[3]["raw_data"]["basename"]).write_bytes(b"cut")
    assert room_needed(shards, tmp_path).bytes == sum(sizes[3:])
    assert room_needed(shards, tmp_path, sum(sizes[:5])).bytes == sum(sizes[3:5])
    assert room_needed(shards, tmp_path, 100).bytes == 0
    shards[0]["zip_data"] = {"basename": "shard.zstd", "bytes": 70}
    assert room_needed(shards, tmp_path).bytes == sum(sizes[3:]) + 70  # beside the decompressed file


class ReachedError(Exception):
    """The loader would be built now."""


@pytest.mark.parametrize(("parts", "share"), [(1, 1), (2, 1 / 2), (4, 1 / 2)])
def test_a_node_needs_room_for_its_share(
    many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, share: float
) -> None:
    """Of two nodes that cut the order into this many parts."""
    shards = read_index(many_shards, columns=())
    for shard in shards:
        shard["raw_data"]["bytes"] = GB
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    options = (f"train_loader.remote={remote}", f"train_loader.num_canonical_nodes={parts}")
    config = load_config(small_run(tmp_path / "run", tmp_path / "cache", *options))
    assert room_of_node(config, shards, 2).bytes == share * len(shards) * GB
    assert room_of_node(config, shards, 1).bytes == len(shards) * GB

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_node_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda this: [this])
    monkeypatch.setattr("d2v_composer.builders.data.node_leaders_first", contextlib.nullcontext)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0.6 * len(shards) * GB))

    def reached(**_: object) -> None:
        raise ReachedError

    monkeypatch.setattr(builders_data, "StreamingImages", reached)
    with pytest.raises(ReachedError if share < 1 else InputError):
        build_train_loader(config, read_train_index(config), 24, "bicubic")


def test_nodes_with_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [{"samples": 3, "raw_data": {"basename": "shard.00000.mds", "bytes": 90, "hashes": {"xxh64": "a"}}}]
    monkeypatch.setattr(dist, "get_node_rank", lambda: 0)
    check_same_data(tmp_path, shards)
    monkeypatch.setattr(builders_data, "gather_objects", lambda this: [this, this, (1, this[1]), (2, "another")])
    with pytest.raises(InputError, match=rf"^{tmp_path}: another data set on node 2 than on node 0$"):
        check_same_data(tmp_path, shards)


def test_adds_up_the_nodes_that_share_a_disk() -> None:
    first = RoomNeeded(("machine", 1), "/caches/a", 6 * GB, 10 * GB)
    check_room([first, RoomNeeded(("machine", 2), "/other/b", 6 * GB, 10 * GB)])
    check_room([first, RoomNeeded(("another", 1), "/caches/b", 6 * GB, 10 * GB)])
    with pytest.raises(InputError, match=r"/caches/a, /caches/b: 12\.0 GB of shards are still to come, 10\.0 GB"):
        check_room([first, RoomNeeded(("machine", 1), "/caches/b", 6 * GB, 10 * GB)])

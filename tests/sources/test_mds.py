"""Our reader of MDS beside Streaming's own, on what its writer writes; shards that are cut short or contradict."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader

from d2v_composer.data.images import Images
from d2v_composer.sources.mds import ENCODINGS, NUMBERS, Index, Shard
from d2v_composer.system.errors import InputError
from helpers import encoded_image

SIZES = (3, 17, 40)


def value_of(encoding: str, i: int) -> Any:
    """The i-th value of a column."""
    if encoding in NUMBERS:
        return np.dtype(encoding).type(7 * i + 3)
    pixels = np.random.default_rng(i).integers(0, 256, (SIZES[i], 9, 3), dtype=np.uint8)
    values = {"bytes": encoded_image(i), "str": "é" * i, "str_int": 10**i, "int": -i}
    return values.get(encoding, Image.fromarray(pixels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples with a column of each encoding, and one of arrays, which is not read."""
    folder = tmp_path_factory.mktemp("mds") / "data"
    columns = {**{f"a {encoding}": encoding for encoding in ENCODINGS}, "other": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha1", "xxh64"]) as writer:
        for i in range(len(SIZES)):
            values = {f"a {encoding}": value_of(encoding, i) for encoding in ENCODINGS}
            writer.write(values | {"other": np.arange(i + 1)})
    return folder


def shard_of(folder: Path, labels: str | None = None) -> Shard:
    [shard] = Index(folder, Images(), "a bytes", labels=labels).shards
    return shard


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_reads_what_streaming_reads(folder: Path, encoding: str) -> None:
    shard, [entry] = shard_of(folder, f"a {encoding}"), json.loads((folder / "index.json").read_text())["shards"]
    theirs = MDSReader.from_json(str(folder), None, entry)
    for i in range(len(SIZES)):
        value, expected = shard.read(folder / shard.raw.basename, i)[f"a {encoding}"], theirs[i][f"a {encoding}"]
        if encoding not in Images.encodings or encoding == "bytes":
            assert value == expected
        elif encoding == "pil":
            assert (value.mode, value.size, value.tobytes()) == (expected.mode, expected.size, expected.tobytes())
        else:
            assert value == expected.fp.getvalue()  # the file


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["column_sizes"].pop(),
        lambda entry: entry["column_encodings"].__setitem__(0, "unknown"),
        lambda entry: entry.update(column_encodings=["pkl"] * len(entry["column_names"])),
        lambda entry: entry.update(column_names=[]),
        lambda entry: entry.update(samples=10**15),
        lambda entry: entry.update(samples=-1),
        lambda entry: entry.update(samples="many"),
        lambda entry: entry["raw_data"].pop("hashes"),
        lambda entry: entry["raw_data"].update(bytes=10**15),
        lambda entry: entry["raw_data"].update(basename="/etc/passwd"),
        lambda entry: entry["raw_data"].update(basename="sub/../../shard.mds"),
    ],
)
def test_refuses_an_entry_with_false_claims(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    """16, 18: tests/promises/test_files.py has a command that does."""
    data = shutil.copytree(folder, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    change(index["shards"][0])
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"^{data}[^\n]*$"):
        shard_of(data)


def test_refuses_a_sample_of_another_size(folder: Path, tmp_path: Path) -> None:
    shard = shard_of(folder)
    contents, path = bytearray((folder / shard.raw.basename).read_bytes()), tmp_path / "shard.mds"
    contents[8] ^= 1  # the second offset
    path.write_bytes(contents)
    for number in (0, 1):
        with pytest.raises(ValueError, match="columns of"):
            shard.read(path, number)
    path.write_bytes(contents[:-1])
    with pytest.raises(ValueError, match="columns of"):
        shard.read(path, 2)
    assert str(shard.raw.find_fault(path)).endswith(f"the index says {shard.raw.bytes}")
    path.write_bytes(contents)
    assert str(shard.raw.find_fault(path)).endswith("its content has changed (xxh64)")


def test_refuses_more_pixels_than_a_sample_can_hold() -> None:
    """Before Pillow allocates them."""
    with pytest.raises(ValueError, match="15 bytes for 65000 x 65000 pixels"):
        ENCODINGS["pil"](np.array([65_000, 65_000, 3], np.uint32).tobytes() + b"RGB")

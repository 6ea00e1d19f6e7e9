"""MDS beside Streaming's own reader and converter: columns, shards that lie, checks before training."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from torch import Tensor

from d2v_composer.config.load import load_config
from d2v_composer.data.images import Images, decode_rgb
from d2v_composer.sources import shards
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.sources.mds import ENCODINGS, NUMBERS, Index, Shard
from d2v_composer.sources.open import open_source
from d2v_composer.sources.shards import fetch_index
from d2v_composer.sources.source import open_mds
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.loader import build_train_loader, read_train_index
from helpers import encoded_image, flip_bit, small_run, write_images

NUM_SAMPLES = 32
Usage = namedtuple("Usage", ["total", "used", "free"])
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
    """Promises 16 and 18: tests/promises/test_files.py has a command that does."""
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
        with pytest.raises(ValueError, match="but its columns have"):
            shard.read(path, number)
    path.write_bytes(contents[:-1])
    with pytest.raises(ValueError, match="but its columns have"):
        shard.read(path, 2)
    assert str(shard.raw.find_fault(path)).endswith(f"the index says {shard.raw.bytes}")
    path.write_bytes(contents)
    assert str(shard.raw.find_fault(path)).endswith("the content does not have the xxh64 hash in the index")


def test_refuses_more_pixels_than_a_sample_can_hold() -> None:
    """Before Pillow allocates them."""
    with pytest.raises(ValueError, match="its 15 bytes do not fit 65000 x 65000 pixels"):
        ENCODINGS["pil"](np.array([65_000, 65_000, 3], np.uint32).tobytes() + b"RGB")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    names = [f"{i:02}.jpg" for i in range(NUM_SAMPLES)]
    return sorted(write_images(tmp_path_factory.mktemp("files"), names).iterdir())


def write_as_streaming(folder: Path, files: list[Path], encoding: str) -> Path:
    """Write an MDS folder as Streaming's own converter of ImageNet does: ``i``, ``x`` and ``y``."""
    with MDSWriter(out=str(folder), columns={"i": "int", "x": encoding, "y": "int"}, size_limit=8192) as writer:
        for i, path in enumerate(files):
            with Image.open(path) as image:
                writer.write({"i": i, "x": path.read_bytes() if encoding == "bytes" else image, "y": i % 4})
    return folder


def train_loader(data: Path, *overrides: str, size: int = 24) -> Any:
    """Build the loader of a small run with crops of ``size`` pixels."""
    config = load_config(small_run(data / "run", data, "train_loader.crop_scale=[0.08,1.0]", *overrides))
    index = read_train_index(config.train_loader, Images(size), 16)
    return build_train_loader(config, config.train_loader, index)


def images_of_an_epoch(data: Path) -> dict[int, Tensor]:
    """Return each sample's crop by its id."""
    batches = list(train_loader(data, "train_loader.column=x"))
    ids, images = (torch.cat([batch[name] for batch in batches]) for name in ("sample_id", "image"))
    return dict(zip(ids.tolist(), images, strict=True))


@pytest.mark.parametrize("encoding", ["jpeg", "png", "pil"])
def test_trains_on_a_data_set_of_streamings_own_converter(files: list[Path], tmp_path: Path, encoding: str) -> None:
    ours, expected = (
        images_of_an_epoch(write_as_streaming(tmp_path / name, files, name)) for name in (encoding, "bytes")
    )
    assert ours.keys() == expected.keys() == {*range(NUM_SAMPLES)}
    assert all(torch.equal(image, expected[i]) for i, image in ours.items())


@pytest.mark.parametrize("encoding", ["jpeg", "pil"])
def test_embeds_and_retrieves_from_a_chosen_column(files: list[Path], tmp_path: Path, encoding: str) -> None:
    for split in ("train", "test"):
        write_as_streaming(tmp_path / split, files, encoding)
    expected = torch.from_numpy(np.array(decode_rgb(files[3].read_bytes(), "file"))).permute(2, 0, 1)
    source = open_source(str(tmp_path / "train"), Images(32), column="x")
    labeled = load_labeled_set("mds", tmp_path, image_size=32, column="x", label_column="y")
    assert torch.equal(source.decode(3), expected)
    assert torch.equal(labeled.train.samples[3], expected)
    assert labeled.test.labels.tolist() == [i % 4 for i in range(NUM_SAMPLES)]


def test_names_a_column_that_is_missing_or_has_no_images(files: list[Path], tmp_path: Path) -> None:
    data = write_as_streaming(tmp_path / "train", files, "jpeg")
    readers: list[Callable[[], Any]] = [
        lambda: train_loader(data),
        lambda: open_source(str(data), Images(32)),
        lambda: load_labeled_set("mds", tmp_path),
    ]
    for read in readers:
        with pytest.raises(
            InputError, match=r"no column 'image'; the data set has the columns i, x, y; choose one with --column"
        ):
            read()
    with pytest.raises(InputError, match="its column 'y' is encoded as int; expected one of bytes, jpeg, png, pil"):
        train_loader(data, "train_loader.column=y")


def test_another_programs_index_is_named(tmp_path: Path) -> None:
    for content in ('{"pages": []}', "[]"):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(InputError, match=rf"^{tmp_path}: not an MDS data set: it has no index\.json that lists "):
            Index(tmp_path, Images())


def test_the_index_in_a_cache_suffices_if_the_store_is_unreachable(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a data set of another program, which has no summary."""
    monkeypatch.setattr(shards, "transfer", Mock(side_effect=ConnectionError("no network")))
    with pytest.raises(InputError, match=r"s3://bucket/x/index\.json cannot be fetched \(no network\)"):
        fetch_index("s3://bucket/x", tmp_path)
    index = shutil.copy(small_data / "index.json", tmp_path)
    fetch_index("s3://bucket/x", tmp_path)
    assert caplog.messages[-1].endswith(f"cannot be fetched (no network); using the file in {tmp_path}")
    assert Path(index).read_bytes() == (small_data / "index.json").read_bytes()


def test_a_data_set_is_its_bytes_or_says_that_it_is_known_by_sizes(small_data: Path, tmp_path: Path) -> None:
    """Decompressed shards beside the compressed ones change nothing."""

    def index_of(folder: Path, remote: str | None = None) -> Index:
        return Index(folder, Images(), remote=remote)

    changed = shutil.copytree(small_data, tmp_path / "changed")
    shard = min(changed.glob("shard.*.mds"))
    shard.write_bytes(flip_bit(shard.read_bytes()))
    assert index_of(changed).sha256 != index_of(small_data).sha256
    assert index_of(changed, "s3://bucket/x").sha256 == index_of(small_data, "s3://bucket/x").sha256
    assert (index_of(changed).has_hashes, index_of(changed, "s3://bucket/x").has_hashes) == (True, False)
    with MDSWriter(out=str(tmp_path / "zipped"), columns={"image": "bytes"}, compression="zstd") as writer:
        writer.write({"image": encoded_image(0)})
    before = index_of(tmp_path / "zipped")
    open_mds(before).load(0)
    assert (tmp_path / "zipped" / "shard.00000.mds").exists()
    assert index_of(tmp_path / "zipped").sha256 == before.sha256


def test_refuses_to_start_with_too_little_shared_memory(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker would be killed by SIGBUS: 14 batches of 16 images take 3 × 224 × 224 bytes an image."""
    workers = ("train_loader.num_workers=2", "train_loader.prefetch_factor=6")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 60 << 20, 4 << 20))
    train_loader(small_data, *workers)
    problem = r"^/dev/shm: 4,194,304 of 67,108,864 bytes are free, .* need 33,9.*docker run --shm-size="
    with pytest.raises(InputError, match=problem):
        train_loader(small_data, *workers, size=224)

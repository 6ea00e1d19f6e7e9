"""Parts of a conversion and of embeddings, in any order and killed, make what one command would have made."""

import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from streaming import StreamingDataset

from containers import write_all, write_parquet
from gated_store import GatedStore
from helpers import (
    D2V,
    GOLDEN,
    contents_of,
    d2v,
    encoded_image,
    failure,
    run_ranks,
    start_python,
    started_ranks,
    succeed,
    wait_until,
    write_files,
    write_images,
    write_mds,
)

NUM_IMAGES = 60
TEACHER = GOLDEN / "tiny_base.pt"
CONVERT = ("--shard-size", "9kb", "--workers", "1")
EMBED = ("--batch-size", "4", "--workers", "0")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    images = [encoded_image(number) for number in range(NUM_IMAGES)]
    return write_all(tmp_path_factory.mktemp("sources"), images, [number % 4 for number in range(NUM_IMAGES)], 4)


def make_parts(count: int, *command: str | Path, kill: bool = True, **options: Any) -> None:
    """Make the parts in random order; kill one at a random moment and start it again."""
    dice = random.Random(count)
    numbers = dice.sample(range(count), count)
    if kill:
        killed = start_python(*D2V, *command, "--part", f"{numbers[0]}/{count}", **options)
        time.sleep(dice.uniform(0.5, 2))
        killed.kill()
    for number in numbers:
        succeed(*command, "--part", f"{number}/{count}", **options)


def shards_of(folder: Path) -> list[dict[str, Any]]:
    """Return the shards in the index, without their names, which tell the parts."""
    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    return [shard | {"raw_data": shard["raw_data"] | {"basename": ""}} for shard in shards]


def samples_of(folder: Path) -> list[tuple[bytes, int]]:
    """Read a data set as Streaming does."""
    return sorted((sample["image"], sample["label"]) for sample in StreamingDataset(local=str(folder), batch_size=1))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("folder", 3),
        *(slow(*case) for case in itertools.product(("folder", "tars", "mds"), (1, 16))),
        *(slow(kind, 3) for kind in ("tars", "zips", "struct")),
    ],
)
def test_parts_of_a_conversion(sources: dict[str, list[str]], tmp_path: Path, kind: str, count: int) -> None:
    """Files are shared if there are enough, and else whole shards, which are then those of one command."""
    source, *options = sources[kind]
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeed("convert-images", source, whole, *options, *CONVERT)
    make_parts(count, "convert-images", source, out, *options, *CONVERT)
    assert not (out / "index.json").exists()
    (out / "conversion.json").write_text("{}")
    assert not_merged(out) == f"error: {out} holds another data set; remove its conversion.json"
    (out / "conversion.json").unlink()
    report = succeed("merge", out).stdout
    assert f"wrote {out}: {NUM_IMAGES} samples" in report
    assert f" train distill.yaml train_loader.local={out}" in report
    assert samples_of(out) == samples_of(whole)
    if kind == "folder" or count != 3:  # not of files
        assert shards_of(out) == shards_of(whole)
        assert (out / "conversion.json").read_bytes() == (whole / "conversion.json").read_bytes()
    before = contents_of(out)
    again = succeed("convert-images", source, out, *options, *CONVERT, "--part", f"{count - 1}/{count}")
    assert "exists already" in again.stdout
    succeed("merge", out)
    assert contents_of(out) == before


@pytest.mark.parametrize(
    ("kind", "count", "suffix"),
    [
        ("folder", 3, ".npy"),
        ("tars", 3, ".parquet"),
        *(slow(*case) for case in itertools.product(("folder", "bytes", "mds"), (1, 16), (".npy", ".parquet"))),
    ],
)
def test_parts_of_embeddings(sources: dict[str, list[str]], tmp_path: Path, kind: str, count: int, suffix: str) -> None:
    """Batches are shared, so that the rows have the same bits; files, whose batches are others, to the last digits."""
    source, whole, out = sources[kind][0], tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    succeed("embed", TEACHER, source, whole, *EMBED)
    make_parts(count, "embed", TEACHER, source, out, *EMBED)
    assert not out.exists()
    assert f"wrote {out}: {NUM_IMAGES} embeddings of 48 dimensions" in succeed("merge", out).stdout
    table, expected = map(read_table, (out, whole))
    assert table[0] == expected[0]
    if kind == "tars":
        np.testing.assert_allclose(table[1], expected[1], rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(table[1], expected[1])
    if suffix == ".npy" and kind != "tars":
        assert contents_of(tmp_path)["out.npy"] == whole.read_bytes()
    assert "exists already" in succeed("embed", TEACHER, source, out, *EMBED, "--part", f"0/{count}").stdout
    assert not_merged(out) == f"error: {out} already exists; choose another file, or append --overwrite"


def read_table(path: Path) -> tuple[list[Any], np.ndarray]:
    """Return ids and embeddings."""
    if path.suffix == ".npy":
        return np.load(path.with_suffix(".ids.npy")).tolist(), np.load(path)
    table: Any = pq.read_table(path)
    assert table.column_names == ["id", "embedding"]
    return table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32)


def convert_part(source: list[str], out: Path, part: str) -> None:
    succeed("convert-images", source[0], out, *source[1:], *CONVERT, "--part", part)


def embed_part(source: list[str], out: Path, part: str, *options: str) -> None:
    succeed("embed", TEACHER, source[0], out, *EMBED, *options, "--part", part)


def not_merged(out: Path) -> str:
    return failure(d2v("merge", out), 2)


@pytest.fixture(scope="module")
def whole_halves(sources: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parts of a conversion to ``out`` and of embeddings in ``table.npy``; read-only."""
    folder = tmp_path_factory.mktemp("halves")
    for part in ("0/2", "1/2"):
        convert_part(sources["folder"], folder / "out", part)
        embed_part(sources["folder"], folder / "table.npy", part)
    return folder


@pytest.fixture
def halves(whole_halves: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(whole_halves, tmp_path / "halves")


def test_a_missing_part_is_named(halves: Path) -> None:
    shutil.rmtree(halves / "out" / "parts" / "00001-of-00002")
    for path in halves.glob("table.npy.parts/00001-of-00002.*"):
        path.unlink()
    for out, parts in ((halves / "out", halves / "out" / "parts"), (halves / "table.npy", halves / "table.npy.parts")):
        assert not_merged(out) == f"error: {parts}: of 2 parts, these are missing: 1"


def test_parts_of_another_command_are_named(sources: dict[str, list[str]], halves: Path) -> None:
    """They are of other images, made otherwise, doubled, or one of another number of parts."""
    out, table = halves / "out", halves / "table.npy"
    first, second = (out / "parts" / f"0000{number}-of-00002" for number in range(2))
    another = "was made with another source, labels, label_column than this command; remove it"
    refused = d2v("convert-images", *sources["bytes"], out, *CONVERT, "--part", "1/2")
    assert failure(refused, 2).endswith(f"00001-of-00002 {another}")
    for path in halves.glob("table.npy.parts/00001-of-00002.*"):
        path.unlink()
    embed_part(sources["folder"], table, "1/2", "--normalize")
    said = "00001-of-00002.npy was made with another normalize than 00000-of-00002; remove it"
    assert not_merged(table).endswith(said)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    assert not_merged(out) == f"error: {first} holds part 1 of 2; remove it"
    shutil.rmtree(first)
    convert_part(sources["folder"], out, "0/3")
    assert not_merged(out) == f"error: {out}/parts has parts i/2 and i/3; keep only one set"


def test_parts_whose_images_changed_are_not_merged(tmp_path: Path) -> None:
    """A Parquet file of paths is the same, but not the images that it names."""
    names = [f"{number}.png" for number in range(8)]
    source = [str(write_parquet(write_images(tmp_path, names) / "x.parquet", {"path": names}))]
    embed_part(source, tmp_path / "o.npy", "0/2")
    (tmp_path / "0.png").write_bytes(encoded_image(9) + b"more")
    embed_part(source, tmp_path / "o.npy", "1/2")
    assert not_merged(tmp_path / "o.npy").endswith("was made with another source than 00000-of-00002; remove it")


def test_a_damaged_part_is_named(halves: Path) -> None:
    """A shard, an index, rows, or ids of other rows."""
    out, table = halves / "out", halves / "table.npy"
    shard = next((out / "parts" / "00001-of-00002").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not_merged(out).endswith(f"{shard.name} is missing or damaged; remove this part")
    index = out / "parts" / "00000-of-00002" / "index.json"
    index.write_bytes(index.read_bytes()[:-1])
    assert not_merged(out).startswith(f"error: {index} cannot be read: ")
    rows = halves / "table.npy.parts" / "00001-of-00002.npy"
    whole_rows, whole_ids = rows.read_bytes(), np.load(rows.with_suffix(".ids.npy"))
    for bad_rows, bad_ids in ((whole_rows[:-1], whole_ids), (whole_rows, whole_ids[:-1])):
        rows.write_bytes(bad_rows)
        np.save(rows.with_suffix(".ids.npy"), bad_ids)
        assert not_merged(table).startswith(f"error: {rows} cannot be read: ")
    assert not table.exists()


def test_a_part_is_refused_in_one_line(sources: dict[str, list[str]], tmp_path: Path) -> None:
    """It would stand beside the user's files, or is none of the parts."""
    mine = write_files(tmp_path / "mine", {"notes.txt": b""})
    refused = d2v("convert-images", *sources["folder"], mine, "--part", "0/2")
    said = f"error: {mine} holds something other than parts: notes.txt; choose another OUT"
    assert failure(refused, 2) == said
    assert os.listdir(mine) == ["notes.txt"]
    refused = d2v("embed", TEACHER, sources["folder"][0], tmp_path / "table.npy", "--part", "3/3")
    assert failure(refused, 2) == "error: argument --part: must be I/N with I from 0 to N - 1, got '3/3'"


def test_parts_with_other_labels_are_not_merged(sources: dict[str, list[str]], tmp_path: Path) -> None:
    """Labels may come from another column, or from another CSV file with the same classes."""
    (tmp_path / "other.csv").write_text("\n".join(f"{number:05}.png,{-number % 4}" for number in range(NUM_IMAGES)))
    (folder, *by_csv), (tars, *by_column) = sources["folder"], sources["tars"]
    for source, first, second in (
        (folder, by_csv, ["--labels", str(tmp_path / "other.csv")]),
        (tars, by_column, ["--label-column", "txt"]),
    ):
        out = tmp_path / Path(source).name
        convert_part([source, *first], out, "0/2")
        convert_part([source, *second], out, "1/2")
        message = not_merged(out)
        assert message.endswith(" than 00000-of-00002; remove it")
        assert "00001-of-00002 was made with another label" in message


def test_a_killed_part_goes_on_where_its_source_has_another_path(tmp_path: Path) -> None:
    images = [encoded_image(number % 50, size=16) for number in range(1200)]
    here, there = write_mds(tmp_path / "here", images), tmp_path / "there"
    command = (*D2V, "embed", TEACHER, here, tmp_path / "out.npy", "--batch-size", "64", "--part", "0/1")
    killed = start_python(*command)
    wait_until(lambda: [*tmp_path.glob("out.npy.parts/.*.partial/*.npz")], seconds=60)
    killed.kill()
    here.rename(there)
    assert "resumed an interrupted run after " in succeed(*command[2:4], there, *command[5:]).stdout


def test_ranks_embed_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed with two ranks, a run goes on with one."""
    data = write_mds(tmp_path / "data", [encoded_image(number % 50, size=16) for number in range(3000)])
    whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
    command = *D2V, "embed", TEACHER, data
    options = ("--batch-size", "64", "--workers", "0")
    succeed(*command[2:], whole, *options)
    with started_ranks(*command, out, *options, ranks=2) as ranks:
        wait_until(lambda: [*tmp_path.glob(".out.npy.partial/*.npz")], seconds=60)
        for process in ranks:
            process.kill()
    assert "resumed an interrupted run after " in succeed(*command[2:], out, *options).stdout
    assert out.read_bytes() == whole.read_bytes()
    run_ranks(*command, out, *options, "--overwrite")
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / ".out.npy.partial").exists()


@pytest.mark.slow
def test_parts_in_a_store(sources: dict[str, list[str]], object_store: GatedStore, tmp_path: Path) -> None:
    """Each on a machine that has nothing in common with the others but the store."""
    source, *options = sources["tars"]
    bucket = object_store.create_bucket("parts")
    succeed("convert-images", source, tmp_path / "whole", *options, *CONVERT)
    succeed("embed", TEACHER, source, tmp_path / "whole.npy", *EMBED)
    for number in (2, 0, 1):
        reach = {"environment": object_store.environment | {"TORCH_HOME": str(tmp_path / f"home{number}")}}
        succeed("convert-images", source, f"{bucket}/data", *options, *CONVERT, "--part", f"{number}/3", **reach)
        succeed("embed", TEACHER, source, f"{bucket}/table.npy", *EMBED, "--part", f"{number}/3", **reach)
        if number != 1:
            for name in ("data", "table.npy"):
                assert "of 3 parts, these are missing: " in failure(d2v("merge", f"{bucket}/{name}", **reach), 2)
    shard = max(key for key in object_store.objects("parts") if key.endswith(".mds"))
    with object_store.replaced("parts", shard, b"x"):
        assert "is missing or damaged; remove this part" in failure(d2v("merge", f"{bucket}/data", **reach), 2)
    for name in ("data", "table.npy"):
        succeed("merge", f"{bucket}/{name}", **reach)
    write_files(tmp_path, object_store.objects("parts"))
    table, expected = map(read_table, (tmp_path / "table.npy", tmp_path / "whole.npy"))
    assert table[0] == expected[0]
    np.testing.assert_allclose(table[1], expected[1], rtol=0, atol=2e-6)
    assert samples_of(tmp_path / "data") == samples_of(tmp_path / "whole")
    message = failure(d2v("embed", TEACHER, source, f"{bucket}/table.npy", *EMBED, **reach), 2)
    assert message == f"error: {bucket}/table.npy already exists; choose another file, or append --overwrite"

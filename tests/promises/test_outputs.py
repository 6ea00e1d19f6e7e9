"""Promises 7, 9, 11, 13 and 21: what a command writes replaces nothing of others; parts make what one command makes.

What would be written is asked for before the work, and again under its lock. Parts may come in any order, and killed.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
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
    ROOT,
    assert_gone,
    contents_of,
    d2v,
    encoded_image,
    failure,
    family_of,
    run_ranks,
    slow,
    start_python,
    started_ranks,
    succeed,
    wait_until,
    write_files,
    write_images,
    write_mds,
)

NUM_IMAGES = 60
TEACHER = str(GOLDEN / "tiny_base.pt")
BUCKET = "outputs"
EMBED, CONVERT = ("embed", TEACHER, "photos", "o.npy"), ("convert-images", "photos", "o", "--labels", "none")
PART = ("--part", "0/2")


@pytest.fixture(scope="module")
def store(object_store: GatedStore) -> GatedStore:
    object_store.create_bucket(BUCKET)
    return object_store


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", [f"{number}.jpg" for number in range(8)])


class Place:
    """A folder, or a prefix of a store."""

    def __init__(self, folder: Path, store: GatedStore | None) -> None:
        self.folder, self.store, self.prefix = folder, store, f"{folder.name}/"
        environment = {} if store is None else {**store.environment, "TORCH_HOME": str(folder / "torch")}
        self.options: dict[str, Any] = {"cwd": folder, "environment": environment}

    def name(self, out: str) -> str:
        return str(self.folder / out) if self.store is None else f"s3://{BUCKET}/{self.prefix}{out}"

    def write(self, name: str, content: bytes) -> None:
        if self.store is None:
            write_files(self.folder, {name: content})
        else:
            self.store.client().put_object(Bucket=BUCKET, Key=self.prefix + name, Body=content)

    def contents(self) -> Mapping[str, bytes | None]:
        """Return the files whose names begin with that of the output."""
        if self.store is not None:
            return self.store.objects(BUCKET, self.prefix)
        contents = contents_of(self.folder)
        return {name: content for name, content in contents.items() if name[0] == "o" and content is not None}

    def command(self, *arguments: str) -> list[str]:
        return [self.name(word) if word in ("o", "o.npy") else word for word in arguments]


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, photos: Path) -> Place:
    return Place(tmp_path, request.getfixturevalue("store") if request.param == "store" else None)


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        (EMBED, "o.npy"),
        (EMBED, "o.ids.npy"),
        (EMBED, "o.model.json"),
        ((*EMBED, *PART), "o.npy.parts/00000-of-00002.ids.npy"),
        ((*EMBED, *PART), "o.npy.parts/00000-of-00002.json"),
        (CONVERT, "o/shard.00000.mds"),
        (CONVERT, "o/conversion.json"),
        (CONVERT, "o/deep/notes.txt"),
        ((*CONVERT, *PART), "o/notes.txt"),
        ((*CONVERT, *PART), "o/parts/00000-of-00002/shard.00000.mds"),
    ],
)
def test_a_file_of_no_record_of_ours_is_not_replaced(place: Place, command: tuple[str, ...], foreign: str) -> None:
    """Promises 7 and 11: one line names it, and nothing is written beside it."""
    place.write(foreign, b"{}")
    assert place.name("o") in failure(d2v(*place.command(*command), **place.options), 2)
    assert place.contents() == {foreign: b"{}"}


RECORD = "o.npy.parts/00000-of-00002"


@pytest.mark.parametrize(
    ("command", "left", "finished"),
    [
        (CONVERT, {"o/conversion.json": b'{"seed": 0}', "o/shard.00000.mds": b"half"}, "o/index.json"),
        ((*EMBED, *PART), {f"{RECORD}.json": b'{"part": {}}', f"{RECORD}.ids.npy": b"half"}, f"{RECORD}.npy"),
    ],
)
def test_what_died_on_another_machine_is_made_again(
    place: Place, command: tuple[str, ...], left: Mapping[str, bytes], finished: str
) -> None:
    """Promises 9 and 10: only a record of ours, beside the output, shows whose it is."""
    for name, content in left.items():
        place.write(name, content)
    succeed(*place.command(*command), **place.options)
    contents = place.contents()
    assert finished in contents
    assert not [name for name in left if contents[name] == left[name]]


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        (["embed", "MODEL", "photos", "o.npy"], {"o.npy", "o.ids.npy", "o.model.json"}),
        (["export", "MODEL", "o.safetensors"], {"o.safetensors"}),
    ],
)
def test_what_came_meanwhile_is_not_replaced(
    command: list[str], outputs: set[str], store: GatedStore, photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Promises 7 and 11: the second command has looked for its outputs, and waits for its model, until the
    first has ended.
    """
    model, place = TEACHER if command[0] == "embed" else str(uninterrupted / "latest-rank0.pt"), Place(tmp_path, None)
    store.client().upload_file(model, BUCKET, "model.pt")
    name, _, *rest = command
    with store.unreachable():
        variables = store.environment | {"TORCH_HOME": str(tmp_path)}
        second = start_python(*D2V, name, f"s3://{BUCKET}/model.pt", *rest, cwd=tmp_path, environment=variables)
        wait_until(lambda: "retrying" in second.stderr, 60)
        succeed(name, model, *rest, cwd=tmp_path)
        before = place.contents()
        assert before.keys() == outputs
    second.wait(120)
    assert f"{command[-1]} already exists; choose another" in failure(second, 2)
    assert place.contents() == before


# Commands that write; OUT is the place.
DISTILLS = "distill photos --teacher TEACHER --out OUT"
EMBEDS = "embed TEACHER photos OUT"
EVALUATES = "evaluate model=TEACHER out=OUT"
TRAINS = "train quickstart save_folder=OUT"
WRITERS = (
    "align TEACHER photos OUT --index o.npy",
    "convert-audio photos OUT",
    "convert-images photos OUT --labels none",
    "convert-teacher TEACHER OUT",
    DISTILLS,
    EMBEDS,
    EVALUATES,
    "export TEACHER OUT",
    "merge OUT",
    "random-teacher base OUT",
    "report OUT",
    TRAINS,
)


@pytest.mark.parametrize(
    ("writer", "out"),
    [
        *((writer, "") for writer in WRITERS),
        # Their places are of four kinds: anywhere, on this machine, a run's, and a comparison's.
        *itertools.product((EMBEDS, DISTILLS, TRAINS, EVALUATES), ("/", "//.", "s3://bucket/")),
    ],
)
def test_no_place_is_refused(writer: str, out: str, photos: Path, tmp_path: Path) -> None:
    """Promises 7 and 18: an empty place, as of an unset variable, or a root, is one line; nothing of this
    folder is touched.
    """
    write_files(tmp_path, {"shard.00007.mds": b"of another data set", "o.npy": b""})
    (tmp_path / "quickstart").write_bytes((ROOT / "yamls" / "quickstart.yaml").read_bytes())
    before = contents_of(tmp_path)
    words = [word.replace("TEACHER", TEACHER).replace("OUT", out) for word in writer.split()]
    line = failure(d2v(*words, cwd=tmp_path), 2)
    assert any(words in line for words in ("not the root of", "printable", "on this machine")), line
    assert contents_of(tmp_path) == before


# Parts.

SMALL_SHARDS = ("--shard-size", "9kb", "--workers", "1")
SMALL_BATCHES = ("--batch-size", "4", "--workers", "0")
Sources = dict[str, list[str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The same labeled images in each kind of source: SOURCE and the options of its labels."""
    images = [encoded_image(number) for number in range(NUM_IMAGES)]
    return write_all(tmp_path_factory.mktemp("sources"), images, [number % 4 for number in range(NUM_IMAGES)], 4)


def convert(source: list[str], out: Path | str, *part: str, **options: Any) -> str:
    return succeed("convert-images", source[0], out, *source[1:], *SMALL_SHARDS, *part, **options).stdout


def embed(source: list[str], out: Path | str, *part: str, **options: Any) -> str:
    return succeed("embed", TEACHER, source[0], out, *SMALL_BATCHES, *part, **options).stdout


def not_merged(out: Path | str, **options: Any) -> str:
    return failure(d2v("merge", out, **options), 2)


def make_parts(count: int, *command: str | Path) -> None:
    """Make the parts in random order; kill one at a random moment and start it again."""
    dice = random.Random(count)
    numbers = dice.sample(range(count), count)
    killed = start_python(*D2V, *command, "--part", f"{numbers[0]}/{count}")
    time.sleep(dice.uniform(0.5, 2))
    killed.kill()
    for number in numbers:
        succeed(*command, "--part", f"{number}/{count}")


def shards_of(folder: Path) -> list[dict[str, Any]]:
    """Return the shards in the index, without their names, which tell the parts."""
    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    return [shard | {"raw_data": shard["raw_data"] | {"basename": ""}} for shard in shards]


def samples_of(folder: Path) -> list[tuple[bytes, int]]:
    """Read a data set as Streaming does."""
    return sorted((sample["image"], sample["label"]) for sample in StreamingDataset(local=str(folder), batch_size=1))


def read_table(path: Path) -> tuple[list[Any], np.ndarray]:
    """Return ids and embeddings."""
    if path.suffix == ".npy":
        return np.load(path.with_suffix(".ids.npy")).tolist(), np.load(path)
    table: Any = pq.read_table(path)
    assert table.column_names == ["id", "embedding"]
    return table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("folder", 3),
        *(slow(*case) for case in itertools.product(("folder", "tars", "mds"), (1, 16))),
        *(slow(kind, 3) for kind in ("tars", "zips", "struct")),
    ],
)
def test_parts_of_a_conversion(sources: Sources, tmp_path: Path, kind: str, count: int) -> None:
    """Promise 9: parts share the files if there are enough; else they share whole shards, which are those of
    one command.
    """
    (source, *options), whole, out = sources[kind], tmp_path / "whole", tmp_path / "out"
    convert(sources[kind], whole)
    make_parts(count, "convert-images", source, out, *options, *SMALL_SHARDS)
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
    assert "exists already" in convert(sources[kind], out, "--part", f"{count - 1}/{count}")
    succeed("merge", out)
    assert contents_of(out) == before


@pytest.mark.parametrize(
    ("kind", "count", "suffix"),
    [
        ("folder", 3, ".npy"),
        slow("tars", 3, ".parquet"),
        *(slow(*case) for case in itertools.product(("folder", "bytes", "mds"), (1, 16), (".npy", ".parquet"))),
    ],
)
def test_parts_of_embeddings(sources: Sources, tmp_path: Path, kind: str, count: int, suffix: str) -> None:
    """Promise 21: parts share batches, and the rows have the same bits, or share files, and the rows are
    nearly the same.
    """
    source, whole, out = sources[kind], tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    embed(source, whole)
    make_parts(count, "embed", TEACHER, source[0], out, *SMALL_BATCHES)
    assert not out.exists()
    assert f"wrote {out}: {NUM_IMAGES} embeddings of 48 dimensions" in succeed("merge", out).stdout
    (ids, rows), (expected_ids, expected_rows) = map(read_table, (out, whole))
    assert ids == expected_ids
    np.testing.assert_allclose(rows, expected_rows, rtol=0, atol=2e-6 if kind == "tars" else 0)
    if suffix == ".npy" and kind != "tars":
        assert out.read_bytes() == whole.read_bytes()
    assert "exists already" in embed(source, out, "--part", f"0/{count}")
    assert not_merged(out) == f"error: {out} already exists; choose another file, or append --overwrite"


@pytest.fixture(scope="module")
def whole_halves(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parts of a conversion to ``out`` and of embeddings in ``table.npy``; read-only."""
    folder = tmp_path_factory.mktemp("halves")
    for part in ("0/2", "1/2"):
        convert(sources["folder"], folder / "out", "--part", part)
        embed(sources["folder"], folder / "table.npy", "--part", part)
    return folder


@pytest.fixture
def halves(whole_halves: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(whole_halves, tmp_path / "halves")


def remove_second_half(table: Path) -> None:
    for path in table.parent.glob("table.npy.parts/00001-of-00002.*"):
        path.unlink()


def test_a_missing_part_is_named(halves: Path) -> None:
    """Promises 9 and 21: merging a conversion or embeddings asks for the part by its number."""
    out, table = halves / "out", halves / "table.npy"
    shutil.rmtree(out / "parts" / "00001-of-00002")
    remove_second_half(table)
    for whole, parts in ((out, out / "parts"), (table, halves / "table.npy.parts")):
        assert not_merged(whole) == f"error: {parts}: of 2 parts, these are missing: 1"


def test_parts_of_another_command_are_named(sources: Sources, halves: Path) -> None:
    """Promises 9 and 21: they are of other images, made otherwise, doubled, or one of another number of parts."""
    out, table = halves / "out", halves / "table.npy"
    first, second = (out / "parts" / f"0000{number}-of-00002" for number in range(2))
    another = "differs from this command in source, labels, label_column; remove it"
    refused = d2v("convert-images", *sources["bytes"], out, *SMALL_SHARDS, "--part", "1/2")
    assert failure(refused, 2).endswith(f"00001-of-00002 {another}")
    remove_second_half(table)
    embed(sources["folder"], table, "--normalize", "--part", "1/2")
    said = "00001-of-00002.npy differs from 00000-of-00002 in normalize; remove it"
    assert not_merged(table).endswith(said)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    assert not_merged(out) == f"error: {first} is in fact part 1/2; remove it"
    shutil.rmtree(first)
    convert(sources["folder"], out, "--part", "0/3")
    made = "made with --part I/2 and --part I/3; keep only those made with one of them"
    assert not_merged(out) == f"error: {out}/parts has parts {made}"


def test_parts_whose_images_changed_are_not_merged(tmp_path: Path) -> None:
    """Promise 9: a Parquet file of paths is the same, but not the images that it names."""
    names = [f"{number}.png" for number in range(8)]
    source = [str(write_parquet(write_images(tmp_path, names) / "x.parquet", {"path": names}))]
    embed(source, tmp_path / "o.npy", "--part", "0/2")
    (tmp_path / "0.png").write_bytes(encoded_image(9) + b"more")
    embed(source, tmp_path / "o.npy", "--part", "1/2")
    assert not_merged(tmp_path / "o.npy").endswith("differs from 00000-of-00002 in source; remove it")


@pytest.mark.slow
def test_parts_with_other_labels_are_not_merged(sources: Sources, tmp_path: Path) -> None:
    """Promise 9: labels may come from another column, or from another CSV file with the same classes."""
    (tmp_path / "other.csv").write_text("\n".join(f"{number:05}.png,{-number % 4}" for number in range(NUM_IMAGES)))
    for kind, options in (("folder", ["--labels", str(tmp_path / "other.csv")]), ("tars", ["--label-column", "txt"])):
        source, out = sources[kind], tmp_path / kind
        convert(source, out, "--part", "0/2")
        convert([source[0], *options], out, "--part", "1/2")
        assert "00001-of-00002 differs from 00000-of-00002 in label" in not_merged(out)


def test_a_damaged_part_is_named(halves: Path) -> None:
    """Promises 5, 9 and 21: a shard or an index is damaged, rows are cut, or ids are missing."""
    out, table = halves / "out", halves / "table.npy"
    shard = next((out / "parts" / "00001-of-00002").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not_merged(out).endswith(f"{shard.name} is missing or damaged; remove this part, and run its command again")
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


def test_a_part_is_made_again_after_the_merge(sources: Sources, halves: Path) -> None:
    """Promises 5 and 9: a shard is lost later, and merge says to run the part's command again."""
    out = halves / "out"
    succeed("merge", out)
    before = contents_of(out)
    shutil.rmtree(out / "parts" / "00001-of-00002")
    assert not_merged(out) == f"error: {out}/parts: of 2 parts, these are missing: 1"
    convert(sources["folder"], out, "--part", "1/2")
    succeed("merge", out)
    assert contents_of(out) == before


def test_a_part_is_refused_in_one_line(sources: Sources, tmp_path: Path) -> None:
    """Promises 7 and 18: it would stand beside the user's files, or is none of the parts."""
    mine = write_files(tmp_path / "mine", {"notes.txt": b""})
    refused = d2v("convert-images", *sources["folder"], mine, *PART)
    said = f"error: {mine} has files other than parts, such as notes.txt; choose another OUT"
    assert failure(refused, 2) == said
    assert os.listdir(mine) == ["notes.txt"]
    refused = d2v("embed", TEACHER, sources["folder"][0], tmp_path / "table.npy", "--part", "3/3")
    assert failure(refused, 2) == "error: argument --part: must be I/N with 0 <= I < N <= 100,000, got '3/3'"


def test_a_killed_part_goes_on_where_its_source_has_another_path(tmp_path: Path) -> None:
    """Promise 21: what was embedded counts, though SOURCE has moved."""
    images = [encoded_image(number % 50, size=16) for number in range(1200)]
    here, options = write_mds(tmp_path / "here", images), (tmp_path / "out.npy", "--batch-size", "64", "--part", "0/1")
    killed = start_python(*D2V, "embed", TEACHER, here, *options)
    wait_until(lambda: [*tmp_path.glob("out.npy.parts/.*.partial/*.npz")], seconds=60)
    killed.kill()
    there = here.rename(tmp_path / "there")
    assert "resumed an interrupted run after " in succeed("embed", TEACHER, there, *options).stdout


def test_ranks_and_interrupted_commands_embed_to_the_same_bytes(tmp_path: Path) -> None:
    """Promise 21: killed with two ranks, then interrupted twice with one, it goes on, and one line says how to."""
    data = write_mds(tmp_path / "data", [encoded_image(number % 50, size=16) for number in range(3000)])
    whole, out, options = tmp_path / "whole.npy", tmp_path / "out.npy", ("--batch-size", "64", "--workers")
    succeed("embed", TEACHER, data, whole, *options, "0")
    command = ("embed", TEACHER, data, out, *options)
    with started_ranks(*D2V, *command, "0", ranks=2) as ranks:
        wait_until(lambda: [*tmp_path.glob(".out.npy.partial/*.npz")], seconds=60)
        for process in ranks:
            process.kill()
    for sent, name in ((signal.SIGINT, "Interrupted"), (signal.SIGTERM, "SIGTERM")):
        program = start_python(*D2V, *command, "1")
        # The program, its resource tracker and a worker.
        wait_until(lambda program=program: len(family_of(program.pid)) > 2, seconds=60)
        time.sleep(random.uniform(0, 0.1))
        family = family_of(program.pid)
        os.killpg(program.pid, sent)
        assert program.wait(30) == 128 + sent, program.stderr
        assert_gone(family)
        assert program.stderr.splitlines()[-1].startswith(name)
        assert not out.exists()
    assert "resumed an interrupted run after " in succeed(*command, "1").stdout
    assert out.read_bytes() == whole.read_bytes()
    run_ranks(*D2V, *command, "0", "--overwrite")
    assert out.read_bytes() == whole.read_bytes()
    assert np.isfinite(np.load(out)).all()
    assert not (tmp_path / ".out.npy.partial").exists()


@pytest.mark.slow
def test_parts_in_a_store(sources: Sources, object_store: GatedStore, tmp_path: Path) -> None:
    """Promises 9 and 21: each part is made on a machine that shares nothing with the others but the store."""
    source, bucket = sources["tars"], object_store.create_bucket("parts")
    data, table = f"{bucket}/data", f"{bucket}/table.npy"
    convert(source, tmp_path / "whole")
    embed(source, tmp_path / "whole.npy")
    for number in (2, 0, 1):
        reach = {"environment": object_store.environment | {"TORCH_HOME": str(tmp_path / f"home{number}")}}
        convert(source, data, "--part", f"{number}/3", **reach)
        embed(source, table, "--part", f"{number}/3", **reach)
        if number != 1:
            assert all("of 3 parts, these are missing: " in not_merged(out, **reach) for out in (data, table))
    shard = max(key for key in object_store.objects("parts") if key.endswith(".mds"))
    with object_store.replaced("parts", shard, b"x"):
        assert "is missing or damaged; remove this part, and run its command again" in not_merged(data, **reach)
    for out in (data, table):
        succeed("merge", out, **reach)
    write_files(tmp_path, object_store.objects("parts"))
    (ids, rows), (expected_ids, expected_rows) = map(read_table, (tmp_path / "table.npy", tmp_path / "whole.npy"))
    assert ids == expected_ids
    np.testing.assert_allclose(rows, expected_rows, rtol=0, atol=2e-6)
    assert samples_of(tmp_path / "data") == samples_of(tmp_path / "whole")
    message = failure(d2v("embed", TEACHER, source[0], table, *SMALL_BATCHES, **reach), 2)
    assert message == f"error: {table} already exists; choose another file, or append --overwrite"

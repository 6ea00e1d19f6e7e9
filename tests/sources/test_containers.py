"""Parquet files, tars and zips are sources as folders and MDS are: locally, in a store and on the hub."""

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from streaming.base.format.mds import MDSReader

from containers import FEATURES, write_all, write_parquet, write_tar, write_zip
from d2v_composer.commands import convert_images, embed
from d2v_composer.conversion.convert import Conversion, open_samples
from d2v_composer.data.images import Images
from d2v_composer.sources import NAMES
from d2v_composer.sources.labeled import EvaluationSet, load_labeled_set
from d2v_composer.sources.open import open_source
from d2v_composer.system.errors import InputError
from gated_store import GatedStore
from helpers import GOLDEN, QUICKSTART, encoded_image, slow, truncated, write_files, write_mds
from hub_stub import serve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images in each kind of source, three in a file; read-only."""
    root = tmp_path_factory.mktemp("nine")
    write_all(root, [encoded_image(number) for number in range(9)], [0] * 9)
    return root


def stored(folder: Path) -> list[tuple[bytes, int]]:
    """The images and labels of a converted data set, sorted."""
    index = json.loads((folder / "index.json").read_bytes())
    shards = [MDSReader.from_json(str(folder), None, shard) for shard in index["shards"]]
    return sorted((sample["image"], int(sample["label"])) for shard in shards for sample in shard)


def write_everywhere(root: Path, count: int, store: GatedStore) -> dict[str, list[str]]:
    """Write CIFAR-10's first images as each kind of source, some of them also to a store and to a hub."""
    cifar10 = open_source(str(QUICKSTART / "cifar10" / "train"), Images(), label_column="label")
    assert cifar10.label is not None
    sources = write_all(root / "in", [*map(cifar10.load, range(count))], [*map(cifar10.label, range(count))])
    bucket = f"containers-{count}"
    address = store.create_bucket(bucket)
    for kind in ("struct", "tars", "zips"):
        for path in (root / "in" / kind).iterdir():
            store.client().upload_file(str(path), bucket, f"sets/{kind}/{path.name}")
        sources[f"s3 {kind}"] = [f"{address}/sets/{kind}", *sources[kind][1:]]
    sources["s3 glob"] = [f"{address}/**/struct/**", *sources["struct"][1:]]
    shutil.copytree(root / "in" / "struct", root / "hub" / "org" / "birds" / "main" / "data")
    sources["hub"] = ["hf://datasets/org/birds", *sources["struct"][1:]]
    return sources


@pytest.mark.parametrize(("count", "workers"), [(60, "0"), slow(2000, "2")])
def test_the_same_images_from_everywhere(
    count: int, workers: str, reachable_store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set of converted samples, and the same bits as embeddings, whatever the images lie in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    sources, samples, embedded = write_everywhere(tmp_path, count, reachable_store), {}, {}
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        for kind, (source, *options) in sources.items():
            if kind != "mds":
                assert converted(source, tmp_path / "out" / kind, *options).samples == count
                samples[kind] = stored(tmp_path / "out" / kind)
            out = tmp_path / f"{kind}.npy"
            embed.main([str(GOLDEN / "tiny_base.pt"), source, str(out), "--workers", workers])
            embedded[kind] = np.load(out)
            assert len(np.unique(np.load(tmp_path / f"{kind}.ids.npy"))) == count
        assert len(server.asked) == 3  # once each, and then from the cache
    assert len(samples["folder"]) == len(embedded["folder"]) == count
    assert {kind for kind in samples if samples[kind] != samples["folder"]} == set()
    assert {kind for kind in embedded if not np.array_equal(embedded[kind], embedded["folder"])} == set()


def converted(source: Path | str, out: Path, *options: str) -> Conversion:
    return convert_images.main([str(source), str(out), "--workers", "1", *options])


def labels_of(source: Path, out: Path, *options: str) -> tuple[list[int], list[str] | None]:
    """Return the labels, sorted by their images, and the names of the classes in a converted data set."""
    converted(source, out, *options)
    return [label for _, label in stored(out)], json.loads((out / "conversion.json").read_bytes())["classes"]


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """img2dataset's folder: tars and their tables."""
    folder = tmp_path / "laion"
    members = [(f"{i:05}.{suffix}", encoded_image(i)) for i in range(9) for suffix in ("jpg", "txt", "json")]
    strange = {"./._00001.jpg": b"", "sub/notes": b"", "00011.json": b"{}", "./a.b/00010.seg.JPG": encoded_image(10)}
    write_tar(folder / "00000.tar", [*members, *strange.items()])
    write_parquet(folder / "00000.parquet", {"url": ["a"]})
    (folder / "00000_stats.json").write_text("{}")
    assert converted(folder, tmp_path / "out", "--labels", "none").samples == 10
    counts = "11 .json, 1 .parquet, 9 .txt, 1 hidden, 1 keys without images, 1 members without a key"
    assert f"other files: {counts}\n" in capsys.readouterr().out
    source = open_source(str(folder), Images())
    assert [*source.ids][-2:] == ["00000.tar/00008", "00000.tar/a.b/00010"]


@pytest.mark.parametrize("kind", ["bytes", "struct", "paths", "tars", "zips"])
def test_unreadable_samples_are_named_and_counted(kind: str, tmp_path: Path) -> None:
    images = [encoded_image(i) for i in range(8)]
    images[3] = b"no image"
    write_all(tmp_path, images, [0] * 8, num_files=2)
    num_null = int(kind in ("bytes", "struct"))
    if num_null:  # img2dataset's failed entries
        write_parquet(tmp_path / kind / "null.parquet", {"image": pa.array([None, images[0]], pa.binary())})
    name = {"tars": "00000.tar/00003", "zips": "00000.zip/photos/0/00003.png"}.get(kind, "00000.parquet#3")
    with pytest.raises(InputError, match=rf"{tmp_path}/{kind}/{name}: cannot decode as an image .*--skip-unreadable"):
        converted(tmp_path / kind, tmp_path / "refused")
    done = converted(tmp_path / kind, tmp_path / "out", "--skip-unreadable")
    assert (done.samples, len(done.skipped)) == (7 + num_null, 1 + num_null)
    assert done.skipped[-1].endswith("null.parquet#0 is null") == bool(num_null)


IMAGE = encoded_image(0)
LABELED = "--label-column label"
TWO_COLUMNS = {"image": [IMAGE], "depth": [IMAGE], "caption": ["a"]}


@pytest.mark.parametrize(
    ("kind", "contents", "options", "named"),
    [
        ("parquet", TWO_COLUMNS, "", "image, depth"),
        ("parquet", TWO_COLUMNS, "--column mask", "'mask'"),
        ("parquet", {"image": [IMAGE], "label": [0.5]}, LABELED, "x.parquet#0"),
        ("parquet", {"image": [IMAGE]}, "--split test", "'test'"),
        ("parquet", {"image": [IMAGE]}, "--labels a.csv", "--labels"),
        ("parquet", {"image": pa.array([], pa.binary())}, "", "no images"),
        ("tar", ["a.jpg", "a.png"], "", "x.tar/a"),
        ("tar", ["a.jpg", "b.jpg", "a.jpg"], "", "x.tar"),
        ("tar", ["a.jpg", "a.txt"], "--label-column cls", "cls"),
        ("tar", ["a.txt"], "", "no images"),
        ("zip", ["a.jpg", "a.jpg"], "", "x.zip"),
        ("zip", ["a.jpg"], "--column jpg", "--column"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_wrong_file_is_one_line(kind: str, contents: Any, options: str, named: str, tmp_path: Path) -> None:
    """It names the file, the column or the option."""
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        write_parquet(path, contents)
    else:
        texts = {".json": b"{}", ".txt": b"a"}
        members = [(name, texts.get(Path(name).suffix, IMAGE)) for name in contents]
        (write_tar if kind == "tar" else write_zip)(path, members)
    with pytest.raises(InputError) as caught:
        converted(path, tmp_path / "out", *options.split())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("flag_bits", 1), "x.zip: a.jpg is encrypted"),
        (("compress_type", 9), "x.zip: a.jpg is compressed by a method other than deflate"),
        (("file_size", 1 << 31), "x.zip/a.jpg has 2,147,483,648 bytes; the limit is 1,073,741,824; --skip"),
    ],
)
def test_what_a_zip_must_not_hold_is_one_line(change: tuple[str, int], line: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", IMAGE)
        setattr(archive.infolist()[0], *change)  # in the directory
    with pytest.raises(InputError, match=line):
        converted(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("zips", "split", "ids", "classes"),
    [
        ({"x": ["birds/train/b/0", "birds/train/a/1", "birds/val/b/2"]}, None, [0, 1], "ab"),
        ({"x": ["birds/train/b/0", "birds/train/a/1", "birds/val/b/2"]}, "val", [2], "ab"),
        ({"x": ["birds/train/b/0", "birds/train/a/1", "birds/val/b/2"]}, "none", [0, 1, 2], ["train", "val"]),
        ({"train": ["b/0", "a/1"], "val": ["b/2"]}, "val", [2], "ab"),
        ({"train": ["x/train/b/0", "x/train/a/1"], "val": ["x/val/b/2"]}, None, [0, 1], "ab"),
        ({"0": ["x/b/0"], "1": ["x/a/1", "x/b/2"]}, None, [0, 1, 2], "ab"),
        ({"x": ["y/0", "y/1"]}, None, [0, 1], ""),
    ],
)
def test_folders_in_zips_are_splits_and_classes(
    zips: dict[str, list[str]], split: str | None, ids: list[int], classes: Sequence[str], tmp_path: Path
) -> None:
    for name, paths in zips.items():
        write_zip(tmp_path / "in" / f"{name}.zip", [(f"{path}.jpg", IMAGE) for path in paths])
    source = open_samples(tmp_path / "in", split)
    known = [f"{name}.zip/{path}.jpg" for name, paths in zips.items() for path in paths]
    assert [*source.ids] == [known[number] for number in ids]
    assert source.class_names == tuple(classes)
    if source.label is not None:
        assert all(f"/{classes[source.label(number)]}/" in name for number, name in enumerate(source.ids))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_as_tarfile_reads_it(format: int, tmp_path: Path) -> None:
    """Long names, names that are not ASCII, folders and links, times that need a header of their own."""
    names = ["a.jpg", f"{'folder/' * 30}b.jpg", f"{'c' * 90}.jpg", f"{'d' * 95}/e.jpg", "ü/é.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        for number, name in enumerate(names[2:] if format == tarfile.USTAR_FORMAT else names):
            image = encoded_image(number, size=16 + number)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(image), 1.5 if format == tarfile.PAX_FORMAT else 1  # pyright: ignore[reportAttributeAccessIssue]
            tar.addfile(member, io.BytesIO(image))
            folder, link = tarfile.TarInfo(f"folder {number}"), tarfile.TarInfo(f"link{number}.jpg")
            folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "e" * 120
            tar.addfile(folder)
            tar.addfile(link) if format != tarfile.USTAR_FORMAT else None
    with tarfile.open(tmp_path / "x.tar") as tar:
        known = {f"x.tar/{file.name[:-4]}": cast("Any", tar.extractfile(file)).read() for file in tar if file.isreg()}
    source = open_source(str(tmp_path / "x.tar"), Images())
    assert {source.ids[number]: source.load(number) for number in range(len(source))} == known
    left_out = {} if format == tarfile.USTAR_FORMAT else {"links and devices": len(known)}
    assert source.left_out == left_out


def without_header(content: bytes, change: bytes | None) -> bytes:
    """Put other bytes into the header of a tar's second sample."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        offset = tar.getmembers()[3].offset
    changed = bytes([content[offset] ^ 1]) if change is None else change
    return content[:offset] + changed + content[offset + len(changed) :]


SUFFIXES = {"bytes": "parquet", "tars": "tar", "zips": "zip"}
WHOLE_DAMAGE = [truncated, lambda content: b"", lambda content: b"\x1f\x8b" + content[2:-4]]
TAR_DAMAGE = {
    "a flipped bit": lambda content: without_header(content, None),
    "a block of zeros": lambda content: without_header(content, bytes(512)),
    "zeros to the end": lambda content: without_header(content, bytes(len(content) - 4096)) + bytes(1 << 20),
    "joined": lambda content: content + content,
    "more": lambda content: content + b"more",
}


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(pytest.param("tars/00001.tar", change, id=name) for name, change in TAR_DAMAGE.items()),
        pytest.param("zips/00001.zip", TAR_DAMAGE["joined"], id="joined zip"),
        *((f"{kind}/00001.{suffix}", damage) for kind, suffix in SUFFIXES.items() for damage in WHOLE_DAMAGE),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_written(
    kind: str, damage: Callable[[bytes], bytes], nine: Path, tmp_path: Path
) -> None:
    """Or one that is longer than it says: no sample after the damage is left out."""
    path = shutil.copytree((nine / kind).parent, tmp_path / "in") / Path(kind).name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"^{path} cannot be read: "):
        converted(path.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "named"), [("parquet", ", row group 0"), ("zip", "/0.jpg")])
def test_a_damaged_row_group_or_member_is_named(kind: str, named: str, tmp_path: Path) -> None:
    path, images = tmp_path / f"x.{kind}", [encoded_image(i) for i in range(8)]
    if kind == "zip":
        write_zip(path, [(f"{i}.jpg", image) for i, image in enumerate(images)])
    else:
        write_parquet(path, {"image": images}, rows=4)
    content = bytearray(path.read_bytes())
    content[40:72] = bytes(32)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path}{named} cannot be read: "):
        converted(path, tmp_path / "out", "--skip-unreadable")
    assert not (tmp_path / "out" / "index.json").exists()


def test_splits_and_classes(tmp_path: Path) -> None:
    """Names of classes are those of train; in numbers, the hub's; a split is a word of a file's name."""
    for name, labels in {"train-0": "bca", "test-0": "c", "validation-0": "d", "contest": "z"}.items():
        columns = {"image": [encoded_image(i) for i in range(len(labels))], "label": list(labels)}
        write_parquet(tmp_path / "sets" / f"{name}.parquet", columns)
    train, test, val, labeled = tmp_path / "train", tmp_path / "test", tmp_path / "val", LABELED.split()
    assert sorted(labels_of(tmp_path / "sets", train, *labeled)[0]) == [0, 1, 2]
    assert labels_of(tmp_path / "sets", test, "--split", "test", *labeled) == ([2], ["a", "b", "c"])
    for split, options, line in (
        ("validation", labeled, "validation-0.parquet#0: expected one of the classes a, b, c; got 'd'"),
        ("dev", [], "no split 'dev'; available: train, validation, test$"),
    ):
        with pytest.raises(InputError, match=line):
            converted(tmp_path / "sets", val, "--split", split, *options)
    assert converted(tmp_path / "sets", tmp_path / "all", "--split", "none").samples == 6
    members = [("a.jpg", IMAGE), ("a.json", b'{"class": "x"}'), ("b.json", b'{"class": "w"}'), ("b.jpg", IMAGE)]
    tar = write_tar(tmp_path / "x.tar", members)
    assert labels_of(tar, tmp_path / "json", "--label-column", "json:class") == ([0, 1], ["w", "x"])
    named = write_parquet(tmp_path / "named.parquet", {"image": [IMAGE], "label": [3]}, features=FEATURES)
    assert labels_of(named, tmp_path / "named", *labeled) == ([3], FEATURES["label"]["names"])


def test_a_link_makes_no_sample_twice(tmp_path: Path) -> None:
    """As the links of the hub's cache, to one file in two snapshots; and a link to the folder itself."""
    blobs, snapshots = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots"
    blobs.mkdir(parents=True)
    write_parquet(tmp_path / "x.parquet", {"image": [IMAGE] * 3}).rename(blobs / "f00")
    for commit in "ab":
        (snapshots / commit / "data").mkdir(parents=True)
        (snapshots / commit / "data" / "x.parquet").symlink_to(blobs / "f00")
    (snapshots / "all").symlink_to(snapshots)
    globs = ("*/data/*.parquet", "**/x.parquet", "all/b/**", "**/all/**/b/*/x.parquet", "**/**")
    for source in ("", "snapshots", *(f"snapshots/{glob}" for glob in globs)):
        assert len(open_source(str(tmp_path / "cache" / source), Images())) == 3
    assert len(open_source(f"{snapshots}/a/data/x.parquet", Images())) == 3


def test_a_folder_of_several_kinds_is_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for number in range(2):
        write_tar(folder / "a" / f"{number}.tar", [(f"{i}.jpg", IMAGE) for i in range(5)])
    write_files(folder, {"preview.jpg": IMAGE, "b/.thumbs/a.jpg": IMAGE})
    globs = rf"'{folder}/\*\*/\*.tar' or '{folder}/\*\*/\*.jpg'"
    for open_it in (lambda source: open_source(source, Images()), open_samples):
        with pytest.raises(
            InputError, match=rf"x holds tars .2. and images .1.; choose one kind with a glob: {globs}$"
        ):
            open_it(str(folder))
        assert len(open_it(f"{folder}/**/*.tar")) == 10
        assert [*open_it(f"{folder}/**/*.jpg").ids] == ["preview.jpg"]
    write_parquet(folder / "a" / "0.parquet", {"url": ["a"]})  # img2dataset's table of a tar
    assert open_source(f"{folder}/a", Images()).left_out == {".parquet": 1}
    write_parquet(folder / "a" / "2.parquet", {"image": [IMAGE] * 2})
    with pytest.raises(InputError, match=r"x/a holds Parquet files .2. and tars .2."):
        open_source(f"{folder}/a", Images())
    write_parquet(folder / "b" / "0.parquet", {"image": [IMAGE] * 2})
    assert [*open_source(f"{folder}/b", Images()).ids] == ["0.parquet#0", "0.parquet#1"]
    write_files(folder, {"train/dog/0.jpg": IMAGE})  # what is beside a split is not of it, such as archives
    assert [*open_samples(folder).ids] == ["train/dog/0.jpg"]


def test_files_that_do_not_fit_together_are_one_line(tmp_path: Path) -> None:
    swapped = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    for name, features in {"a": FEATURES, "b": swapped}.items():
        write_parquet(tmp_path / "x" / f"{name}.parquet", {"image": [IMAGE], "label": [1]}, features=features)
    assert converted(tmp_path / "x", tmp_path / "unlabeled").samples == 2
    with pytest.raises(InputError, match=r"/x: its files have different class names for the column 'label'"):
        converted(tmp_path / "x", tmp_path / "out", "--label-column", "label")
    write_parquet(tmp_path / "x" / "c.parquet", {"photo": [1]})
    with pytest.raises(
        InputError, match=r"c.parquet: expected one column of images, as bytes or paths; no columns fit; columns: photo"
    ):
        converted(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labeled_parquet_files_are_read_as_mds_is(tmp_path: Path) -> None:
    """From the hub's files of names, of train and validation; the labels' names come from the files, too."""
    for split, name, first in (("train", "train", 0), ("test", "validation", 100)):
        images, labels = [encoded_image(number) for number in range(first, first + 20)], [i % 3 for i in range(20)]
        write_mds(tmp_path / "mds" / split, images, labels)
        structs = [{"bytes": image, "path": None} for image in images]
        path = tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet"
        write_parquet(path, {"image": structs, "label": labels}, features=FEATURES)
    ours, theirs = (load_labeled_set(format, tmp_path / format, image_size=32) for format in ("parquet", "mds"))
    assert_same_samples(ours, theirs)
    assert ours.class_names == tuple(FEATURES["label"]["names"])
    alone = load_labeled_set("parquet", tmp_path / "parquet", image_size=32, label_column=None, max_images=7)
    assert (alone.num_samples, alone.has_labels) == ((0, 7), False)


def assert_same_samples(ours: EvaluationSet, theirs: EvaluationSet) -> None:
    for our_split, their_split in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(our_split.samples, their_split.samples)
        assert torch.equal(our_split.labels, their_split.labels)


def test_a_store_without_samples_is_one_line(reachable_store: GatedStore, tmp_path: Path) -> None:
    address = reachable_store.create_bucket("containers-none")
    reachable_store.client().put_object(Bucket="containers-none", Key="a/b.jpg", Body=IMAGE)
    reachable_store.client().put_object(Bucket="containers-none", Key="a/", Body=b"")
    write_parquet(tmp_path / "paths.parquet", {"path": ["b.jpg"]})
    reachable_store.client().upload_file(str(tmp_path / "paths.parquet"), "containers-none", "b/paths.parquet")
    for source, line in {
        **{f"{address}/a{rest}": f": no {NAMES}$" for rest in ("", "/*.tar", "/x.tar")},
        f"{address}/b": ".*column 'path' holds paths, which are allowed only in a local Parquet file",
        "sftp://host/a": f": expected {NAMES}, or MDS in a local folder; ",
    }.items():
        with pytest.raises(InputError, match=f"^{re.escape(source)}{line}"):
            open_source(source, Images())

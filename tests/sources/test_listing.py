"""Copies of what a store or a hub has are whole and of the listed version; an interrupted call goes on with its own."""

import os
import re
import shutil
from pathlib import Path

import pytest
from streaming import StreamingDataset

from containers import write_all, write_tar
from d2v_composer.commands import convert_images, embed, merge
from d2v_composer.data.images import Images
from d2v_composer.sources.open import open_source
from d2v_composer.sources.source import Source
from d2v_composer.system import fetch as fetch_module
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import cache_folder, exists, fetch, list_store
from gated_store import GatedStore
from helpers import GOLDEN, encoded_image, truncated, write_files
from hub_stub import serve

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = str(GOLDEN / "tiny_base.pt")
# Of one size: a decoder ignores what follows a JPEG.
SIZE = 2048
IMAGES, OTHERS = ([encoded_image(seed).ljust(SIZE, b"\0") for seed in seeds] for seeds in (range(6), range(10, 16)))
# Kind of source → the last of its files.
KINDS = {"tars": "tars/00001.tar", "zips": "zips/00001.zip", "folder": "folder/00005.png"}


@pytest.fixture
def store(reachable_store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GatedStore:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return reachable_store


def images_of(source: Source) -> list[bytes]:
    return [source.load(number) for number in range(len(source))]


def test_a_copy_is_the_version_that_was_listed(
    store: GatedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run's newer copy does not take its place, and a part of either is not joined to a part of the other."""
    monkeypatch.setattr(fetch_module, "ASK_SECONDS", 0)
    folder, client = f"{store.create_bucket('listed')}/tars", store.client()
    for name, images in (("0", IMAGES[:3]), ("1", IMAGES[3:])):
        tar = write_tar(tmp_path / f"{name}.tar", [(f"{i}.jpg", image) for i, image in enumerate(images)])
        client.upload_file(str(tar), "listed", f"tars/{name}.tar")
    sources = [open_source(folder, Images()), open_source(f"{folder}/1.tar", Images())]
    listed = list_store(folder)[1]
    write_tar(tmp_path / "1.tar", [(f"{i}.jpg", image) for i, image in enumerate(OTHERS[3:])])
    client.upload_file(str(tmp_path / "1.tar"), "listed", "tars/1.tar")
    assert images_of(open_source(folder, Images())) == IMAGES[:3] + OTHERS[3:]
    assert [images_of(source) for source in sources] == [IMAGES, IMAGES[3:]]
    assert len({source.content for source in (*sources, open_source(folder, Images()))}) == 3
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another"))
    with pytest.raises(InputError, match=r"tars/1\.tar cannot be fetched \(the file has changed since it was listed"):
        fetch(f"{folder}/1.tar", listed.version)


@pytest.mark.parametrize("kind", ["one", "listed"])
def test_a_damaged_copy_is_fetched_once_more(kind: str, store: GatedStore, tmp_path: Path) -> None:
    address = f"{store.create_bucket(f'damaged-{kind}')}/{kind}/x.tar"
    tar = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", image) for i, image in enumerate(IMAGES)])
    store.client().upload_file(str(tar), f"damaged-{kind}", f"{kind}/x.tar")
    source = address if kind == "one" else address.removesuffix("/x.tar")
    open_source(source, Images())
    [copy] = cache_folder().glob("*-x.tar")
    copy.write_bytes(truncated(copy.read_bytes()).ljust(tar.stat().st_size, b"\1"))
    assert images_of(open_source(source, Images())) == IMAGES
    tar.write_bytes(truncated(tar.read_bytes()))
    store.client().upload_file(str(tar), f"damaged-{kind}", f"{kind}/x.tar")
    with pytest.raises(InputError, match=rf"^{address}, copied to {cache_folder()}/\w+-x\.tar, cannot be read: "):
        open_source(source, Images())


@pytest.mark.parametrize("name", ["hf://org/net", "hf://org/net@v1", "hf://datasets/org/net/student.safetensors"])
def test_the_hub_has_a_newer_revision(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "hub" / "org" / "net" / ("v1" if "@" in name else "main") / "student.safetensors"
    file.parent.mkdir(parents=True)
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        for content in ("old", "new"):
            file.write_text(content)
            assert fetch(name).read_text() == content
            assert fetch(name).read_text() == content
    assert not caplog.records
    assert fetch(name).read_text() == "new"
    [said] = caplog.messages
    assert re.fullmatch(r"org/net: not available on the Hugging Face hub \(.*\); using the local cache", said)


def test_an_empty_answer_is_not_an_empty_folder(store: GatedStore) -> None:
    folder = f"{store.create_bucket('empty')}/a"
    store.client().put_object(Bucket="empty", Key="a/0.tar", Body=b"")
    for read in (list_store, lambda folder: exists(f"{folder}/0.tar")):
        store.faults["empty"] = ["empty"]
        assert read(folder)
        assert store.faults["empty"] == []


def test_a_part_is_compared_with_its_record(tmp_path: Path) -> None:
    write_all(tmp_path, IMAGES, [0] * 6)
    for out, source in (("a.npy", "folder"), ("b.npy", "tars")):
        for part in ("0/2", "1/2"):
            options = ["--part", part, "--batch-size", "2", "--workers", "0"]
            embed.main([TEACHER, str(tmp_path / source), str(tmp_path / out), *options])
    for name in ("00001-of-00002.npy", "00001-of-00002.ids.npy"):
        shutil.copy(tmp_path / "b.npy.parts" / name, tmp_path / "a.npy.parts")
    with pytest.raises(InputError, match=r"00002\.npy cannot be read: it is not the file that its record describes"):
        merge.main([str(tmp_path / "a.npy")])
    assert not (tmp_path / "a.npy").exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> list[str]:
    """The arguments of a conversion of a/ that has ended at its third shard."""
    for name, images in (("a", [*IMAGES[:5], bytes(SIZE)]), ("b", OTHERS)):
        folder = write_files(tmp_path / name, {f"{number}.jpg": image for number, image in enumerate(images)})
        for path in folder.iterdir():
            os.utime(path, (1, 1))
    call = [str(tmp_path / "a"), str(tmp_path / "out"), "--workers", "1", "--shard-size", str(SIZE)]
    with pytest.raises(InputError, match=r"5\.jpg: cannot decode as an image"):
        convert_images.main(call)
    return [*call, "--skip-unreadable"]


def test_an_interrupted_conversion_goes_on_with_its_own_source(interrupted: list[str], tmp_path: Path) -> None:
    """Another one may have the names, sizes and times of the first."""
    assert convert_images.main([str(tmp_path / "b"), *interrupted[1:]]).resumed == 0
    stored = StreamingDataset(local=str(tmp_path / "out"), batch_size=1)
    assert sorted(sample["image"] for sample in stored) == sorted(OTHERS)


@pytest.mark.parametrize("kind", ["tars", "zips", "folder"])
def test_parts_of_a_source_that_changed_are_not_joined(kind: str, tmp_path: Path) -> None:
    """Even if the changed file has the same size."""
    write_all(tmp_path, IMAGES, [0] * 6, num_files=2)
    out, changed = tmp_path / "out", tmp_path / KINDS[kind]
    first, second = ([str(tmp_path / kind), str(out), "--workers", "1", "--part", part] for part in ("0/2", "1/2"))
    convert_images.main(first)
    changed.write_bytes(changed.read_bytes())
    convert_images.main(second)
    with pytest.raises(InputError, match="00001-of-00002 differs from 00000-of-00002 in source"):
        merge.main([str(out)])
    with pytest.raises(InputError, match="00000-of-00002 differs from this command in source"):
        convert_images.main(first)
    shutil.rmtree(out / "parts" / "00000-of-00002")
    convert_images.main(first)
    merge.main([str(out)])

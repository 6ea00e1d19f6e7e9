"""Faults of the machine while images are read: they end the work, and no image is blamed for them."""

import errno
import os
from pathlib import Path

import pytest

from d2v_composer.data import images
from d2v_composer.data.convert import Encoding, convert_images, find_images
from d2v_composer.data.images import decode_rgb
from d2v_composer.embedding import open_collection
from d2v_composer.system.errors import InputError
from helpers import encoded_image
from streams import open_images, read_epoch

NUM_IMAGES = 24
OF_THE_MACHINE = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOTDIR]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUM_IMAGES):
        (folder / f"{i:02}.jpg").write_bytes(encoded_image(i))
    return folder


def convert(photos: Path) -> list[str]:
    """Convert the folder, and return the skipped files."""
    out = photos.parent / "out"
    conversion = convert_images(find_images(photos), out, Encoding(), workers=1, shard_bytes=4000, skip_unreadable=True)
    assert conversion.images + len(conversion.skipped) == NUM_IMAGES
    return conversion.skipped


def fail_to_read(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    patch.setattr(Path, "read_bytes", read)


@pytest.mark.parametrize("number", OF_THE_MACHINE)
def test_a_conversion_ends_and_its_next_start_converts_every_image(photos: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_to_read(patch, "17.jpg", number)
        with pytest.raises(RuntimeError, match=rf"photos/17\.jpg: cannot be read now \(.*{os.strerror(number)}"):
            convert(photos)
    assert convert(photos) == []


def test_a_conversion_without_memory_ends_and_its_next_start_converts_every_image(photos: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2v_composer.data.convert.open_image", no_memory)
        with pytest.raises(RuntimeError, match=r"\.jpg: cannot be read now \(MemoryError\)"):
            convert(photos)
    assert convert(photos) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_file_without_permission_is_not_skipped(photos: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_to_read(patch, "17.jpg", number)
        with pytest.raises(InputError, match=r"17\.jpg: cannot be read \(.*\): grant the permission, or remove it"):
            convert(photos)
    assert convert(photos) == []


def test_a_dangling_link_is_skipped(photos: Path) -> None:
    (photos / "17.jpg").unlink()
    (photos / "17.jpg").symlink_to("nowhere")
    assert convert(photos) == ["17.jpg: cannot be read (No such file or directory)"]


def no_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("workers", [0, 1])
def test_training_without_memory_does_not_blame_the_image(
    many_shards: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(images, "to_rgb", no_memory)
    monkeypatch.setattr(images.CuttableJpeg, "parse", lambda *_: None)  # Pillow decodes
    with pytest.raises(MemoryError):
        read_epoch(open_images(many_shards), workers)


def test_decoding_without_descriptors_does_not_blame_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images, "open_image", no_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        decode_rgb(encoded_image(0), "sample 3")


def test_every_decoder_is_loaded_at_import() -> None:
    """Pillow would drop a format whose module cannot be opened at its first use."""
    assert set(images.IMAGE_FORMATS) <= images.Image.OPEN.keys()


@pytest.mark.parametrize("kind", ["folder", "MDS"])
def test_embedding_does_not_skip_an_image_that_the_machine_cannot_read(
    photos: Path, many_shards: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    collection = open_collection(str(photos if kind == "folder" else many_shards), 24, "bicubic")
    if kind == "folder":
        fail_to_read(monkeypatch, "17.jpg", errno.EMFILE)
    else:
        monkeypatch.setattr("streaming.base.format.mds.reader.MDSReader.get_sample_data", no_descriptors_for_a_shard)
    with pytest.raises(OSError, match="Too many open files"):
        collection.load(17)


def no_descriptors_for_a_shard(*_: object) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shard.00001.mds")

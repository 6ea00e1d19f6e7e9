"""Faults of the machine while images are read: they end the work, and no image is blamed for them."""

import errno
import os
from pathlib import Path

import pytest

from d2v_composer.data import images
from d2v_composer.data.convert import Encoding, convert_images, find_images
from d2v_composer.data.images import decode_rgb
from d2v_composer.system.errors import InputError
from helpers import encoded_image

NUM_IMAGES = 24


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_conversion_ends_and_its_next_start_converts_every_image(photos: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_to_read(patch, "17.jpg", number)
        with pytest.raises(InputError, match=rf"photos/17\.jpg: cannot be read: {os.strerror(number)}$"):
            convert(photos)
    assert convert(photos) == []


def test_decoding_without_descriptors_does_not_blame_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images, "open_image", no_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        decode_rgb(encoded_image(0), "sample 3")


def test_every_decoder_is_loaded_at_import() -> None:
    """Pillow would drop a format whose module cannot be opened at its first use."""
    assert set(images.IMAGE_FORMATS) <= images.Image.OPEN.keys()

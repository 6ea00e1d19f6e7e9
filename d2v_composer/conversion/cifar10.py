"""Write CIFAR-10 as MDS, with its images' pixels unchanged."""

import io
import shutil
from pathlib import Path

from d2v_composer.data.labelled_sets import LabelledImages, load_labelled_set
from d2v_composer.data.mds_index import INDEX, describe_data, read_index
from d2v_composer.system.atomic_files import find_unwritable
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import sole_user

__all__ = ["convert_cifar10"]

# Time for another process to write the same images.
LOCK_SECONDS = 600.0
COLUMNS = {"image": "bytes", "label": "int"}


def convert_cifar10(images: Path, out: Path, num_train: int = 50_000, num_test: int = 10_000) -> None:
    """Write the first images of each split to ``out``/train and ``out``/test, unless they exist.

    Args:
        images: The folder of torchvision's CIFAR-10, which is downloaded to it if it is absent.
        out: A folder.
        num_train: Number of training images.
        num_test: Number of test images.

    Raises:
        InputError: CIFAR-10 is absent and cannot be downloaded, or is corrupt; or ``out`` cannot be written, or holds
            other files or another number of images.
    """
    wanted = {"train": num_train, "test": num_test}
    if all(_is_written(out / split, num_images) for split, num_images in wanted.items()):
        return
    if (fault := find_unwritable(out)) is not None:
        raise InputError(f"{out}: {fault}")
    lock = out / ".lock"
    with sole_user(lock, LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another conversion is writing there")
        _write_missing(images, out, wanted)
        lock.unlink()


def _write_missing(images: Path, out: Path, wanted: dict[str, int]) -> None:
    # Another process may have written them while this one waited.
    missing = [split for split, num_images in wanted.items() if not _is_written(out / split, num_images)]
    if not missing:
        return
    cifar10 = load_labelled_set("cifar10", images, image_size=32, interpolation="bicubic", download=True)
    for split in missing:
        _write(getattr(cifar10, split), wanted[split], out / split)


def _is_written(folder: Path, num_images: int) -> bool:
    """Tell whether a split is there, and refuse a folder of anything else."""
    if not (folder / INDEX).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists, and has no {INDEX}: remove it, or choose another folder")
        return False
    found = describe_data(read_index(folder, columns=tuple(COLUMNS)))["samples"]
    if found != num_images:
        raise InputError(f"{folder}: has {found} images, not {num_images}: remove it, or choose another folder")
    return True


def _write(labelled: LabelledImages, num_images: int, folder: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter  # takes seconds

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with MDSWriter(out=str(partial), columns=COLUMNS, hashes=["xxh64"]) as writer:
        for pixels, label in zip(labelled.images[:num_images], labelled.labels[:num_images].tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            writer.write({"image": buffer.getvalue(), "label": label})
    partial.replace(folder)

"""Write CIFAR-10 as MDS, with its images' pixels unchanged."""

import io
import shutil
from pathlib import Path

from d2v_composer.data.labelled_sets import LabelledImages, load_labelled_set
from d2v_composer.data.mds_index import INDEX
from d2v_composer.system.errors import InputError

__all__ = ["convert_cifar10"]


def convert_cifar10(images: Path, out: Path, num_train: int = 50_000, num_test: int = 10_000) -> None:
    """Write the first images of each split to ``out``/train and ``out``/test, unless they exist.

    Args:
        images: The folder of torchvision's CIFAR-10, which is downloaded to it if it is absent.
        out: A folder.
        num_train: Number of training images.
        num_test: Number of test images.

    Raises:
        InputError: CIFAR-10 is absent and cannot be downloaded, or is corrupt.
    """
    missing = {
        split: num_images
        for split, num_images in (("train", num_train), ("test", num_test))
        if not (out / split / INDEX).exists()
    }
    if not missing:
        return
    try:
        cifar10 = load_labelled_set("cifar10", images, image_size=32, download=True)
    except InputError as error:
        raise InputError(f"--images: {error}") from error
    for split, num_images in missing.items():
        _write(getattr(cifar10, split), num_images, out / split)


def _write(labelled: LabelledImages, num_images: int, folder: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter  # takes seconds

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with MDSWriter(out=str(partial), columns={"image": "bytes", "label": "int"}, hashes=["xxh64"]) as writer:
        for pixels, label in zip(labelled.images[:num_images], labelled.labels[:num_images].tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            writer.write({"image": buffer.getvalue(), "label": label})
    partial.replace(folder)

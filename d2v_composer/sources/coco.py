"""Read images with boxes: a folder of images, and a JSON file in COCO's format.

Shapes: N images, K boxes of all images, one image's after another's.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from d2v_composer.sources.source import Int64Array, PackedStrings
from d2v_composer.system.errors import InputError, reading

SMALLEST = 0.1
"""Smallest width and height of a box, in pixels: those of smaller ones would vanish in float32."""


class _Image(BaseModel):
    id: int
    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class _Annotation(BaseModel):
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    iscrowd: bool = False


class _Category(BaseModel):
    id: int
    name: str


class _File(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class Boxes(NamedTuple):
    """Images of a folder and their boxes."""

    folder: Path
    names: PackedStrings
    """Path of each image in the folder."""
    sizes: Int64Array
    """Width and height of each image, (N, 2)."""
    first: Int64Array
    """Number of each image's first box, and K, (N + 1,)."""
    boxes: NDArray[np.float32]
    """Left, top, right, bottom, in pixels, (K, 4)."""
    labels: Int64Array
    """Label of each box, (K,): the position of its category in ``class_names``, from 1."""
    crowds: NDArray[np.bool_]
    """Boxes around several things, (K,)."""
    class_names: Mapping[int, str]
    """Category's id → its name, by ascending id; ids may have gaps."""
    left_out: Mapping[str, int]
    """Kind of boxes that were left out or cut off → their number."""
    sha256: str
    """Hash of the JSON file, and of the sizes of the images' files."""

    def __len__(self) -> int:
        return len(self.names)


def read_coco(folder: Path, file: Path | None, with_crowds: bool) -> Boxes:
    """Read and check COCO's JSON file, and find the images.

    Boxes are cut off at the image's edge. Boxes without area are left out; without ``with_crowds``, crowds too.

    Args:
        folder: The images.
        file: The JSON file; ``None``: the only one in the folder.

    Raises:
        InputError: A line for each problem: an image is missing, an id occurs twice, or the file is not COCO's.
    """
    file = file or find_json(folder)
    with reading(file):
        content = file.read_bytes()
        try:
            parsed = _File.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{file}: not annotations in COCO's format: {place}: {first['msg']}") from error
    images, categories = parsed.images, sorted(parsed.categories, key=lambda category: category.id)
    position = {image.id: number for number, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories, 1)}
    with reading(folder):
        lengths = {image.file_name: size_of(folder / image.file_name) for image in images}
    check(file, parsed, position, label_of, [name for name, length in lengths.items() if length is None])
    rows = sorted(parsed.annotations, key=lambda row: position[row.image_id])  # stable
    owner = np.array([position[row.image_id] for row in rows], np.int64)
    sizes = np.array([(image.width, image.height) for image in images], np.int64).reshape(-1, 2)
    boxes = np.array([row.bbox for row in rows]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crowds = np.array([row.iscrowd for row in rows], bool)
    inside = np.clip(boxes, 0, np.tile(sizes[owner], 2))
    is_empty = (boxes[:, 2:] - boxes[:, :2] < SMALLEST).any(1)
    is_outside = (inside[:, 2:] - inside[:, :2] < SMALLEST).any(1) & ~is_empty
    is_cut = (abs(inside - boxes) >= 1).any(1) & ~is_empty & ~is_outside
    kept = ~is_empty & ~is_outside & (with_crowds | ~crowds)
    counts = {
        "without area": is_empty,
        "outside the image": is_outside,
        "of crowds": crowds & ~kept & ~is_empty & ~is_outside,
        "cut off at the edge": is_cut & kept,
    }
    digest = hashlib.sha256(content)
    digest.update(repr(sorted(lengths.items())).encode())
    return Boxes(
        folder,
        PackedStrings(image.file_name for image in images),
        sizes,
        np.searchsorted(owner[kept], np.arange(len(images) + 1)),
        inside[kept].astype(np.float32),
        np.array([label_of[row.category_id] for row in rows], np.int64)[kept],
        crowds[kept],
        {category.id: category.name for category in categories},
        {kind: int(those.sum()) for kind, those in counts.items() if those.any()},
        digest.hexdigest(),
    )


def find_json(folder: Path) -> Path:
    """Return the only JSON file in a folder.

    Raises:
        InputError: There is none, or several.
    """
    with reading(folder):
        found = sorted(path.name for path in folder.iterdir() if path.suffix == ".json")
    if len(found) != 1:
        raise InputError(
            f"{folder}: expected one .json file with the boxes, or annotations=FILE; got {found or 'none'}"
        )
    return folder / found[0]


def size_of(path: Path) -> int | None:
    """Return a file's number of bytes; ``None`` if there is no such file."""
    return path.stat().st_size if path.is_file() else None


def check(
    file: Path, parsed: _File, images: Mapping[int, int], categories: Mapping[int, int], missing: list[str]
) -> None:
    """Check ids and files.

    Raises:
        InputError: A line for each kind of problem, with the first case.
    """
    rows = parsed.annotations
    of_no_image = sorted({row.image_id for row in rows if row.image_id not in images})
    of_no_category = sorted({row.category_id for row in rows if row.category_id not in categories})
    found: dict[str, Iterable[object]] = {
        "images that are not in the folder": missing,
        "images with the id of another": repeated(image.id for image in parsed.images),
        "images with the name of another": repeated(image.file_name for image in parsed.images),
        "categories with the id of another": repeated(category.id for category in parsed.categories),
        "images that have boxes and are not listed": of_no_image,
        "categories that have boxes and are not listed": of_no_category,
    }
    problems = [
        f"{file}: {len(cases)} {kind}; the first: {cases[0]}" for kind, them in found.items() if (cases := [*them])
    ]
    if not parsed.images:
        problems.append(f"{file}: no images")
    if problems:
        raise InputError(*problems)


def repeated(values: Iterable[object]) -> list[object]:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]

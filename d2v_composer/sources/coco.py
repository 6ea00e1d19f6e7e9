"""Read the boxes of the images in a folder from a JSON file in COCO's format."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from d2v_composer.sources.source import Int64Array, PackedStrings
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.files import sha256

SMALLEST = 0.1  # at large coordinates, float32 would round smaller widths to 0
"""Smallest width and height of a box, in pixels."""


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
    """N images in a folder, and the K boxes of these images, sorted by image."""

    folder: Path
    names: PackedStrings
    """Path of each image, relative to ``folder``."""
    sizes: Int64Array
    """Width and height of each image, in pixels, (N, 2)."""
    first: Int64Array
    """Indices in ``boxes``, (N + 1,): image i has ``boxes[first[i] : first[i + 1]]``."""
    boxes: NDArray[np.float32]
    """Left, top, right and bottom of each box, in pixels, (K, 4)."""
    labels: Int64Array
    """Position of each box's category in ``class_names``, counted from 1, (K,)."""
    crowds: NDArray[np.bool_]
    """COCO's ``iscrowd`` of each box, (K,)."""
    class_names: Mapping[int, str]
    """Id of a category → name of the category, by ascending id."""
    left_out: int
    """Number of boxes that :func:`read_coco` left out."""
    sha256: str
    """SHA-256 of the JSON file, in hexadecimal."""

    def __len__(self) -> int:
        return len(self.names)


def read_coco(folder: Path, file: Path, with_crowds: bool) -> Boxes:
    """Read a JSON file in COCO's format, and check that its images are in ``folder``.

    Boxes are clipped to their image. Boxes whose width or height is then below :data:`SMALLEST` are left out. Without
    ``with_crowds``, boxes with ``iscrowd`` are also left out.

    Raises:
        InputError: The file cannot be read, contradicts itself, lists no images, or lists images that are missing.
    """
    with reading(file):
        try:
            parsed = _File.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{file}: not annotations in COCO's format: {place}: {first['msg']}") from error
    images, categories = parsed.images, sorted(parsed.categories, key=lambda category: category.id)
    position = {image.id: number for number, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories, 1)}
    rows = parsed.annotations
    problems: dict[str, Iterable[object]] = {
        f"images are not in {folder}": (name for image in images if not (folder / (name := image.file_name)).is_file()),
        "ids belong to several images": repeated(image.id for image in images),
        "file names belong to several images": repeated(image.file_name for image in images),
        "ids belong to several categories": repeated(category.id for category in categories),
        "image ids of annotations are not in 'images'": {row.image_id for row in rows} - position.keys(),
        "category ids of annotations are not in 'categories'": {row.category_id for row in rows} - label_of.keys(),
    }
    found = {kind: cases for kind, them in problems.items() if (cases := sorted(them, key=str))}
    if found or not images:
        lines = [f"{kind}, such as {cases[0]} ({len(cases)} in all)" for kind, cases in found.items()]
        lines = lines or ["lists no images"]
        raise InputError(*(f"{file}: {line}" for line in lines))
    rows.sort(key=lambda row: position[row.image_id])  # stable
    owner = np.array([position[row.image_id] for row in rows], np.int64)
    sizes = np.array([(image.width, image.height) for image in images], np.int64)
    boxes = np.array([row.bbox for row in rows]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, np.tile(sizes[owner], 2))
    crowds = np.array([row.iscrowd for row in rows], bool)
    kept = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(1) & (with_crowds | ~crowds)
    return Boxes(
        folder,
        PackedStrings(image.file_name for image in images),
        sizes,
        np.searchsorted(owner[kept], np.arange(len(images) + 1)),
        boxes[kept].astype(np.float32),
        np.array([label_of[row.category_id] for row in rows], np.int64)[kept],
        crowds[kept],
        {category.id: category.name for category in categories},
        int((~kept).sum()),
        sha256(file),
    )


def repeated(values: Iterable[object]) -> list[object]:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]

"""Boxes in COCO's format from other programs: read as they are meant, or refused with a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.sources.coco import Boxes, read_coco
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.boxes import BoxedSamples, collate_boxes
from helpers import encoded_image, write_files

Content = dict[str, Any]


def box(image: int, category: int, *place: float, **more: Any) -> Content:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": list(place), **more}


def content() -> Content:
    """Two images of 64 × 48 pixels; categories whose ids have gaps, in no order."""
    images = [{"id": 90, "file_name": "a.jpg", "width": 64, "height": 48}]
    images.append({"id": 5, "file_name": "deep/b.jpg", "width": 64, "height": 48, "license": 3})
    rows = [box(5, 40, 10, 10, 20, 20), box(90, 2, 0, 0, 32, 24, area=99.5, segmentation=[]), box(5, 2, 1, 2, 3, 4)]
    return {"images": images, "annotations": rows, "categories": [{"id": 40, "name": "z"}, {"id": 2, "name": "y"}]}


def write(folder: Path, written: object, size: tuple[int, int] = (64, 48)) -> Path:
    from io import BytesIO

    from PIL import Image

    def encoded(seed: int) -> bytes:
        buffer = BytesIO()
        Image.open(BytesIO(encoded_image(seed, 64))).resize(size).save(buffer, "PNG")
        return buffer.getvalue()

    files = {"a.jpg": encoded(0), "deep/b.jpg": encoded(1), "boxes.json": json.dumps(written).encode()}
    return write_files(folder, files)


def read(folder: Path, with_crowds: bool) -> Boxes:
    return read_coco(folder, folder / "boxes.json", with_crowds)


def test_boxes_stay_with_their_images_and_categories(tmp_path: Path) -> None:
    """Labels count the categories that there are, by id. Order and ids of boxes do not matter."""
    found = read(write(tmp_path, content()), with_crowds=False)
    assert found.class_names == {2: "y", 40: "z"}
    of_image = [slice(*found.first[number : number + 2]) for number in range(2)]
    assert [found.names[number] for number in range(2)] == ["a.jpg", "deep/b.jpg"]
    assert found.boxes[of_image[0]].tolist() == [[0, 0, 32, 24]]
    assert found.boxes[of_image[1]].tolist() == [[10, 10, 30, 30], [1, 2, 4, 6]]
    assert [found.labels[its].tolist() for its in of_image] == [[1], [2, 1]]
    assert found.left_out == 0


def test_odd_boxes_are_counted(tmp_path: Path) -> None:
    odd = content()
    odd["annotations"] += [
        box(90, 2, 5, 5, 0, 10),
        box(90, 2, 5, 5, 10, -3),
        box(90, 2, 100, 5, 10, 10),
        box(90, 2, -20, 40, 30, 30),
        box(90, 40, 1, 1, 40, 40, iscrowd=1),
    ]
    train, test = (read(write(tmp_path, odd), with_crowds=with_crowds) for with_crowds in (False, True))
    assert (train.left_out, test.left_out) == (4, 3)
    assert train.boxes[: train.first[1]].tolist() == [[0, 0, 32, 24], [0, 40, 10, 48]]
    assert (train.crowds.sum(), test.crowds.tolist()) == (0, [False, False, True, False, False])


def test_an_image_may_have_no_boxes(tmp_path: Path) -> None:
    bare = content()
    del bare["annotations"][1]
    samples = BoxedSamples(read(write(tmp_path, bare), with_crowds=False), (64, 64), "bicubic")
    images, boxes, labels, crowds = collate_boxes([samples[number] for number in range(2)])
    assert (images.shape, boxes.shape, crowds.any()) == ((2, 3, 64, 64), (2, 2, 4), False)
    assert labels.tolist() == [[0, 0], [2, 1]]


def test_images_keep_their_proportions_and_boxes_follow(tmp_path: Path) -> None:
    """A box of one color finds its pixels again, also in a flipped image."""
    from PIL import Image

    folder = write(tmp_path, content() | {"annotations": [box(90, 2, 16, 12, 24, 18)]})
    image = Image.new("RGB", (64, 48))
    image.paste((255, 255, 255), (16, 12, 40, 30))
    image.save(folder / "a.jpg", "PNG")
    for flip in (0.0, 1.0):
        samples = BoxedSamples(read(folder, with_crowds=False), (96, 96), "bilinear", flip)
        asked = next(sample for sample in samples.order if sample.sample_id == 0)
        pixels, boxes, labels, _ = samples[asked]
        assert not pixels[:, 72:].any()
        left = 36 if flip else 24
        assert boxes.tolist() == [[left, 18, left + 36, 45]]
        assert labels.tolist() == [1]
        assert (pixels[:, 22:41, left + 4 : left + 32] == 255).all()
        outside = torch.ones(96, 96, dtype=torch.bool)
        outside[15:48, left - 3 : left + 39] = False
        assert not pixels[:, outside].any()


def changed(change: Callable[[Content], object]) -> Content:
    value = content()
    change(value)
    return value


BAD: dict[str, tuple[object, str]] = {
    "missing image": (
        changed(lambda c: c["images"][0].update(file_name="gone.jpg")),
        "such as gone.jpg (1 in all)",
    ),
    "duplicate image ids": (
        changed(lambda c: c["images"][0].update(id=5)),
        "ids belong to several images, such as 5 (1 in all)",
    ),
    "duplicate categories": (
        changed(lambda c: c["categories"][0].update(id=2)),
        "ids belong to several categories, such as 2 (1 in all)",
    ),
    "one image twice": (
        changed(lambda c: c["images"].append({**c["images"][0], "id": 7})),
        "file names belong to several images, such as a.jpg (1 in all)",
    ),
    "unknown category": (
        changed(lambda c: c["annotations"][0].update(category_id=3)),
        "category ids of annotations are not in 'categories', such as 3 (1 in all)",
    ),
    "unknown image": (
        changed(lambda c: c["annotations"][0].update(image_id=6)),
        "image ids of annotations are not in 'images', such as 6 (1 in all)",
    ),
    "no images": ({"images": [], "annotations": [], "categories": []}, "lists no images"),
    "no number": (
        changed(lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 3])),
        "annotations.1.bbox.2: ",
    ),
    "three numbers": (
        changed(lambda c: c["annotations"][1].update(bbox=[1, 2, 3])),
        "annotations.1.bbox.3: Field required",
    ),
    "captions": (changed(lambda c: c["annotations"][0].pop("bbox")), "annotations.0.bbox: Field required"),
    "a list": ([content()], "not annotations in COCO's format"),
}


@pytest.mark.parametrize(("written", "line"), BAD.values(), ids=BAD)
def test_bad_annotations_are_a_line(written: object, line: str, tmp_path: Path) -> None:
    folder = write(tmp_path, written)
    with pytest.raises(InputError) as caught:
        read(folder, with_crowds=False)
    lines = [text for text in caught.value.args if line in text]
    assert len(lines) == 1
    assert lines[0].startswith(f"{folder / 'boxes.json'}: ")
    assert "\n" not in lines[0]


def test_several_faults_have_a_line_each(tmp_path: Path) -> None:
    bad = content()
    bad["images"][0] |= {"id": 5, "file_name": "gone.jpg"}
    with pytest.raises(InputError) as caught:
        read(write(tmp_path, bad), with_crowds=False)
    assert len(caught.value.args) == 3  # the box of 90, too


def test_a_broken_or_missing_json_file_is_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path, content())
    (folder / "boxes.json").write_bytes(json.dumps(content()).encode()[:200])
    with pytest.raises(InputError, match=r"boxes\.json: not annotations in COCO's format: the file: Inv"):
        read(folder, with_crowds=False)
    with pytest.raises(InputError, match=r"no\.json cannot be read: "):
        read_coco(folder, folder / "no.json", with_crowds=False)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its boxes would be elsewhere: an image that a program has turned or shrunk since."""
    samples = BoxedSamples(read(write(tmp_path, content(), (48, 64)), with_crowds=False), (64, 64), "bicubic")
    line = r"a\.jpg: its annotations are for 64 x 48 pixels, but it has 48 x 64$"
    with pytest.raises(InputError, match=line):
        samples[0]

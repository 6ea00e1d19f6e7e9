"""The image column of an MDS data set, in each encoding, for training, embedding and retrieval."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from d2v_composer.config.load import load_config
from d2v_composer.data.images import Images, RandomResizedCropFlip, decode_rgb
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.sources.mds import Index
from d2v_composer.sources.open import open_source
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.loader import build_train_loader, read_train_index
from d2v_composer.training_data.order import StreamingSamples
from helpers import small_run, write_images

NUM_SAMPLES = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    names = [f"{i}.jpg" for i in range(NUM_SAMPLES)]
    folder = write_images(tmp_path_factory.mktemp("files"), names)
    return [folder / name for name in names]


def write_as_streaming(folder: Path, files: list[Path], encoding: str) -> Path:
    """An MDS folder as Streaming's own converter of ImageNet writes it: ``i``, ``x`` and ``y``."""
    with MDSWriter(out=str(folder), columns={"i": "int", "x": encoding, "y": "int"}, size_limit=8192) as writer:
        for i, path in enumerate(files):
            with Image.open(path) as image:
                writer.write({"i": i, "x": path.read_bytes() if encoding == "bytes" else image, "y": i % 4})
    return folder


def train_loader(data: Path, *overrides: str) -> Any:
    changes = ("seed=5", "train_loader.crop_scale=[0.08,1.0]", *overrides)
    config = load_config(small_run(data.parent / "run", data, *changes))
    index = read_train_index(config.train_loader, Images(24), 16)
    return build_train_loader(config, config.train_loader, index)


@pytest.mark.parametrize("encoding", ["bytes", "jpeg", "png", "pil"])
def test_trains_on_a_data_set_of_streamings_own_converter(files: list[Path], tmp_path: Path, encoding: str) -> None:
    data = write_as_streaming(tmp_path / "data", files, encoding)
    batches = list(train_loader(data, "train_loader.column=x"))
    ids = torch.cat([batch["sample_id"] for batch in batches])
    pixels = torch.cat([batch["image"] for batch in batches])
    assert sorted(ids.tolist()) == list(range(NUM_SAMPLES))
    index = Index(write_as_streaming(tmp_path / "ours", files, "bytes"), Images(24), "x")
    ours = StreamingSamples(index, RandomResizedCropFlip(24), seed=5)
    expected = {sample["sample_id"]: sample["image"] for sample in map(ours.__getitem__, ours.order)}
    assert all(torch.equal(image, expected[i]) for i, image in zip(ids.tolist(), pixels, strict=True))


@pytest.mark.parametrize("encoding", ["jpeg", "pil"])
def test_embeds_and_retrieves_from_a_chosen_column(files: list[Path], tmp_path: Path, encoding: str) -> None:
    for split in ("train", "test"):
        write_as_streaming(tmp_path / split, files, encoding)
    expected = decode_rgb(files[3].read_bytes(), "file").getdata()
    source = open_source(str(tmp_path / "train"), Images(32), column="x")
    labeled = load_labeled_set("mds", tmp_path, image_size=32, interpolation="bicubic", column="x", label_column="y")
    for pixels in (source.decode(3), labeled.train.samples[3]):
        assert torch.equal(pixels.flatten(1).T, torch.tensor(list(expected), dtype=torch.uint8))
    assert labeled.test.labels.tolist() == [i % 4 for i in range(NUM_SAMPLES)]


def test_names_a_column_that_is_missing_or_has_no_images(files: list[Path], tmp_path: Path) -> None:
    data = write_as_streaming(tmp_path / "train", files, "jpeg")
    readers: list[Callable[[], Any]] = [
        lambda: train_loader(data),
        lambda: open_source(str(data), Images(32)),
        lambda: load_labeled_set("mds", tmp_path, image_size=32, interpolation="bicubic"),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"no column 'image'; the data set has: i, x, y; choose one with --column"):
            read()
    with pytest.raises(InputError, match="its column 'y' is int; expected one of bytes, jpeg, png, pil"):
        train_loader(data, "train_loader.column=y")

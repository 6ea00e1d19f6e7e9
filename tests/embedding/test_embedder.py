"""Embed batches as engines give them, as ``d2v embed`` embeds files."""

import io
import pickle
import sys
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from d2v_composer import Embedder, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed as embed_command
from d2v_composer.data.images import Images
from d2v_composer.embedding import embedder
from d2v_composer.sources.labeled import load_labeled_set
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, encoded_clip, encoded_image, run_command, saved, write_files

TEACHER = str(GOLDEN / "tiny_base.pt")
IMAGES = [encoded_image(i, size=32 + i % 3) for i in range(11)]
BATCH = 4

pytestmark = pytest.mark.usefixtures("one_thread")


def by_command(folder: Path, model: str, files: list[bytes], suffix: str, *options: str) -> NDArray:
    """Embed files with ``d2v embed``, (N, D)."""
    source = write_files(folder / "source", {f"{number:02}{suffix}": content for number, content in enumerate(files)})
    given = [str(source), str(folder / "out.npy"), "--workers", "0", "--batch-size", str(BATCH), "--skip-unreadable"]
    embed_command.main([model, *given, *options])
    return np.load(folder / "out.npy")


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> NDArray:
    return by_command(tmp_path_factory.mktemp("expected"), TEACHER, IMAGES, ".jpg")


def pixels(encoded: bytes) -> NDArray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def of_objects(samples: list[Any]) -> NDArray:
    column = np.empty(len(samples), object)
    column[:] = samples
    return column


@pytest.mark.parametrize("form", ["bytes", "numpy", "struct", "paths", "struct of paths", "arrays", "pil", "arrow"])
def test_every_form_of_a_column_gives_the_commands_bits(form: str, expected: NDArray, tmp_path: Path) -> None:
    files = {f"{number}.jpg": image for number, image in enumerate(IMAGES)}
    paths = [str(write_files(tmp_path, files) / name) for name in files]
    column: Any = {
        "bytes": IMAGES,
        "numpy": of_objects(IMAGES),
        "struct": [{"bytes": image, "path": "a.jpg"} for image in IMAGES],
        "paths": paths,
        "struct of paths": [{"bytes": None, "path": path} for path in paths],
        "arrays": of_objects([pixels(image) for image in IMAGES]),
        "pil": [Image.open(io.BytesIO(image)) for image in IMAGES],
        "arrow": pa.array([{"bytes": image, "path": None} for image in IMAGES]),
    }[form]
    given = {"photo": column, "id": range(len(IMAGES))}
    columns = Embedder(TEACHER, column="photo", batch_size=BATCH)(given)
    assert list(columns) == ["photo", "id", "embedding", "error"]
    assert columns["photo"] is column
    assert columns["error"] == [None] * len(IMAGES)
    assert columns["embedding"].dtype == np.float32
    if form in ("arrays", "pil"):  # Pillow's filter resizes what was decoded before
        files = [saved(Image.fromarray(pixels(image)), "PNG") for image in IMAGES]
        expected = by_command(tmp_path / "decoded", TEACHER, files, ".png")
    np.testing.assert_array_equal(columns["embedding"], expected)


@pytest.mark.parametrize("reader", ["d2v embed", "Embedder", "evaluation"])
def test_on_a_cpu_two_threads_of_the_process_decode(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until the other decodes, too."""
    photos = write_files(tmp_path / "photos", {f"{number}.jpg": IMAGES[number] for number in range(BATCH)})
    together, decode = Barrier(2, timeout=60), Images.decode
    monkeypatch.setattr(Images, "decode", lambda *given: together.wait() >= 0 and decode(*given))
    torch.set_num_threads(2)
    if reader == "d2v embed":
        embed_command.main([TEACHER, str(photos), str(tmp_path / "out.npy")])
    elif reader == "Embedder":
        Embedder(TEACHER)({"image": IMAGES[:BATCH]})
    else:
        load_labeled_set(None, photos)


def test_an_array_of_one_size_is_a_column_too(tmp_path: Path) -> None:
    images = [encoded_image(i) for i in range(3)]
    expected = by_command(tmp_path, TEACHER, images, ".jpg")
    columns = Embedder(TEACHER)({"image": np.stack([pixels(image) for image in images])})  # (N, 32, 32, 3)
    np.testing.assert_array_equal(columns["embedding"], expected)


def test_unreadable_samples_are_null_and_say_why(tmp_path: Path) -> None:
    files = [*IMAGES[:3], b"not an image", *IMAGES[3:6], b"", IMAGES[6][:200], *IMAGES[7:]]
    missing = str(tmp_path / "missing.jpg")
    columns = Embedder(TEACHER, batch_size=BATCH)({"image": [*files, None, missing]})
    embeddings, errors = columns["embedding"], columns["error"]
    bad = [number for number, error in enumerate(errors) if error is not None]
    assert bad == [number for number, row in enumerate(embeddings) if row is None] == [3, 7, 8, 13, 14]
    expected = by_command(tmp_path, TEACHER, files, ".jpg")
    np.testing.assert_array_equal([row for row in embeddings if row is not None], expected)
    assert errors[3] == "image: cannot decode as an image (12 bytes)"
    assert errors[13] == "image: cannot decode as an image (None)"
    assert errors[14] == f"{missing} cannot be read (No such file or directory)"
    assert Embedder(TEACHER)({"image": [b"", b"x"]})["embedding"] == [None, None]


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ("a\0b.jpg", r"'a\x00b.jpg' is not a path"),
        (f"{'x' * 300}.jpg", f"{'x' * 300}.jpg cannot be read (File name too long)"),
        (np.zeros((8, 8, 3), np.float32), "image: cannot decode as an image ('float32 (8, 8, 3)')"),
        ({"name": "a.jpg"}, "image: cannot decode as an image (None)"),
    ],
)
def test_a_sample_of_another_form_stops_no_batch(sample: Any, problem: str) -> None:
    assert Embedder(TEACHER)({"image": [IMAGES[0], sample]})["error"] == [None, problem]


@pytest.mark.parametrize("kind", [pa.table, pa.record_batch])
def test_arrow_batches_have_one_schema_whatever_is_unreadable(kind: Any, expected: NDArray) -> None:
    """So that all files of a data set agree."""
    embed = Embedder(TEACHER, batch_size=BATCH, dtype="float16", normalize=True)
    batches = [embed(kind({"image": files})) for files in (IMAGES, [*IMAGES[:8], b"x", *IMAGES[9:]], [b"", None])]
    assert {batch.schema for batch in batches} == {
        pa.schema([("image", pa.binary()), ("embedding", pa.list_(pa.float16())), ("error", pa.string())])
    }
    assert [batch["error"].null_count for batch in batches] == [11, 10, 0]
    assert [batch["embedding"].null_count for batch in batches] == [0, 1, 2]
    rows = np.array(batches[0]["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3)


def test_options_are_those_of_the_command(tmp_path: Path) -> None:
    options = {"pooling": "mean", "representation": "layer_mean", "normalize": True, "dtype": "float16"}
    flags = ["--pooling", "mean", "--representation", "layer_mean", "--normalize", "--dtype", "float16"]
    rows = by_command(tmp_path, TEACHER, IMAGES, ".jpg", *flags)
    batch: Any = Embedder(TEACHER, batch_size=BATCH, **options)({"image": IMAGES})  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(batch["embedding"], rows)
    with pytest.raises(InputError, match="this model has no output_cls; it has"):
        Embedder(str(GOLDEN / "audio_base.pt"), pooling="cls").load()


def test_clips_have_the_embeddings_that_the_command_gives(tmp_path: Path) -> None:
    clips = [encoded_clip(i, 2000 + 531 * i) for i in range(6)]
    model = str(GOLDEN / "audio_base.pt")
    rows = by_command(tmp_path, model, clips, ".flac", "--pooling", "mean")
    columns = Embedder(model, batch_size=BATCH, pooling="mean")({"audio": [*clips, b"RIFF"]})
    np.testing.assert_array_equal(columns["embedding"][:-1], rows)
    assert columns["error"][-1] == "audio: cannot decode as a FLAC, WAV, OGG or MP3 file (4 bytes)"


def test_copies_in_a_process_load_the_model_once_and_a_new_one_reads_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, teacher = tmp_path / "student.safetensors", load_teacher(TEACHER)
    loads, load = [], embedder.load_any
    monkeypatch.setattr(embedder, "load_any", lambda *arguments: loads.append(1) or load(*arguments))

    def export() -> Embedder:
        save_student(teacher.build_student(depth=1), path)
        return Embedder(str(path))

    embed = export()
    shipped = pickle.dumps(embed)
    assert len(shipped) < 1000
    first = embed({"image": IMAGES})["embedding"]
    assert len(pickle.dumps(embed)) == len(shipped)  # the model stays here
    for _ in range(3):
        np.testing.assert_array_equal(pickle.loads(shipped)({"image": IMAGES})["embedding"], first)
    assert len(loads) == 1
    again = export()
    for _ in range(2):  # they take turns
        assert not np.allclose(again({"image": IMAGES})["embedding"], first)
        np.testing.assert_array_equal(embed({"image": IMAGES})["embedding"], first)
    assert len(loads) == 2


# As datasets.map(embed, num_proc=2) does after one call in its own process.
FORKED = """
import multiprocessing, sys, torch
from d2v_composer import Embedder
torch.set_num_threads(2)
embed, files = Embedder(sys.argv[1]), [open(path, "rb").read() for path in sys.argv[2:]]
first = embed({"image": files})["embedding"]
with multiprocessing.get_context("fork").Pool(1) as pool:
    second = pool.map_async(embed, [{"image": files}]).get(60)[0]["embedding"]
print(abs(second - first).max())
"""


def test_a_forked_process_embeds_too(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{number}.jpg": image for number, image in enumerate(IMAGES)})
    ended = run_command(sys.executable, "-c", FORKED, TEACHER, *sorted(tmp_path.iterdir()))
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 1e-5

"""Embed every kind of source into both kinds of file; kill and resume; refuse bad input."""

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet
from streaming import MDSWriter
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.datasets import cifar

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed as embed_recipe
from d2v_composer.data.images import decode_rgb, to_tensor
from d2v_composer.embedding import Embedding, EmbeddingFile, FolderImages
from d2v_composer.models.data2vec2 import Data2Vec2, ImageEncoder, ImageEncoderConfig
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.errors import InputError, RunError
from gated_store import GatedStore
from helpers import GOLDEN, NUM_IMAGES, QUICKSTART, ROOT, encoded_image, run_command, wait_until

COMMAND = (Path(sys.executable).with_name("d2v"), "embed")
TEACHER = GOLDEN / "tiny_base.pt"
SIZE = 32
SMALL_PARTS = ("--part-size", "10", "--batch-size", "4")
# Another order of sums.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as forked processes do: the results are bit-identical."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher() -> Data2Vec2:
    return load_teacher(TEACHER)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of many sizes in a folder with subfolders; read-only."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        path = folder / ("", "b", "a/deep")[i % 3] / f"{i:02}.{'jpg' if i % 2 else 'JPEG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(i, size=24 + i))
    (folder / "notes.txt").write_text("not an image")
    (folder / "b" / "long-name-of-an-image.png").write_bytes(encoded_image(77))
    return folder


def embed(model: Path, source: Path | str, out: Path, *options: str | Path, workers: int = 0) -> Embedding:
    return run(model, source, out, "--workers", workers, *options)


def run(*arguments: object) -> Embedding:
    """Call ``d2v embed`` in this process."""
    return embed_recipe.main([str(argument) for argument in arguments])


def loaded(out: Path) -> tuple[list, NDArray]:
    """Read ids and embeddings."""
    if out.suffix == ".parquet":
        table = parquet.read_table(out)
        return table["id"].to_pylist(), np.array(table["embedding"].to_pylist())
    return np.load(out.with_name(f"{out.stem}.ids.npy")).tolist(), np.load(out, mmap_mode="r")


def expected(model: Transformer, images: list[bytes], **options: str) -> Tensor:
    """Embed image files with the model itself, (N, D)."""
    pixels = [to_tensor(decode_rgb(image, "image").resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in images]
    with torch.inference_mode():
        return model.embed(torch.stack(pixels), **options)  # pyright: ignore[reportArgumentType]


def image_paths(folder: Path) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".txt")
    return sorted(path for path in paths if (folder / path).is_file())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_embeds_a_folder(
    teacher: Data2Vec2, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    out = tmp_path / "new" / f"photos.{suffix}"
    result = embed(TEACHER, photos, out, *SMALL_PARTS, workers=2)
    ids, embeddings = loaded(out)
    assert ids == image_paths(photos)
    want = expected(teacher, [(photos / path).read_bytes() for path in ids])
    np.testing.assert_allclose(embeddings, want.numpy(), **TOLERANCE)
    assert (result.images, result.channels, result.skipped, result.resumed) == (*want.shape, [], 0)
    *_, wrote, following = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"wrote {out}: 41 embeddings of 48 channels, \d+ images/s", wrote)
    assert following.startswith("next: ")
    # There are no other files.
    assert names(out.parent) == {out.name} | ({"photos.ids.npy"} if suffix == "npy" else set())


def test_options_change_the_embeddings(teacher: Data2Vec2, photos: Path, tmp_path: Path) -> None:
    options = ("--pooling", "mean_patches", "--representation", "layer_mean", "--normalize", "--dtype", "float16")
    want = expected(
        teacher,
        [(photos / path).read_bytes() for path in image_paths(photos)],
        pooling="mean_patches",
        representation="layer_mean",
    )
    for suffix in ("npy", "parquet"):
        embed(TEACHER, photos, tmp_path / f"photos.{suffix}", *options, *SMALL_PARTS)
        _, embeddings = loaded(tmp_path / f"photos.{suffix}")
        np.testing.assert_allclose(embeddings, normalize(want, dim=1).numpy(), rtol=0, atol=5e-4)
    assert np.load(tmp_path / "photos.npy").dtype == np.float16
    assert parquet.read_schema(tmp_path / "photos.parquet").field("embedding").type == pyarrow.list_(
        pyarrow.float16(), want.shape[1]
    )
    embed(TEACHER, photos, tmp_path / "amp.npy", "--precision", "amp_bf16", *options, *SMALL_PARTS)
    _, embeddings = loaded(tmp_path / "amp.npy")
    np.testing.assert_allclose(embeddings, normalize(want, dim=1).numpy(), rtol=0, atol=3e-2)
    assert not np.array_equal(embeddings, np.load(tmp_path / "photos.npy"))


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_embeds_mds(teacher: Data2Vec2, many_shards: Path, tmp_path: Path, suffix: str) -> None:
    embed(TEACHER, many_shards, tmp_path / f"mds.{suffix}", *SMALL_PARTS, workers=2)
    ids, embeddings = loaded(tmp_path / f"mds.{suffix}")
    assert ids == list(range(NUM_IMAGES))
    want = expected(teacher, [encoded_image(i) for i in range(NUM_IMAGES)])
    np.testing.assert_allclose(embeddings, want.numpy(), **TOLERANCE)


@pytest.mark.slow
def test_embeds_from_an_object_store(
    object_store: GatedStore, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(TEACHER, many_shards, tmp_path / "local.npy", *SMALL_PARTS)
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.create_bucket_of_images("embedding", many_shards)
    (tmp_path / "cache").mkdir()
    shutil.copyfile(many_shards / "shard.00003.mds", tmp_path / "cache" / "shard.00003.mds")
    with (tmp_path / "cache" / "shard.00003.mds").open("r+b") as file:
        file.write(b"damaged")  # shards of an earlier run are verified too
    options = ("--local", tmp_path / "cache", "--cache-limit", "30kb")
    embed(TEACHER, "s3://embedding/images", tmp_path / "remote.npy", *options, *SMALL_PARTS, workers=2)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 30_000
    with pytest.raises(InputError, match=r"s3://embedding/nothing/index\.json: cannot be fetched"):
        embed(TEACHER, "s3://embedding/nothing", tmp_path / "nothing.npy", "--local", tmp_path / "other")
    assert (tmp_path / "remote.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_embeds_cifar(teacher: Data2Vec2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    made = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[kind]
    folder = tmp_path / made.base_folder
    folder.mkdir()
    (folder / made.meta["filename"]).write_bytes(pickle.dumps({made.meta["key"]: ["cat", "dog"]}))
    rng, rows = np.random.default_rng(0), []
    for name, _ in made.train_list + made.test_list:
        rows.append(rng.integers(0, 256, (4, 3072), dtype=np.uint8))
        (folder / name).write_bytes(pickle.dumps({"data": rows[-1], "labels": [0] * 4, "fine_labels": [0] * 4}))
    images = torch.from_numpy(np.concatenate(rows)).view(-1, 3, 32, 32)
    num_train = len(images) - 4
    for i, source in enumerate((tmp_path, folder)):
        embed(TEACHER, source, tmp_path / f"{i}.npy", *SMALL_PARTS)
        ids, embeddings = loaded(tmp_path / f"{i}.npy")
        assert ids == [f"train/{i:05}" for i in range(num_train)] + [f"test/{i:05}" for i in range(4)]
        np.testing.assert_allclose(embeddings, teacher.embed(images).numpy(), **TOLERANCE)
    (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
    (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=r"holds both CIFARs: give .*/cifar-10-batches-py or .*/cifar-100-python"):
        embed(TEACHER, tmp_path, tmp_path / "both.npy")


def test_embeds_with_a_student(
    teacher: Data2Vec2, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "student.safetensors"
    student = teacher.build_student(depth=2)
    student.provenance = {"config": {"retrieval": {"representation": "layer_mean", "pooling": "mean", "ks": [1]}}}
    save_student(student, path)
    embed(path, photos, tmp_path / "photos.npy", "--teacher", TEACHER)  # not read
    assert "embedding: layer_mean_mean (the primary embedding of the model's run)\n" in capsys.readouterr().out
    ids, embeddings = loaded(tmp_path / "photos.npy")
    images = [(photos / path).read_bytes() for path in ids]
    want = expected(load_student(path), images, representation="layer_mean", pooling="mean")
    np.testing.assert_allclose(embeddings, want.numpy(), **TOLERANCE)


def test_a_worker_that_is_killed_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel if memory runs short."""
    monkeypatch.setattr(FolderImages, "load", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    cause = r"^--workers 1: the images cannot be read further \(DataLoader worker \(pid.*to resume.*$"
    with pytest.raises(RunError, match=cause):
        embed(TEACHER, photos, tmp_path / "photos.npy", workers=1)


ROWS = np.random.default_rng(0).standard_normal((30, 256, 1024), dtype=np.float32)  # a MB each


def test_a_corrupt_shard_is_named(many_shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(many_shards, tmp_path / "data")
    shard = data / "shard.00005.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    # --skip-unreadable is for images, not for shards.
    ended = run_command(*COMMAND, TEACHER, data, tmp_path / "mds.npy", "--skip-unreadable", "--workers", "1")
    assert ended.returncode == 1
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"shard\.00005\.mds: its content has changed \(xxh64\)", line)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "mds.npy").exists()


def run_and_kill(arguments: list[str | Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a forked process that stops in its third part, and end it by SIGKILL."""
    embed_images, calls = Transformer.embed, itertools.count()

    def embed_slowly(*arguments: Any) -> Tensor:
        if next(calls) == 5:  # two batches a part
            time.sleep(60)
        return embed_images(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "embed", embed_slowly)
        process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
        process.start()
    wait_until(lambda: images_in(folder) == 16)
    process.kill()
    process.join()


def images_in(folder: Path) -> int:
    progress = folder / "progress.json"
    return json.loads(progress.read_bytes())["images"] if progress.exists() else 0


def test_resumes_to_the_same_bytes_after_a_kill(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, folder = tmp_path / "photos", tmp_path / "photos.npy", tmp_path / ".photos.npy.partial"
    shutil.copytree(photos, source)
    embed(TEACHER, source, tmp_path / "whole.npy", *SMALL_PARTS)
    run_and_kill([TEACHER, source, out, *SMALL_PARTS, "--workers", "1"], folder, monkeypatch)
    assert names(tmp_path) == {"photos", "whole.npy", "whole.ids.npy", folder.name}

    # Rows of two different runs would not belong together.
    other = tmp_path / "other.safetensors"
    save_student(load_teacher(TEACHER).build_student(depth=1), other)
    with pytest.raises(InputError, match=rf"{folder}: an interrupted run had another model: delete that folder, or c"):
        embed(other, source, out, *SMALL_PARTS)
    with pytest.raises(InputError, match="another source, images: "):
        embed(TEACHER, source / "b", out, *SMALL_PARTS)
    with pytest.raises(InputError, match="another pooling, normalize: "):
        embed(TEACHER, source, out, *SMALL_PARTS, "--pooling", "mean", "--normalize")
    first = source / image_paths(source)[0]
    before = first.stat()
    first.write_bytes(bytes(before.st_size))
    with pytest.raises(InputError, match="another source: "):
        embed(TEACHER, source, out, *SMALL_PARTS)
    assert images_in(folder) == 16

    # An image that changed unnoticed and became unreadable proves that finished parts are not embedded again.
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert embed(TEACHER, source, out, *SMALL_PARTS, workers=1).resumed == 16
    assert "resumed an interrupted run after 16 images" in capsys.readouterr().out
    for name in ("{}.npy", "{}.ids.npy"):
        assert (tmp_path / name.format("photos")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    assert not folder.exists()


def test_a_file_is_replaced_only_if_asked_and_when_the_new_one_is_complete(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "photos.npy"
    embed(TEACHER, photos, out, *SMALL_PARTS)
    old = out.read_bytes()
    with pytest.raises(InputError, match=r"photos\.npy: exists already: choose another file, or append --overwrite"):
        embed(TEACHER, photos, out, "--pooling", "mean")
    again = ("--pooling", "mean", "--overwrite", *SMALL_PARTS)
    run_and_kill([TEACHER, photos, out, *again], tmp_path / ".photos.npy.partial", monkeypatch)
    assert out.read_bytes() == old
    assert embed(TEACHER, photos, out, *again).resumed == 16
    embed(TEACHER, photos, tmp_path / "new.npy", "--pooling", "mean", *SMALL_PARTS)
    assert out.read_bytes() == (tmp_path / "new.npy").read_bytes() != old


ROWS = np.random.default_rng(0).standard_normal((3, 8, 16), dtype=np.float32)


def write_rows(out: Path) -> None:
    """Write, or resume, a file of three parts; the third image of each part is skipped."""
    file = EmbeddingFile(out)
    with file.open({"model": "a"}, (27, 16), "float32"):
        for i in range(file.num_images // 9, 3):
            file.append(ROWS[i], [(9 * i + 2, "damaged")])
        file.finish(lambda indices: indices)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_resumes_to_the_same_bytes_from_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Killed before any of the renames and cuts by which a run goes on."""
    out, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    write_rows(whole)
    num_steps = 0
    while not out.exists():
        with monkeypatch.context() as patch:
            steps = itertools.count()
            for owner, name in ((os, "truncate"), (os, "posix_fallocate"), (Path, "replace"), (Path, "unlink")):
                patch.setattr(owner, name, interrupted(getattr(owner, name), steps, num_steps))
            with contextlib.suppress(KeyboardInterrupt):
                write_rows(out)
        if not out.exists():
            num_steps += 1
            write_rows(out)
            assert out.read_bytes() == whole.read_bytes()
            for path in tmp_path.glob("out.*"):
                path.unlink()
        assert not (tmp_path / f".{out.name}.partial").exists()
    assert num_steps >= 5
    ids, embeddings = loaded(whole)
    assert ids == [i for i in range(27) if i % 9 != 2]
    np.testing.assert_array_equal(embeddings, ROWS.reshape(-1, 16))


def interrupted(function: Callable[..., Any], steps: Iterator[int], last: int) -> Callable[..., Any]:
    """Raise instead of the call that is this number among all patched ones."""

    def call(*arguments: Any, **options: Any) -> Any:
        if next(steps) == last:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_a_full_disk_is_one_line_before_the_first_image(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.npy"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))  # the file needs 41 rows of 192 bytes
    try:
        with pytest.raises(RunError, match=f"^{out}: cannot be written: File too large$"):
            embed(TEACHER, photos, out, *SMALL_PARTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert embed(TEACHER, photos, out, *SMALL_PARTS).images == 41


@pytest.mark.parametrize("kind", ["folder", "mds"])
def test_unreadable_images_stop_or_are_skipped(
    teacher: Data2Vec2, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    images = [encoded_image(i) for i in range(12)]
    images[5] = images[5][:200]
    images[8:12] = [b""] * 4  # a whole batch
    source = tmp_path / "source"
    source.mkdir()
    if kind == "folder":
        for i, image in enumerate(images):
            (source / f"{i:02}.jpg").write_bytes(image)
        (source / "05.jpg").unlink()
        (source / "05.jpg").symlink_to("nowhere")
    else:
        with MDSWriter(out=str(source), columns={"image": "bytes"}) as writer:
            for image in images:
                writer.write({"image": image})
    out = tmp_path / "out.npy"
    named = f"{source / '05.jpg'}: cannot be read" if kind == "folder" else f"sample 5 of {source}: not an image"
    small = ("--part-size", "4", "--batch-size", "4")
    ended = run_command(*COMMAND, TEACHER, source, out, *small, "--workers", "1")
    assert ended.returncode == 2
    assert re.fullmatch(f"error: {re.escape(named)}.*; --skip-unreadable skips such images", ended.stderr.strip())
    result = embed(TEACHER, source, out, *small, "--skip-unreadable")
    readable = [0, 1, 2, 3, 4, 6, 7]
    ids, embeddings = loaded(out)
    assert ids == ([f"{i:02}.jpg" for i in readable] if kind == "folder" else readable)
    want = expected(teacher, [images[i] for i in readable])
    np.testing.assert_allclose(embeddings, want.numpy(), **TOLERANCE)
    assert (result.images, result.resumed, len(result.skipped)) == (7, 4, 5)
    printed = capsys.readouterr().out
    assert "skipped as unreadable: 5" in printed
    assert named in printed
    embed(TEACHER, source, tmp_path / "out.parquet", *small, "--skip-unreadable")
    assert loaded(tmp_path / "out.parquet")[0] == ids


def test_an_embedding_that_is_not_finite_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformer, "embed", lambda self, images, *_: torch.full((len(images), 48), 1e5))
    with pytest.raises(InputError, match=r"00\.JPEG: its embedding is not finite with .* --dtype float16"):
        embed(TEACHER, photos, tmp_path / "photos.npy", "--dtype", "float16")
    embed(TEACHER, photos, tmp_path / "photos.npy")


@pytest.mark.parametrize(
    ("model", "source", "out", "options", "message"),
    [
        ("nowhere.pt", "photos", "o.npy", [], "nowhere.pt: no such file"),
        (
            "no_cls",
            "photos",
            "o.npy",
            ["--pooling", "cls"],
            "pooling: this model has no CLS token; allowed are mean, mean_patches",
        ),
        ("teacher", "nowhere", "o.npy", [], "nowhere: no such folder"),
        ("teacher", "s3://bucket/images", "o.npy", [], "s3://bucket/images: is remote: name a folder for its shards"),
        ("teacher", "photos", "o.npy", ["--local", "cache"], "photos: is local: --local and --cache-limit are for the"),
        ("teacher", "photos", "o.csv", [], "o.csv: must end in .npy or .parquet"),
        ("teacher", "photos", "there.npy", [], "there.npy: exists already: choose another file, or "),
        (
            "teacher",
            "photos",
            "half.npy",
            [],
            "half.ids.npy: exists already: choose another file, or ",
        ),
        ("teacher", "photos", "photos/a.jpg/o.npy", [], "a.jpg/o.npy: cannot be written: "),
        ("teacher", "photos", "o.npy", ["--precision", "amp_fp16"], "--precision: amp_fp16 needs a GPU"),
        ("teacher", "photos", "o.npy", ["--batch-size", "0"], "--batch-size: must be 1 to 65536, got 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    source: str,
    out: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for folder in ("photos", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded_image(0))
    shutil.copyfile(TEACHER, "teacher")
    encoder = ImageEncoder(ImageEncoderConfig(embed_dim=8, num_heads=2, prenet_depth=0, image_size=32)).freeze()
    save_student(Student(encoder, StudentConfig(depth=1, num_heads=2, num_alibi_heads=0)), Path("no_cls"))
    for name in ("there.npy", "half.ids.npy"):
        (tmp_path / name).write_bytes(b"mine")
    before = names(tmp_path)
    with pytest.raises(InputError) as caught:
        embed(Path(model), source, Path(out), *options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_near_duplicates_as_in_the_manual(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(source / "03.jpg", source / "b" / "copy.jpg")
    embed(QUICKSTART / "teacher.safetensors", source, tmp_path / "photos.npy")
    section = (ROOT / "recipes" / "README.md").read_text().split("## Embedding a collection")[1]
    [code] = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    ids, embeddings = loaded(tmp_path / "photos.npy")
    centred = embeddings - embeddings.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred @ centred.T - 2 * np.eye(len(ids))
    want = {tuple(sorted([ids[i], ids[row.argmax()]])) for i, row in enumerate(cosines) if row.max() > 0.95}
    assert found["duplicates"] == sorted(want)
    assert {type(name) for pair in found["duplicates"] for name in pair} == {str}
    assert ("03.jpg", "b/copy.jpg") in want
    assert len(want) < len(ids)

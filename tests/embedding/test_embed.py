"""Embed every kind of source; kill and resume; refuse bad input."""

import itertools
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from containers import write_parquet
from d2v_composer import load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import convert_teacher, export
from d2v_composer.commands import embed as embed_command
from d2v_composer.data.images import Images
from d2v_composer.data.modality import read_sample_file
from d2v_composer.embedding import embed_source as embedding
from d2v_composer.embedding.embed_source import Embedded
from d2v_composer.models.configs import ImageEncoderConfig, StudentConfig
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError, RunError, UnreadableSampleError
from d2v_composer.system.files import sole_user
from gated_store import GatedStore
from helpers import GOLDEN, encoded_image, flip_bit, time_limit, write_files, write_images

TEACHER = GOLDEN / "tiny_base.pt"
SIZE = 32
SMALL_BATCHES = ("--batch-size", "4")
AGAIN = (*SMALL_BATCHES, "--overwrite")
# Another order of sums.
TOLERANCE = {"rtol": 0, "atol": 2e-5}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes in a folder with subfolders; read-only."""
    names = [f"{('', 'b/', 'a/deep/')[i % 3]}{i:02}.{'jpg' if i % 2 else 'JPEG'}" for i in range(40)]
    images = {name: encoded_image(i, size=24 + i) for i, name in enumerate(names)}
    other_files = {"notes.txt": b"not an image", "b/long-name-of-an-image.png": encoded_image(77)}
    return write_files(tmp_path_factory.mktemp("photos"), images | other_files)


def embed(model: Path, source: Path | str, out: Path | str, *options: str | Path, workers: int = 0) -> Embedded:
    """Call ``d2v embed`` in this process."""
    result = embed_command.main([str(argument) for argument in (model, source, out, "--workers", workers, *options)])
    assert result is not None
    return result


def loaded(out: Path) -> tuple[list, NDArray]:
    """Read ids and embeddings."""
    return np.load(out.with_name(f"{out.stem}.ids.npy")).tolist(), np.load(out, mmap_mode="r")


def expected(images: list[bytes], **options: Any) -> Tensor:
    """Embed image files with the teacher itself, (N, D)."""
    pixels = [Images(SIZE).decode(image, "image") for image in images]
    with torch.inference_mode():
        return load_teacher(TEACHER).embed(torch.stack(pixels), **options)


def assert_is_whole(out: Path, whole: Path) -> None:
    """Compare a table that was interrupted with an undisturbed one, byte by byte."""
    assert out.read_bytes() == whole.read_bytes()
    assert loaded(out)[0] == loaded(whole)[0]
    assert not (out.parent / f".{out.name}.partial").exists()


def image_paths(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.[jJp]*"))


def test_embeds_a_folder(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "photos.npy"
    embed(TEACHER, photos, out, *SMALL_BATCHES, workers=2)
    ids, embeddings = loaded(out)
    assert ids == image_paths(photos)
    np.testing.assert_allclose(embeddings, expected([(photos / path).read_bytes() for path in ids]), **TOLERANCE)
    *_, wrote, following = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"wrote {out}: 41 embeddings of 48 dimensions, \d+ images/s", wrote)
    assert following.startswith("next: ")
    # There are no other files.
    assert set(os.listdir(out.parent)) == {"photos.npy", "photos.ids.npy", "photos.model.json"}


def test_options_change_the_embeddings(photos: Path, tmp_path: Path) -> None:
    options = ("--pooling", "mean_patches", "--representation", "layer_mean", "--normalize", "--dtype", "float16")
    embed(TEACHER, photos, tmp_path / "photos.npy", "--precision", "amp_bf16", *options)
    ids, embeddings = loaded(tmp_path / "photos.npy")
    images = [(photos / path).read_bytes() for path in ids]
    want = normalize(expected(images, pooling="mean_patches", representation="layer_mean"), dim=1)
    np.testing.assert_allclose(embeddings, want.numpy(), rtol=0, atol=3e-2)
    assert embeddings.dtype == np.float16


def test_names_that_are_not_text_are_no_ids_of_parquet(tmp_path: Path) -> None:
    source, said = write_images(tmp_path / "photos", ["caf\udce9.jpg"]), r"^'caf\\udce9\.jpg' is not UTF-8, which"
    with pytest.raises(InputError, match=rf"{said} Parquet needs; rename the file, or choose an OUT that"):
        embed(TEACHER, source, tmp_path / "photos.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    embed(TEACHER, source, tmp_path / "photos.npy")
    assert loaded(tmp_path / "photos.npy")[0] == ["caf\udce9.jpg"]


def test_a_model_of_other_channels_is_one_line(photos: Path, tmp_path: Path) -> None:
    """It is exported as any other."""
    sizes: Any = {"in_chans": 5, "image_mean": (0.5,) * 5, "image_std": (0.5,) * 5, "image_size": 32}
    encoder = ImageEncoder(ImageEncoderConfig(embed_dim=32, num_heads=2, prenet_depth=1, **sizes)).freeze()
    save_student(Student(encoder, StudentConfig(depth=1)), tmp_path / "five.safetensors")
    export.main([str(tmp_path / "five.safetensors"), str(tmp_path / "again" / "five.safetensors")])
    with pytest.raises(
        InputError, match=r"^the model must have 3 input channels, because images are read as RGB; got 5"
    ):
        embed(tmp_path / "five.safetensors", photos, tmp_path / "photos.npy")


def test_another_programs_index_makes_no_mds(photos: Path, tmp_path: Path) -> None:
    """But a damaged index does."""
    source = shutil.copytree(photos / "b", tmp_path / "b")
    (source / "index.json").write_text('{"pages": ["00.jpg"]}')
    assert embed(TEACHER, source, tmp_path / "out.npy").images == len(image_paths(photos / "b"))
    (source / "index.json").write_text('{"shards": [')
    with pytest.raises(InputError, match=r"index\.json cannot be read: "):
        embed(TEACHER, source, tmp_path / "other.npy")


def test_a_corrupt_shard_is_not_skipped(many_shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(many_shards, tmp_path / "data")
    shard = data / "shard.00005.mds"
    shard.write_bytes(flip_bit(shard.read_bytes()))
    with pytest.raises(RunError, match=r"shard\.00005\.mds: the content does not have the xxh64 hash in the index"):
        embed(TEACHER, data, tmp_path / "out.npy", "--skip-unreadable")  # which is for images, not for shards
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.slow
def test_embeds_from_an_object_store(reachable_store: GatedStore, many_shards: Path, tmp_path: Path) -> None:
    embed(TEACHER, many_shards, tmp_path / "local.npy", *SMALL_BATCHES)
    reachable_store.create_bucket_of_images("embedding", many_shards)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "shard.00003.mds").write_bytes(b"damaged")  # shards of an earlier run are verified too
    options = ("--local", cache, "--cache-limit", "30kb")
    embed(TEACHER, "s3://embedding/images", tmp_path / "remote.npy", *options, *SMALL_BATCHES, workers=2)
    assert sum(path.stat().st_size for path in cache.iterdir() if path.is_file()) <= 30_000
    with pytest.raises(InputError, match=r"s3://embedding/nothing/index\.json cannot be fetched"):
        embed(TEACHER, "s3://embedding/nothing", tmp_path / "nothing.npy", "--local", tmp_path / "other")
    assert (tmp_path / "remote.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()


@pytest.fixture
def interrupted(photos: Path, tmp_path: Path) -> Path:
    """The folder of a call that ended at its last image: its source, and the files that it replaces."""
    write_files(shutil.copytree(photos, tmp_path / "photos"), {"y.jpg": b""})
    write_files(tmp_path, {"photos.npy": b"old", "photos.ids.npy": b"old"})
    with pytest.raises(InputError, match=r"y\.jpg: cannot decode as an image"):
        embed(TEACHER, tmp_path / "photos", tmp_path / "photos.npy", *AGAIN)
    return tmp_path


def test_rows_of_two_different_runs_are_not_joined(interrupted: Path) -> None:
    source, out, other = (interrupted / name for name in ("photos", "photos.npy", "other.safetensors"))
    save_student(load_teacher(TEACHER).build_student(depth=1), other)
    renamed = interrupted / "renamed.safetensors"  # the same weights, but another embedding by default
    convert_teacher.main([str(TEACHER), str(renamed), "--embedding", "output_mean"])
    for model, images, options, difference in (
        (other, source, (), "model, embedding"),
        (TEACHER, source / "b", (), "source"),
        (TEACHER, source, ("--pooling", "mean", "--normalize"), "embedding, normalize"),
        (renamed, source, (), "embedding"),
    ):
        named = rf"/\.photos\.npy\.partial: an interrupted run had other settings \({difference}\); delete that folder"
        with pytest.raises(InputError, match=named):
            embed(model, images, out, *AGAIN, *options)
    assert out.read_bytes() == (interrupted / "photos.ids.npy").read_bytes() == b"old"
    assert embed(TEACHER, source, out, *AGAIN, "--skip-unreadable", workers=1).resumed == 40


@pytest.mark.parametrize(
    ("change", "resumed"),
    [
        (lambda source: (source / "13.jpg").write_bytes(encoded_image(13)), 8),  # mended
        (lambda source: (source / "13.jpg").unlink(), 8),
        (lambda source: (source / "13.jpg").rename(source / "30.jpg"), 8),
        (lambda source: (source / "05.jpg").write_bytes(encoded_image(50)), 0),
        (lambda source: (source / "00.a.jpg").write_bytes(encoded_image(50)), 0),
    ],
    ids=["mended", "removed", "renamed", "another one changed", "added"],
)
def test_resumes_where_the_source_changed(tmp_path: Path, change: Callable[[Path], Any], resumed: int) -> None:
    source, out, whole = tmp_path / "source", tmp_path / "out.npy", tmp_path / "whole.npy"
    write_images(source, [f"{i:02}.jpg" for i in range(18)])
    (source / "13.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"13\.jpg: cannot decode as an image"):
        embed(TEACHER, source, out, *SMALL_BATCHES)
    change(source)
    options = (*SMALL_BATCHES, "--skip-unreadable")
    assert embed(TEACHER, source, out, *options).resumed == resumed
    embed(TEACHER, source, whole, *options)
    assert_is_whole(out, whole)


def test_a_second_process_for_one_file_is_refused(photos: Path, tmp_path: Path) -> None:
    """Even if it waits until the first one is done, and has removed the folder with the lock."""
    out, folder = tmp_path / "out.npy", tmp_path / ".out.npy.partial"
    with ThreadPoolExecutor() as pool, sole_user(folder / ".lock"):
        second = pool.submit(embed, TEACHER, photos, out)
        time.sleep(3)
        assert second.running()
        shutil.rmtree(folder)
    with pytest.raises(
        InputError,
        match=r"out\.npy: another process is writing this file; wait until that process ends, or choose another OUT$",
    ):
        second.result()


def test_a_rank_whose_share_does_not_come_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has ended, as if it had found other files; while it works, the first one waits."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(embedding, "RANK_SECONDS", 0.1)
    out = tmp_path / "out.npy"
    with time_limit(30), ThreadPoolExecutor() as pool:
        with sole_user(tmp_path / ".out.npy.partial" / ".lock1"):
            first = pool.submit(embed, TEACHER, photos, out, *SMALL_BATCHES)
            time.sleep(2)
            assert first.running()
        with pytest.raises(
            RunError, match=r"out\.npy\.partial: the other ranks ended without embedding 17 samples; all"
        ):
            first.result()
    assert not out.exists()


def test_a_pipe_and_a_long_name_are_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, problem in {"pipe.jpg": "pipe.jpg is not a regular file", "x" * 300: "cannot be read"}.items():
        with time_limit(5), pytest.raises(UnreadableSampleError, match=problem):
            read_sample_file(tmp_path / name)


@pytest.mark.parametrize("limit", [7000, 1000], ids=["file", "chunk"])
def test_a_full_disk_is_one_line(tmp_path: Path, photos: Path, limit: int) -> None:
    """The line names a folder on that disk; 41 rows of 192 bytes, 8 in a chunk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match=rf"^{tmp_path}\S+ cannot be written: File too large$"):
            embed(TEACHER, photos, tmp_path / "out.npy", *SMALL_BATCHES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert embed(TEACHER, photos, tmp_path / "out.npy", *SMALL_BATCHES).images == 41  # where there is room again


def test_unreadable_images_stop_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {f"{i:02}.jpg": encoded_image(i) for i in range(8) if i != 5}
    out, a_whole_batch = tmp_path / "out.npy", {f"{i:02}.jpg": b"" for i in range(8, 12)}
    source = write_files(tmp_path / "source", images | a_whole_batch)
    (source / "05.jpg").symlink_to("nowhere")
    named = f"{source / '05.jpg'} cannot be read"
    with pytest.raises(InputError, match=rf"^{named}.*; --skip-unreadable skips such images$"):
        embed(TEACHER, source, out, *SMALL_BATCHES, workers=1)
    result = embed(TEACHER, source, out, *SMALL_BATCHES, "--skip-unreadable")
    ids, embeddings = loaded(out)
    assert ids == [*images]
    np.testing.assert_allclose(embeddings, expected([*images.values()]), **TOLERANCE)
    assert (result.images, len(result.skipped)) == (7, 5)
    assert f"skipped as unreadable: 5\n  {named}" in capsys.readouterr().out


def test_an_embedding_that_is_not_finite_is_refused(photos: Path, tmp_path: Path) -> None:
    """The student's map makes numbers beyond float16."""
    student = load_teacher(TEACHER).build_student(depth=1).eval()
    student.align(torch.ones(24, 4 * student.embed_dim), torch.full((24,), 1e6), "output_cls")
    save_student(student, tmp_path / "large.safetensors")
    with pytest.raises(InputError, match=r"00\.JPEG.* is not finite with .* float16"):
        embed(tmp_path / "large.safetensors", photos, tmp_path / "photos.npy", "--dtype", "float16")


@pytest.mark.parametrize(
    ("source", "out", "options", "named"),
    [
        ("s3://bucket/images", "o.npy", [], "s3://bucket/images"),
        ("*.tar", "o.npy", [], "*.tar"),
        ("photos", "o.npy", ["--local", "c"], "--local"),
        ("photos", "o.csv", [], "o.csv"),
        ("photos", "half.npy", [], "half.ids.npy"),
        ("photos", "other.npy", [], "other.model.json"),
        ("photos", "o.npy", ["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str, options: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"photos/a.jpg": encoded_image(0), "half.ids.npy": b"mine", "other.model.json": b"mine"})
    before = set(os.listdir())
    with pytest.raises(InputError) as caught:
        embed(TEACHER, source, Path(out), *options)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(os.listdir()) == before


def test_out_is_no_file_of_the_source(tmp_path: Path) -> None:
    """Its images would be replaced by their embeddings, even under another name."""
    source, link, links = (tmp_path / name for name in ("images.parquet", "link.parquet", "links"))
    for path in (source, tmp_path / "more.parquet"):
        write_parquet(path, {"image": [encoded_image(0)] * 4})
    links.mkdir()
    for path in (link, links / "1.parquet"):
        path.symlink_to(source)
    before = source.read_bytes()
    for out, given in itertools.product((source, link), (source, tmp_path, tmp_path / "*es.parquet", links)):
        with pytest.raises(InputError, match=rf"^{out} is among the source's files; choose another OUT$"):
            embed(TEACHER, given, out, "--overwrite")
    assert source.read_bytes() == before

"""Convert ImageNet's layouts and unusual files to MDS, on disk and in a real object store; kill and resume."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage.upload import S3Uploader
from tqdm import tqdm

from d2v_composer.commands import convert_images
from d2v_composer.data import convert
from d2v_composer.data import convert as conversion
from d2v_composer.data.convert import Destination, as_rgb_jpeg, find_images
from d2v_composer.data.images import decode_rgb
from d2v_composer.system import command_line
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.files import sole_user
from gated_store import GatedStore
from helpers import encoded_image, wait_until

CLASSES = ("n01440764", "n01443537", "n02105855")
NUM_IMAGES = 90
SMALL_SHARDS = ("--shard-size", "10kb", "--workers", "2")
REMOTE_SHARDS = ("--shard-size", "50kb", "--workers", "2")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/WNID/*.JPEG, thirty images per class; read-only."""
    folder = tmp_path_factory.mktemp("imagenet")
    for i in range(NUM_IMAGES):
        write(folder / "train" / CLASSES[i % 3] / f"{CLASSES[i % 3]}_{i}.JPEG", encoded_image(i, size=48))
    return folder


@pytest.fixture
def bucket(object_store: GatedStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a new bucket."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    name = f"b{abs(hash(request.node.name))}"
    object_store.create_bucket(name)
    return name


def forked(arguments: list[str]) -> BaseProcess:
    """:func:`main` in a forked process, which keeps the patches of this one."""

    def run() -> None:
        # A killed process must not keep the lock of this process's bars: one for it and its workers, like tqdm's.
        tqdm.set_lock(multiprocessing.get_context("fork").RLock())
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def main(arguments: Sequence[str]) -> convert.Conversion:
    """Call ``d2v convert-images`` in this process."""
    return convert_images.main(arguments)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def saved(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def samples(folder: Path) -> list[dict]:
    """Verify every shard against the index, and return the samples."""
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        content = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"]
        assert shard["raw_data"]["hashes"] == {name: get_hash(name, content) for name in ("sha1", "xxh64")}
    return [sample for shard in index["shards"] for sample in MDSReader.from_json(str(folder), None, shard)]


def images(folder: Path) -> list[bytes]:
    return sorted(sample["image"] for sample in samples(folder))


def originals(source: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in source.rglob("*.JPEG"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_converts_train_folders(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write(tmp_path / "stray.txt", b"")
    result = main([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    found = samples(tmp_path / "out")
    want = {
        path.read_bytes(): CLASSES.index(path.parent.name) for path in (source / "train").rglob("*.JPEG")
    }  # byte for byte
    assert {sample["image"]: int(sample["label"]) for sample in found} == want
    assert len(found) == len(want) == NUM_IMAGES
    assert result.images == NUM_IMAGES
    assert result.classes == 3
    assert result.shards == len(list((tmp_path / "out").glob("shard.*.mds"))) > 5
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("shard.*.mds"))
    assert (result.converted, result.skipped) == ({}, [])
    # One index, and no temporary files.
    others = {"index.json", "conversion.json"}
    assert {name for name in tree(tmp_path / "out") if not name.startswith("shard.")} == others
    assert json.loads((tmp_path / "out" / "conversion.json").read_bytes())["classes"] == list(CLASSES)
    # Shuffled over all classes: the first shard has more than one.
    assert len({int(sample["label"]) for sample in found[:12]}) > 1
    printed = capfd.readouterr()
    assert "90 images, 3 classes" in printed.out
    assert printed.err == ""


def test_streaming_reads_the_data_set(source: Path, tmp_path: Path):
    main([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=4, shuffle=False, validate_hash="sha1")
    assert sorted(sample["image"] for sample in dataset) == originals(source)


def test_same_result_for_any_number_of_workers(source: Path, tmp_path: Path):
    for name, options in {"one": ["--workers", "1"], "three": ["--workers", "3"], "seed": ["--seed", "1"]}.items():
        main([str(source), str(tmp_path / name), *SMALL_SHARDS, *options])
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert images(tmp_path / "seed") == images(tmp_path / "one")
    assert samples(tmp_path / "seed") != samples(tmp_path / "one")


@pytest.mark.parametrize("layout", ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "."])
def test_val_takes_its_labels_from_a_file(tmp_path: Path, layout: str):
    for i, name in enumerate(CLASSES):
        write(tmp_path / "in" / layout / "train" / name / f"{i}.JPEG", encoded_image(i))
    rows = ["ImageId,PredictionString"]
    for i in range(4):
        write(tmp_path / "in" / layout / "val" / f"ILSVRC2012_val_{i:08}.JPEG", encoded_image(10 + i))
        rows.append(f"ILSVRC2012_val_{i:08},{CLASSES[2 - i % 2]} 85 1 499 272")
    write(tmp_path / "in" / "LOC_val_solution.csv", "\n".join(rows).encode())
    found = find_images(tmp_path / "in", "val")
    # Only two classes, but numbered as in train.
    assert [file.label for file in found.files] == [2, 1, 2, 1]
    result = main([str(tmp_path / "in"), str(tmp_path / "out"), "--split", "val", "--workers", "1"])
    assert (result.images, result.classes) == (4, 3)


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        (["a.jpg cat", "b.jpg ant"], [1, 0]),
        (["b 7", "a 3"], [3, 7]),
        (["val/a.jpg 0", "val/b.jpg 1"], [0, 1]),
    ],
)
def test_reads_text_labels(tmp_path: Path, lines: list[str], want: list[int]):
    for name in ("a", "b"):
        write(tmp_path / "val" / f"{name}.jpg", encoded_image(0))
    write(tmp_path / "val_labels.txt", "\n".join(lines).encode())
    assert [file.label for file in find_images(tmp_path, "val").files] == want
    assert [file.label for file in find_images(tmp_path, "val", labels="none").files] == [None, None]


def test_devkit_ground_truth_is_refused(tmp_path: Path):
    for i in range(2):
        write(tmp_path / "val" / f"ILSVRC2012_val_{i + 1:08}.JPEG", encoded_image(i))
    devkit = write(tmp_path / "ILSVRC2012_validation_ground_truth.txt", b"490\n361\n")
    with pytest.raises(InputError, match=r"'filename label', or it is Kaggle's LOC_val_solution\.csv .*devkit"):
        find_images(tmp_path, "val", labels=devkit)


@pytest.mark.parametrize(
    ("folders", "numbers", "want"),
    [
        (("cat", "dog"), "01", [0, 1]),
        (("cat", "dog"), "12", "has the label 2; the train folder's classes are 0 to 1"),
        # Class names that are numbers: in the order of the train folder's names.
        (("1", "2", "10"), ("10", "2"), [1, 2]),
    ],
)
def test_numbers_agree_with_the_train_folder(tmp_path: Path, folders: tuple, numbers: str, want: list[int] | str):
    for name in folders:
        write(tmp_path / "train" / name / "a.jpg", encoded_image(0))
    for i, number in enumerate(numbers):
        write(tmp_path / "val" / f"{i}.jpg", encoded_image(i))
        with (tmp_path / "val.txt").open("a") as file:
            file.write(f"{i}.jpg {number}\n")
    if isinstance(want, str):
        with pytest.raises(InputError, match=want):
            find_images(tmp_path, "val")
    else:
        assert [file.label for file in find_images(tmp_path, "val").files] == want


def test_converts_any_folder(tmp_path: Path):
    for i, name in enumerate(("x/1.jpg", "x/deep/2.png", "y/3.webp")):
        path = write(tmp_path / "classes" / name, b"")
        Image.open(io.BytesIO(encoded_image(i))).save(path)
        write(tmp_path / "flat" / path.name, path.read_bytes())
    write(tmp_path / "flat" / "notes.txt", b"")
    assert [file.label for file in find_images(tmp_path / "classes").files] == [0, 0, 1]
    assert find_images(tmp_path / "classes").classes == ["x", "y"]
    result = main([str(tmp_path / "flat"), str(tmp_path / "out"), "--workers", "1"])
    assert (result.images, result.classes, result.ignored) == (3, None, {".txt": 1})
    assert result.converted == {"PNG": 1, "WEBP": 1}
    assert all(sample.keys() == {"image"} for sample in samples(tmp_path / "out"))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], [], "no images"),
        (["notes.txt"], [], "no images"),
        (["val/a/1.jpg"], [], "no split 'train'; there is: val"),
        (["train/a/1.jpg"], ["--split", "val"], "no split 'val'"),
        (["a/1.jpg", "2.jpg"], [], "2.jpg: lies next to class folders"),
        (["a/1.jpg", "b/notes.txt"], [], "b: a class folder without images"),
        (["train/a/1.jpg", "val/b/1.jpg"], ["--split", "val"], "no class 'b'"),
        (["1.jpg"], ["--labels", "nowhere.txt"], "no such labels file"),
        (["1.jpg", "labels.txt"], [], "not a labels file|no label for 1.jpg"),
        (["1.jpg"], ["--quality", "0"], "--quality"),
        (["1.jpg"], ["--resize", "0"], "--resize"),
        (["1.jpg"], ["--workers", "0"], "--workers"),
        (["1.jpg"], ["--seed", "-1"], "--seed"),
    ],
)
def test_ambiguous_input_is_refused(tmp_path: Path, files: list[str], options: list[str], message: str):
    (tmp_path / "in").mkdir()
    for name in files:
        write(tmp_path / "in" / name, encoded_image(0) if name.endswith("jpg") else b"other.jpg 1")
    with pytest.raises(InputError, match=message):
        main([str(tmp_path / "in"), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_labels_for_missing_images_are_refused(tmp_path: Path):
    write(tmp_path / "a.jpg", encoded_image(0))
    write(tmp_path / "labels.txt", b"a.jpg 0\nb.jpg 1")
    with pytest.raises(InputError, match="1 of its images are not in the folder, the first is b"):
        find_images(tmp_path)


def test_a_missing_source_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["convert_images.py", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        command_line.run(main)
    assert capfd.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such folder\n"


def test_an_unwritable_out_is_refused(source: Path, tmp_path: Path):
    write(tmp_path / "file", b"")
    with pytest.raises(InputError, match="cannot be written"):
        main([str(source), str(tmp_path / "file" / "out")])
    write(tmp_path / "full" / "thesis.tex", b"mine")
    with pytest.raises(InputError, match="is not empty"):
        main([str(source), str(tmp_path / "full")])
    assert tree(tmp_path / "full") == {"thesis.tex": b"mine"}
    with pytest.raises(InputError, match="lies in the folder of the images"):
        main([str(source), str(source / "train" / "out")])
    with pytest.raises(InputError, match=r"cannot be written .*provider prefix"):
        main([str(source), "ftp://host/folder"])


def test_a_finished_data_set_is_not_overwritten(source: Path, tmp_path: Path):
    main([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match="has a finished data set"):
        main([str(source), str(tmp_path / "out"), "--seed", "1"])
    assert tree(tmp_path / "out") == before


def colors(size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.open(io.BytesIO(encoded_image(3, size=64))).resize(size)


# An entry that points past the end, a truncated list, and no list.
BROKEN_EXIF = (
    b"II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\0\0\0\xf0\0\0\0\0\0\0\0",
    b"II*\0\x08\0\0\0\x05\0\x12\x01",
    b"garbage",
)


ODD_FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: saved(colors(), "PNG"),
    "CMYK": lambda: saved(colors().convert("CMYK")),
    "grayscale": lambda: saved(colors().convert("L")),
    "broken EXIF": lambda: saved(colors(), exif=b"Exif\0\0" + BROKEN_EXIF[0]),
    "GIF": lambda: saved(colors(), "GIF"),
}


def test_odd_files_become_rgb_jpegs(tmp_path: Path):
    for i, (kind, make) in enumerate(ODD_FILES.items()):
        for copy in range(i + 1):
            write(tmp_path / "in" / f"{kind}{copy}.JPEG", make())
    plain = write(tmp_path / "in" / "plain.JPEG", saved(colors(), exif=exif_with_orientation(), comment=b"kept"))
    result = main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    assert result.converted == {kind: i + 1 for i, kind in enumerate(ODD_FILES)}
    found = images(tmp_path / "out")
    assert plain.read_bytes() in found
    for encoded in found:
        image = Image.open(io.BytesIO(encoded))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (60, 40))
        image.load()
        image.getexif()


def exif_with_orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("kind", ["PNG", "CMYK", "broken EXIF"])
def test_odd_files_keep_their_picture(kind: str):
    converted, found = as_rgb_jpeg(ODD_FILES[kind](), "odd", None, quality=95)
    assert found == kind
    difference = np.asarray(Image.open(io.BytesIO(converted))).astype(int) - np.asarray(colors())
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_broken_exif_is_dropped(exif: bytes):
    converted, kind = as_rgb_jpeg(saved(colors(), exif=b"Exif\0\0" + exif), "odd", None, quality=95)
    assert kind == "broken EXIF"
    assert "exif" not in Image.open(io.BytesIO(converted)).info


def test_sixteen_bit_png_is_not_clipped():
    gray = np.full((20, 20), 100 << 8, np.uint16)
    converted, kind = as_rgb_jpeg(saved(Image.fromarray(gray), "PNG"), "gray", None, quality=90)
    assert kind == "PNG"
    assert abs(int(np.asarray(Image.open(io.BytesIO(converted))).mean()) - 100) <= 1


def test_resizes_the_short_side(tmp_path: Path):
    write(tmp_path / "in" / "wide.jpg", saved(colors((300, 200))))
    write(tmp_path / "in" / "tall.jpg", saved(colors((101, 333))))
    small = write(tmp_path / "in" / "small.jpg", saved(colors((50, 40))))
    for quality in ("90", "30"):
        main([str(tmp_path / "in"), str(tmp_path / quality), "--resize", "64", "--quality", quality, "--workers", "1"])
    found = images(tmp_path / "90")
    assert sorted(Image.open(io.BytesIO(encoded)).size for encoded in found) == [(50, 40), (64, 211), (96, 64)]
    assert small.read_bytes() in found  # never enlarged
    assert sum(map(len, images(tmp_path / "30"))) < sum(map(len, found))


def test_orientation_is_ignored_everywhere():
    picture = colors((60, 40))
    stored = saved(picture, quality=95, exif=exif_with_orientation())
    assert as_rgb_jpeg(stored, "kept", None, quality=95) == (stored, None)
    grayscale = saved(picture.convert("L"), quality=95, exif=exif_with_orientation())
    for encoded, resize in ((stored, 20), (grayscale, None), (grayscale, 20)):
        found = Image.open(io.BytesIO(as_rgb_jpeg(encoded, "anew", resize, quality=95)[0]))
        # Neither rotated nor tagged: as a reader of the original bytes sees it.
        assert found.size == ((30, 20) if resize else (60, 40))
        assert not found.getexif()
        want = decode_rgb(encoded, "kept").resize(found.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(want)).mean() < 4


def with_unreadable(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    whole = encoded_image(1, size=48)
    write(folder / "train" / CLASSES[0] / "cut.JPEG", whole[: len(whole) // 2])
    write(folder / "train" / CLASSES[1] / "empty.JPEG", b"")
    return folder


def test_an_unreadable_image_stops_the_conversion(source: Path, tmp_path: Path):
    damaged = with_unreadable(source, tmp_path / "in")
    with pytest.raises(InputError, match=r"/train/n014\d+/(cut|empty)\.JPEG: cannot be read .*--skip-unreadable"):
        main([str(damaged), str(tmp_path / "out"), *SMALL_SHARDS])
    assert not list(tmp_path.rglob("index.json"))


def test_skips_unreadable_images_on_request(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = with_unreadable(source, tmp_path / "in")
    result = main([str(damaged), str(tmp_path / "out"), *SMALL_SHARDS, "--skip-unreadable"])
    assert sorted(line.split(":")[0] for line in result.skipped) == [
        f"{CLASSES[0]}/cut.JPEG",
        f"{CLASSES[1]}/empty.JPEG",
    ]
    assert images(tmp_path / "out") == originals(source)
    assert "cut.JPEG" in capsys.readouterr().out


def test_a_folder_without_readable_images_is_refused(tmp_path: Path):
    write(tmp_path / "in" / "a.jpg", b"not an image")
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1", "--skip-unreadable"])
    assert not (tmp_path / "out" / "index.json").exists()


def run_and_kill(arguments: list[str], out: Path, num_shards: int) -> None:
    """Run a conversion in a forked process, and end it by SIGKILL some milliseconds after it has written shards."""
    process = forked(arguments)
    wait_until(lambda: len(list(out.glob("shard.*.mds"))) >= num_shards)
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    process.join()


def test_resumes_to_the_same_bytes_after_kills(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main([str(source), str(tmp_path / "whole"), *SMALL_SHARDS])
    # Slow enough for a kill to hit something; forked processes keep the patch.
    convert = conversion.as_rgb_jpeg
    monkeypatch.setattr(conversion, "as_rgb_jpeg", lambda *a: time.sleep(0.01) or convert(*a))
    for num_shards in (0, 1, 4, 8):
        out = tmp_path / f"killed{num_shards}"
        run_and_kill([str(source), str(out), *SMALL_SHARDS], out, num_shards)
        # Not rglob: the killed run's workers end a moment later, and delete their files meanwhile.
        assert not [folder for folder, _, files in os.walk(out) if "index.json" in files]
        main([str(source), str(out), *SMALL_SHARDS])
        assert tree(out) == tree(tmp_path / "whole")


def test_a_killed_worker_ends_the_conversion(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def die(*_: object) -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(conversion, "as_rgb_jpeg", die)
    process = forked([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    assert process.exitcode == 1


def test_resumes_without_writing_finished_shards_again(source: Path, tmp_path: Path):
    damaged = with_unreadable(source, tmp_path / "in")
    with pytest.raises(InputError):
        main([str(damaged), str(tmp_path / "out"), "--shard-size", "10kb", "--workers", "1"])
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard.*.mds")}
    result = main([str(damaged), str(tmp_path / "out"), *SMALL_SHARDS, "--skip-unreadable"])
    assert 0 < result.resumed == len(done)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done


def test_other_settings_start_over(source: Path, tmp_path: Path):
    damaged = with_unreadable(source, tmp_path / "in")
    for seed in ("0", "1"):
        with pytest.raises(InputError):
            main([str(damaged), str(tmp_path / "out"), "--shard-size", "4kb", "--workers", "1", "--seed", seed])
    main([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    main([str(source), str(tmp_path / "clean"), *SMALL_SHARDS])
    # In a folder, shards of other settings are deleted.
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_verification_finds_a_damaged_shard(source: Path, tmp_path: Path, damage: str):
    damaged = with_unreadable(source, tmp_path / "in")
    with pytest.raises(InputError):
        main([str(damaged), str(tmp_path / "out"), "--shard-size", "10kb", "--workers", "1"])
    shard = min((tmp_path / "out").glob("shard.*.mds"))
    if damage == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content if damage == "flip" else content[:-1])
    again = [str(damaged), str(tmp_path / "out"), *SMALL_SHARDS, "--skip-unreadable"]
    with pytest.raises(RuntimeError, match=rf"1 of \d+ shards differ from what was written.*{shard.name}"):
        main(again)
    assert not (tmp_path / "out" / "index.json").exists()
    main(again)
    assert images(tmp_path / "out") == originals(source)


def test_two_conversions_at_once_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "LOCK_TIMEOUT", 0.1)
    with sole_user(Destination.at(str(tmp_path / "out")).lock), pytest.raises(InputError, match="another conversion"):
        main([str(source), str(tmp_path / "out")])


def test_writes_to_an_object_store(source: Path, tmp_path: Path, object_store: GatedStore, bucket: str):
    remote = f"s3://{bucket}/imagenet/train"
    main([str(source), str(tmp_path / "local"), *REMOTE_SHARDS])
    result = main([str(source), remote, *REMOTE_SHARDS])
    assert result.images == NUM_IMAGES
    # The same data set as on disk, and no copy of it here.
    assert object_store.objects(bucket, "imagenet/train/") == tree(tmp_path / "local")
    assert not [path for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock"]
    dataset = StreamingDataset(local=str(tmp_path / "cache"), remote=remote, batch_size=4, shuffle=False)
    assert sorted(sample["image"] for sample in dataset) == originals(source)
    with pytest.raises(InputError, match="has a finished data set"):
        main([str(source), remote, *REMOTE_SHARDS])


def test_an_object_store_resumes_after_a_kill_and_replaces_a_corrupt_shard(
    source: Path, tmp_path: Path, object_store: GatedStore, bucket: str
):
    arguments = [str(source), f"s3://{bucket}/train", *REMOTE_SHARDS]
    killed = forked(arguments)
    first = wait_for(lambda: [path.stem for path in cache_folder().rglob("records/*.json")])[0]
    killed.kill()
    killed.join()
    name = f"shard.{int(first):05}.mds"
    stored = object_store.objects(bucket, "train/")
    assert name in stored
    assert "index.json" not in stored
    client = object_store.client()
    client.put_object(Bucket=bucket, Key=f"train/{name}", Body=stored[name][:-1] + bytes([stored[name][-1] ^ 1]))
    with pytest.raises(RuntimeError, match=f"{name}: its content has changed"):
        main(arguments)
    assert "index.json" not in object_store.objects(bucket, "train/")
    main(arguments)
    for key, content in object_store.objects(bucket, "train/").items():
        write(tmp_path / "copy" / key, content)
    assert images(tmp_path / "copy") == originals(source)


def test_old_shards_in_an_object_store_are_listed(
    source: Path, tmp_path: Path, object_store: GatedStore, bucket: str, capsys: pytest.CaptureFixture[str]
):
    remote = f"s3://{bucket}/deep/train"
    with pytest.raises(InputError):
        main([str(with_unreadable(source, tmp_path / "in")), remote, "--shard-size", "20kb", "--workers", "1"])
    earlier = {name for name in object_store.objects(bucket, "deep/train/") if name.startswith("shard.")}
    client = object_store.client()
    client.put_object(Bucket=bucket, Key="deep/train/shard.00077.mds", Body=b"of a conversion on another machine")
    client.put_object(Bucket=bucket, Key="deep/train-2/shard.00099.mds", Body=b"of another data set")
    result = main([str(source), remote, "--workers", "1"])
    assert result.shards == 1
    assert result.leftover is not None
    assert result.leftover == sorted((earlier | {"shard.00077.mds"}) - {"shard.00000.mds"})
    assert f"in no index, delete them by hand: {len(result.leftover)} shards" in capsys.readouterr().out
    assert result.leftover[0] in object_store.objects(bucket, "deep/train/")  # named, not removed


@pytest.mark.slow
def test_an_object_store_that_cannot_be_listed_is_written(source: Path, bucket: str, monkeypatch: pytest.MonkeyPatch):
    def denied(*_: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(S3Uploader, "list_objects", denied)
    result = main([str(source), f"s3://{bucket}/train", "--workers", "1"])
    assert (result.images, result.leftover) == (NUM_IMAGES, None)


def wait_for(condition: Callable[[], list[str]], timeout: float = 30) -> list[str]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if found := condition():
                return found
        time.sleep(0.005)
    raise TimeoutError


def test_an_object_store_without_bucket_or_access_is_refused(
    source: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="cannot be written"):
        main([str(source), "s3://no-such-bucket/train"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match="cannot be written"):
        main([str(source), f"s3://{bucket}/train"])

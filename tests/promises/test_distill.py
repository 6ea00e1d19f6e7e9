"""Promises 4, 5, 7 to 10, 12, 18 and 20 for d2v distill: one command from a folder to a student, whatever happens."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from streaming import MDSWriter, StreamingDataset

from d2v_composer import load_student
from gated_store import GatedStore
from helpers import (
    D2V,
    GOLDEN,
    ROOT,
    TRACED,
    assert_same_student,
    contents_of,
    d2v,
    encoded_clip,
    encoded_image,
    failure,
    log_of,
    run_ranks,
    start_python,
    succeed,
    truncated,
    wait_until,
    write_files,
    write_images,
)
from programs.preloaded import Program

NUM_IMAGES, NUM_HELD_OUT = 200, 20
TEACHER = GOLDEN / "tiny_base.pt"
SHORT = ("max_duration=4ba", "global_train_batch_size=16", "precision=fp32", "save_interval=2ba")
SHORT += ("train_loader.num_workers=0", "callbacks={}", "report=false")
# For what concerns the samples alone.
SHORTEST = (*SHORT, "max_duration=1ba", "student.depth=1", "alignment.max_samples=0")
SHORTEST += ("retrieval.at_start=false", "retrieval.baselines=[]")


def command(source: Path | str, out: Path | str, *changes: str, teacher: Path | str = TEACHER) -> list[str]:
    return ["distill", str(source), "--teacher", str(teacher), "--out", str(out), *changes]


def distill(*arguments: Any, changes: tuple[str, ...] = SHORT, **options: Any) -> str:
    """Run the command, which must succeed, and return its output."""
    ended = succeed(*command(*arguments, *changes, **options))
    return ended.stdout


def refused(*arguments: Any, status: int = 2, cwd: Path = ROOT, **options: Any) -> str:
    """Run the command, which must fail, and return its only line."""
    ended = d2v(*command(*arguments, **options), cwd=cwd)
    assert ended.stderr.count("\n") == 1, ended.stderr
    return failure(ended, status)


def samples_of(folder: Path, column: str = "image") -> list[bytes]:
    """Return the samples of a data set, as Streaming reads them."""
    return [sample[column] for sample in StreamingDataset(local=str(folder), batch_size=1, shuffle=False)]


def held_out_and_trained_on(out: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the images of both data sets in OUT."""
    return samples_of(out / "images" / "test"), samples_of(out / "images" / "train")


def held_out_first(names: list[str]) -> list[str]:
    """Sort names of files in the order in which they are held out."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images in three folders, of which one has a split's name; read-only."""
    names = [f"{('cats', 'dogs', 'train')[i % 3]}/{i}.jpg" for i in range(NUM_IMAGES)]
    return write_images(tmp_path_factory.mktemp("photos"), names)


@pytest.fixture(scope="module")
def distilled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed call; read-only."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    said = distill(photos, out)
    [settings] = re.findall("settings for 200 images: (.*)", said)
    assert "optimizer.lr=0.016" in settings  # 0.768 / 48 channels
    for setting in ("max_duration=4ba", "callbacks={}", "loggers={jsonl: {}}"):
        assert f"{setting}, " in settings
    assert "other files: none" in said
    assert " embed " in said.splitlines()[-1]
    return out


@pytest.fixture
def copied(distilled: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed call's folder."""
    return shutil.copytree(distilled, tmp_path / "copied", symlinks=True)


def test_a_folder_becomes_a_student(distilled: Path, photos: Path) -> None:
    """Promises 4, 8 and 9: the student is measured on a tenth of the images, which is not trained on in any form."""
    assert load_student(distilled / "student.safetensors").config.depth == 5
    settings = yaml.safe_load((distilled / "distill.yaml").read_text())
    assert settings["max_duration"] == "4ba"
    assert settings["scheduler"] == {"name": "cosine_with_warmup", "t_warmup": "0.1dur", "alpha_f": 0.0}
    measured = log_of(distilled)
    for key in ("agreement@10", "instance/top1", "teacher/instance/top1", "pixels/agreement@10"):
        assert set(measured[f"metrics/held_out/{key}"]) >= {0}
    held, trained = held_out_and_trained_on(distilled)
    assert len(held) == NUM_HELD_OUT
    assert {*held, *trained} == {path.read_bytes() for path in photos.rglob("*.jpg")}
    assert len(held + trained) == NUM_IMAGES
    loader = yaml.safe_load((distilled / "run.yaml").read_text())["config"]["train_loader"]
    assert (loader["local"], loader["remote"]) == (str(distilled / "images" / "train"), None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("distill.json", "[]"),
        ("distill.json", "[1,"),
        ("distill.yaml", "config: null\n"),
    ],
)
def test_a_damaged_file_of_ours_is_named(file: str, content: str, photos: Path, copied: Path) -> None:
    """Promise 18: the message has the file's path."""
    (copied / file).write_text(content)
    line = failure(d2v(*command(photos, copied, *SHORT)), 2)
    assert str(copied / file) in line
    assert "damaged" in line or "cannot be read" in line


# A file that exists in OUT, or when traced.py kills or hangs the program.
MOMENTS = {
    "shard": {"HANG": "streaming MDSWriter flush_shard"},
    "training samples": "images/train/index.json",
    "checkpoint": {"AT": "batch_start 3 kill"},
    "export": {"HANG": "jinja2 Template render"},
}


@contextmanager
def started(moment: str, photos: Path, out: Path) -> Iterator[Program]:
    """Start the command, and wait until a moment."""
    when = MOMENTS[moment]
    arguments = [ROOT / "d2v_composer" / "commands" / "__main__.py", *command(photos, out, *SHORT)]
    program = start_python(TRACED, *arguments, environment=when if isinstance(when, dict) else {})

    def has_come() -> bool:
        return "hangs" in program.stdout if isinstance(when, dict) else (out / when).exists()

    try:
        wait_until(lambda: has_come() or program.poll() is not None, seconds=60)
        yield program
    finally:
        program.kill()


def test_the_same_command_goes_on_after_kills(distilled: Path, photos: Path, tmp_path: Path) -> None:
    """The last call ends with the tensors of an undisturbed one."""
    out = tmp_path / "run"
    for moment in ("shard", "checkpoint", "export"):
        with started(moment, photos, out) as program:
            program.kill()
            assert program.wait(20) == -signal.SIGKILL, program.stderr
    distill(photos, out)
    assert_same_student(out, distilled)
    ours, expected = (load_student(folder / "student.safetensors").state_dict() for folder in (out, distilled))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    differing = contents_of(distilled).keys() ^ contents_of(out).keys()
    assert [name for name in differing if not re.search(r"partial$|^report|\.converting", name)] == []


@pytest.mark.slow  # a lock is waited for: ten seconds
def test_a_second_call_in_the_same_folder_is_refused(distilled: Path, photos: Path, tmp_path: Path) -> None:
    """The line names the first one."""
    out = tmp_path / "run"
    with started("shard", photos, out) as program:
        line = refused(photos, out, *SHORT)
        assert f"process {program.pid} on" in line
        assert "--out" in line
        assert program.poll() is None
    distill(photos, out)
    assert_same_student(out, distilled)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Photos, eleven of which cannot be read, beside foreign, hidden and special files and links.

    ``more/copy.jpg`` is a copy of a photo that will be held out.
    """
    names = [f"{i}.jpg" for i in range(NUM_IMAGES)]
    first, second, *rest = held_out_first(names)
    folder = write_images(tmp_path / "photos", names)
    for i, name in enumerate((second, *rest[-9:])):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes((truncated(content), b"", b"\x89PNG")[i % 3])
    copy = (folder / first).read_bytes()
    write_files(folder, {"notes.TXT": b"", ".hidden.jpg": b"", "more/copy.jpg": copy})
    write_images(folder, [f"{i}.heic" for i in range(8)])
    for i in range(8):
        (folder / f"link{i}.jpg").symlink_to(f"{i}.jpg")
    (folder / "hard.jpg").hardlink_to(folder / "9.jpg")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "more" / "socket.png"))
    (folder / "more" / "self").symlink_to("..")
    (folder / "more" / "dangling.jpg").symlink_to("nowhere.jpg")
    return folder


OTHER_FILES = ["1 .txt", "1 hidden", "10 links to files or folders already listed", "2 special files"]
OTHER_FILES += ["8 .heic (needs pillow-heif)"]


def counts_in(said: str) -> dict[str, str]:
    """Return the printed counts, by what they count."""
    return dict(re.findall(r"^(.+): (.*)$", said, re.MULTILINE))


def test_what_is_left_out_is_counted(mixed: Path, tmp_path: Path) -> None:
    """Promises 8 and 9: every name is in one of the printed counts."""
    out = tmp_path / "run"
    counts = counts_in(output := distill(mixed, out, changes=SHORTEST))
    assert sorted(counts["other files"].split(", ")) == OTHER_FILES
    assert "\ncopies of held-out images, also held out: 1\n" in output
    skipped = []
    for split in ("test", "train"):
        summary = json.loads((out / "images" / split / "conversion.json").read_bytes())
        assert counts[str(out / "images" / split)] == f"{summary['images']} images"
        skipped += summary["skipped"]
    held, trained = held_out_and_trained_on(out)
    assert not {*held} & {*trained}
    assert (mixed / "more" / "copy.jpg").read_bytes() in held
    assert len(skipped) == 11  # the dangling link too
    assert not [line for line in skipped if f"  {line}\n" not in output]
    unreadable_and_held_out = held_out_first([f"{i}.jpg" for i in range(NUM_IMAGES)])[1]
    assert any(unreadable_and_held_out in line for line in skipped)
    num_left_out = sum(int(entry.split()[0]) for entry in OTHER_FILES)
    names = [path for path in mixed.rglob("*") if path != mixed / "more"]
    assert len(held + trained) + len(skipped) + num_left_out == len(names)


@pytest.fixture
def project(photos: Path, small_data: Path, tmp_path: Path) -> Path:
    """A user's folders, with names that are ours too; and a run of another command."""
    files = {"clips/train/index.json": b"mine", "copied/distill.yaml": b"", "copied/distill.json": b"{}"}
    folder = write_files(tmp_path / "project", {**files, "run/.in_use": b"", "run/run.yaml": b""})
    shutil.copytree(photos, folder / "images" / "source")
    (folder / "images" / "source" / "empty").mkdir()
    for link, target in {"link": "clips", "into": "images/source/empty", "gone": "nowhere"}.items():
        (folder / link).symlink_to(target)
    return folder


def test_what_is_not_ours_stays(project: Path, photos: Path) -> None:
    """Promises 7 and 11: OUT belongs to the user, is a link of his, is inside the source or equal to it, or
    is another run's.
    """
    before = contents_of(project)
    for source, out, named in (
        (photos, ".", "project"),
        ("images/source", "images", "images"),
        ("images/source", "images/source", "source"),
        ("images/source", "images/source/run", "run"),
        ("images/source", "into", "into"),
        (photos, "link", "link"),
        (photos, "gone", "gone"),
        (photos, "clips/train/index.json", "index.json"),
        (photos, "copied", "copied"),
        (photos, "run", "run"),
        (photos, "new[1]", "new[1]"),
        (photos, "s3://bucket/run", "bucket/run"),
    ):
        assert named in refused(source, out, cwd=project), (source, out)
    assert contents_of(project) == before
    assert not (project / "new[1]").exists()


def test_a_refused_change_changes_nothing(copied: Path, distilled: Path, photos: Path, tmp_path: Path) -> None:
    """The original command works next."""
    before = contents_of(copied)
    for changes, named in (
        (["student.depth=3"], ["student.depth"]),
        (["seed=1", "optimizer.lr=0.1"], ["seed", "optimizer.lr"]),
        (["optimiser.lr=1"], ["optimiser"]),
        (["max_duration=2ba", "retrieval.ks=[1,5]"], ["max_duration", "retrieval.ks"]),
    ):
        line = refused(photos, copied, *SHORT, *changes)
        assert [name for name in named if name not in line] == [], line
        assert "save_folder" not in line
    other, teacher = shutil.copytree(photos, tmp_path / "other"), shutil.copy(TEACHER, tmp_path / "teacher.pt")
    assert str(other) in refused(other, copied)
    assert str(teacher) in refused(photos, copied, teacher=teacher)
    assert contents_of(copied) == before
    assert "complete at 4ba" in distill(photos, copied)
    assert_same_student(copied, distilled)


def test_bad_input_is_one_line(photos: Path, tmp_path: Path) -> None:
    """Promise 18: the line comes before anything is written."""
    few, out = write_images(tmp_path / "few", ["0.jpg"]), tmp_path / "run"
    none = write_files(tmp_path / "none", {f"{i}.heic": b"" for i in range(3)})
    for source, to, teacher, changes, named in (
        (tmp_path / "missing", out, TEACHER, [], "missing"),
        (few, out, TEACHER, [], "few"),
        (none, out, TEACHER, [], "3 .heic"),
        (photos, out, "none.pt", [], "none.pt"),
        (photos, out, "timm/vit", [], "timm/vit"),
        (photos, out, TEACHER, ["run_name=here"], "run_name"),
        (photos, out, TEACHER, ["callbacks.health={interval: no}"], "callbacks.health"),
        (photos, "/proc/run", TEACHER, [], "/proc/run"),
    ):
        assert named in refused(source, to, *changes, teacher=teacher)
    assert not out.exists()


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as a data set of several shards; read-only."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit=1 << 15, hashes=["xxh64"]) as writer:
        for path in sorted(photos.rglob("*.jpg")):
            writer.write({"image": path.read_bytes()})
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 clips of less than half a second, and a picture; one that is held out has 61 seconds."""
    names = held_out_first([f"{i}.flac" for i in range(200)])
    clips = {name: encoded_clip(i, 61 * 16_000 if i == 0 else 1000 + 30 * i) for i, name in enumerate(names)}
    return write_files(tmp_path_factory.mktemp("sounds"), clips | {"cover.jpg": encoded_image(0)})


def lengths_of(out: Path) -> dict[str, list[int]]:
    summaries = {split: out / "clips" / split / "conversion.json" for split in ("test", "train")}
    return {split: json.loads(path.read_bytes())["lengths"] for split, path in summaries.items()}


def test_a_folder_of_sound_becomes_a_student(sounds: Path, tmp_path: Path) -> None:
    """The teacher says that the samples are sound; the held-out clips are cut as training cuts them."""
    out = tmp_path / "run"
    changes = (*SHORT, "train_loader.crop_seconds=0.2", "student.depth=2")
    line = refused(sounds, out, *SHORT, "alignment.pooling=cls", teacher=GOLDEN / "audio_base.pt")
    assert "alignment: representation and pooling: this model has no output_cls; " in line
    assert not out.exists()
    said = distill(sounds, out, changes=changes, teacher=GOLDEN / "audio_base.pt")
    assert "settings for 200 clips: " in said
    assert "other files: 1 .jpg" in said
    assert load_student(out / "student.safetensors").config.depth == 2
    assert set(log_of(out)["metrics/held_out/log_mel/agreement@10"]) >= {0}
    lengths = lengths_of(out)
    assert (len(lengths["test"]), len(lengths["train"])) == (20, 180)
    assert max(lengths["test"]) == 3200
    assert max(lengths["train"]) > 6000
    assert not (out / "images").exists()


def test_a_data_set_in_a_store_leaves_no_shards_behind(
    shards: Path, photos: Path, object_store: GatedStore, tmp_path: Path
) -> None:
    """5 to 7, 10: a kill comes while shards are fetched; the same command goes on, and leaves none of them in OUT."""
    out, environment = tmp_path / "run", object_store.environment
    object_store.create_bucket_of_images("distill", shards)
    arguments = command("s3://distill/images", out, *SHORTEST)
    program = start_python(*D2V, *arguments, environment=environment)
    wait_until(lambda: any(out.glob(".in_use.fetched/*.mds")), seconds=60)
    program.kill()
    succeed(*arguments, environment=environment)
    assert {path.name for path in (out / "images").iterdir()} == {"held_out.json", "test", "train"}
    assert not (out / ".in_use.fetched").exists()
    held, trained = held_out_and_trained_on(out)
    assert sorted(held + trained) == sorted(path.read_bytes() for path in photos.rglob("*.jpg"))


@pytest.mark.slow
def test_ranks_share_what_the_first_process_prepared(photos: Path, tmp_path: Path) -> None:
    """Promise 10: ranks start together as on several GPUs, and once more with changed settings."""
    out = tmp_path / "run"
    with started("training samples", photos, out):
        pass
    run_ranks(*D2V, *command(photos, out, *SHORT))
    (out / "student.safetensors").unlink()
    run_ranks(*D2V, *command(photos, out, *SHORT, "save_num_checkpoints_to_keep=1"))
    load_student(out / "student.safetensors")
    assert yaml.safe_load((out / "distill.yaml").read_text())["save_num_checkpoints_to_keep"] == 1

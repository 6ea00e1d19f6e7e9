"""d2v distill: from a folder to a student, by one command that goes on after a kill; bad folders are one line."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader

from d2v_composer import load_student
from d2v_composer.commands import distill
from d2v_composer.data.convert import SampleSource, hold_out
from d2v_composer.data.images import Images
from d2v_composer.data.modality import list_files
from d2v_composer.models.sizes import Data2Vec2Config
from d2v_composer.system.errors import InputError
from helpers import (
    D2V,
    GOLDEN,
    assert_same_student,
    d2v,
    encoded_clip,
    encoded_image,
    has_trained,
    log_of,
    run_ranks,
    start_python,
    wait_until,
)

NUM_IMAGES = 200
TEACHER = GOLDEN / "tiny_base.pt"
SHORT = (
    "max_duration=4ba",
    "global_train_batch_size=16",
    "precision=fp32",
    "save_interval=2ba",
    "train_loader.num_workers=0",
    "callbacks={}",
    "report=false",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images in three folders, of which one has a split's name, and a file that is none; read-only."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(NUM_IMAGES):
        subfolder = folder / ("cats", "dogs", "train")[i % 3]
        subfolder.mkdir(exist_ok=True)
        (subfolder / f"{i}.jpg").write_bytes(encoded_image(i))
    (folder / "notes.txt").write_text("not an image")
    return folder


def command(source: Path | str, out: Path, *changes: str, teacher: Path | str = TEACHER) -> list[str]:
    return ["distill", str(source), "--teacher", str(teacher), "--out", str(out), *changes]


def images_of(folder: Path) -> set[bytes]:
    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    return {sample["image"] for shard in shards for sample in MDSReader.from_json(str(folder), None, shard)}


@pytest.fixture(scope="module")
def distilled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed call; read-only."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    ended = d2v(*command(photos, out, *SHORT))
    assert ended.returncode == 0, ended.stderr
    assert "optimizer.lr=0.016" in ended.stdout  # 0.768 / 48 channels
    assert " embed " in ended.stdout.splitlines()[-1]
    return out


def test_a_folder_becomes_a_student(distilled: Path) -> None:
    assert load_student(distilled / "student.safetensors").config.depth == 5
    settings = yaml.safe_load((distilled / "distill.yaml").read_text())
    assert settings["max_duration"] == "4ba"
    assert settings["scheduler"] == {"t_warmup": "0.1dur", "alpha_f": 0.0}
    measured = log_of(distilled)
    for key in ("agreement@10", "instance/top1", "teacher/instance/top1", "pixels/agreement@10"):
        assert set(measured[f"metrics/held_out/{key}"]) >= {0}


def test_a_tenth_is_never_trained_on(distilled: Path, photos: Path) -> None:
    """A run reads train_loader.local alone."""
    every = {path.read_bytes() for path in photos.rglob("*.jpg")}
    held, trained = (images_of(distilled / "images" / split) for split in ("test", "train"))
    assert len(held) == NUM_IMAGES // 10
    assert held | trained == every
    assert not held & trained
    loader = yaml.safe_load((distilled / "run.yaml").read_text())["config"]["train_loader"]
    assert (loader["local"], loader["remote"]) == (str(distilled / "images" / "train"), None)


def test_the_choice_of_the_tenth_survives_other_images(photos: Path, tmp_path: Path) -> None:
    source, record = SampleSource(photos, list_files(photos, Images)[0], None, {}), tmp_path / "held_out.json"
    whole = hold_out(source, record)
    fewer = source._replace(files=source.files[::2])
    expected = {split: [each for each in part.files if each in fewer.files] for split, part in whole.items()}
    assert {split: part.files for split, part in hold_out(fewer, record).items()} == expected
    again = hold_out(fewer, tmp_path / "another.json")
    assert {split: part.files for split, part in again.items()} != expected


def test_a_data_set_of_any_column_and_mode_is_converted(tmp_path: Path) -> None:
    """Its labels, here texts, are not read."""
    source, out = tmp_path / "mds", tmp_path / "run"
    with MDSWriter(out=str(source), columns={"photo": "pil", "label": "str"}) as writer:
        for i in range(NUM_IMAGES):
            writer.write({"photo": Image.new("CMYK", (9, 40), (i, 5 * i % 256, 0, 0)), "label": "cat"})
    arguments = {"source": str(source), "column": "photo", "teacher": str(TEACHER), "out": out, "changes": []}
    for _ in range(2):  # again, with nothing left to do
        distill.prepare(Namespace(**arguments))
    assert len(images_of(out / "images" / "test") | images_of(out / "images" / "train")) == NUM_IMAGES


def test_a_folder_of_sound_becomes_a_student(tmp_path: Path) -> None:
    """The teacher says that the samples are sound; the held-out clips are cut as training cuts them."""
    folder, out = tmp_path / "sounds", tmp_path / "run"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.flac").write_bytes(encoded_clip(i, 1000 + 30 * i))
    (folder / "cover.jpg").write_bytes(encoded_image(0))
    changes = [*SHORT, "train_loader.crop_seconds=0.2", "student.depth=2"]
    with pytest.raises(InputError, match=f"^{folder}: expected at least 200 images, got 1$"):
        distill.main(command(folder, out)[1:])
    ended = d2v(*command(folder, out, *changes, teacher=GOLDEN / "audio_base.pt"))
    assert ended.returncode == 0, ended.stderr
    assert "chosen for 200 clips: " in ended.stdout
    assert load_student(out / "student.safetensors").config.depth == 2
    assert set(log_of(out)["metrics/held_out/log_mel/agreement@10"]) >= {0}
    lengths = {
        split: json.loads((out / "clips" / split / "conversion.json").read_bytes())["lengths"]
        for split in ("test", "train")
    }
    assert (len(lengths["test"]), len(lengths["train"])) == (20, 180)
    assert max(lengths["test"]) == 3200
    assert max(lengths["train"]) > 6000
    assert not (out / "images").exists()
    distill.prepare(
        Namespace(source=str(folder), column=None, teacher=str(GOLDEN / "audio_base.pt"), out=out, changes=[])
    )


def are_held_out_converted(out: Path) -> bool:
    return (out / "images" / "test" / "index.json").exists()


@pytest.mark.parametrize(
    "holds",
    [are_held_out_converted, *(pytest.param(each, marks=pytest.mark.slow) for each in (Path.exists, has_trained))],
)
def test_the_same_command_goes_on_after_a_kill(
    holds: Callable[[Path], Any], distilled: Path, photos: Path, tmp_path: Path
) -> None:
    program = start_python(*D2V, *command(photos, tmp_path / "run", *SHORT))
    wait_until(lambda: holds(tmp_path / "run") or program.poll() is not None, seconds=60)
    program.kill()
    ended = d2v(*command(photos, tmp_path / "run", *SHORT))
    assert ended.returncode == 0, ended.stderr
    assert_same_student(tmp_path / "run", distilled)
    ours, expected = (folder / "student.safetensors" for folder in (tmp_path / "run", distilled))
    torch.testing.assert_close(load_student(ours).state_dict(), load_student(expected).state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_ranks_share_what_the_first_process_prepared(photos: Path, tmp_path: Path) -> None:
    ended = d2v(*command(photos, tmp_path / "run", *SHORT))
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "run" / "student.safetensors").unlink()
    longer = command(photos, tmp_path / "run", *SHORT, "max_duration=6ba", "retrieval.ks=[1,5]")
    run_ranks(*D2V, *longer)
    assert (tmp_path / "run" / "latest-rank0.pt").readlink().name.endswith("-ba6-rank0.pt")
    load_student(tmp_path / "run" / "student.safetensors")


@pytest.mark.parametrize(
    ("num_images", "content", "problem"),
    [
        (0, b"", r": no images; supported suffixes are "),
        (1, encoded_image(0), r": expected at least 200 images, got 1$"),
        (200, b"corrupt", r": none of the 20 images can be read$"),
    ],
)
def test_a_bad_folder_is_one_line(num_images: int, content: bytes, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").touch()
    for i in range(num_images):
        (folder / f"{i}.jpg").write_bytes(content)
    with pytest.raises(InputError, match=f"^{folder}{problem}"):
        distill.main(command(folder, tmp_path / "run")[1:])
    assert not (tmp_path / "run" / "images" / "train" / "index.json").exists()


def test_other_bad_input_is_one_line(distilled: Path, photos: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "student.safetensors").touch()
    for arguments, problem in (
        (command(tmp_path / "none", tmp_path / "run"), "No such file or directory"),
        (command(photos, tmp_path / "run", teacher="none.pt"), "^teacher.checkpoint: .*/none.pt: no such file$"),
        (command(photos, tmp_path / "run", teacher="timm/vit"), "^teacher.*no model 'timm/vit'"),
        (command(photos, tmp_path / "run", "optimiser.lr=1"), "^optimiser: no such key; did you mean optimizer"),
        (command(photos, Path("/proc/run")), "^/proc/run/distill.yaml: cannot be written"),
        (command(photos, tmp_path / "run", "save_folder=here"), "^save_folder: use --out instead$"),
        (command(photos, photos / "run"), "^.*/run: is inside the folder of samples, "),
        (command(tmp_path, distilled), r"was made by 'd2v distill .*photos\d+ --teacher .*; choose another --out"),
        (command(photos, foreign), f"^{foreign}: has a student.safetensors from another run"),
    ):
        with pytest.raises((InputError, OSError), match=problem):
            distill.main(arguments[1:])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_gpus", "num_images", "expected"),
    [
        (0, 200, ("600ba", 16, 0.004)),
        (0, 10_000, ("1687ba", 32, 0.004)),
        (30, 200, ("3000ba", 30, 0.002)),
        (1, 10_000, ("3000ba", 256, 0.002)),
        (6, 2_000_000, ("30000ba", 252, 0.002)),
    ],
)
def test_sizes_follow_from_images_teacher_and_device(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_images: int, expected: tuple[str, int, float]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    chosen = distill.choose(num_images, Data2Vec2Config(embed_dim=192))
    found = tuple(chosen[key] for key in ("max_duration", "global_train_batch_size", "optimizer.lr"))
    assert found == expected
    assert "teacher.image_size" not in chosen

"""The Python of README and guides runs, a page's blocks one after the other, with the files that they name."""

import ast
import re
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, export
from d2v_composer.models.configs import TimmNetworkConfig
from d2v_composer.models.timm_network import TimmStudent
from helpers import GOLDEN, QUICKSTART, ROOT, encoded_image, run_training, slow, write_files

PAGES = {path.name: path for path in (ROOT / "README.md", *(ROOT / "recipes" / "guides").glob("*.md"))}
SLOW = {"composer.md"}
"""A training on 4,480 images."""


def blocks_of(page: str) -> list[str]:
    """Return a page's Python whose packages are all installed."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if all(map(find_spec, imported_by(block)))]


def imported_by(block: str) -> set[str]:
    nodes = [*ast.walk(ast.parse(block.replace("…", "...")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained student, a classifier of 5 classes, embedded photos, and a timm student."""
    folder = tmp_path_factory.mktemp("snippets")
    changes = "max_duration=2ba", "scheduler.t_warmup=0ba", "alignment.max_samples=64", "retrieval.datasets={}"
    options = *changes, "precision=fp32", "report=false", "train_loader.num_workers=0", f"save_folder={folder / 'run'}"
    run_training(str(ROOT / "yamls" / "quickstart.yaml"), *options)
    export.main([str(folder / "run" / "latest-rank0.pt"), str(folder / "student.safetensors")])
    student = load_student(folder / "student.safetensors")
    (folder / "runs" / "photos").mkdir(parents=True)
    save_student(student, folder / "runs" / "photos" / "student.safetensors")
    student.alignment, student.head = None, torch.nn.Linear(student.embed_dim, 5)
    save_student(student, folder / "classifier.safetensors")
    photos = write_files(folder / "photos", {f"{number:02}.jpg": encoded_image(number, 48) for number in range(11)})
    record = Image.Exif()
    record[0x0112] = 6  # on its side
    Image.open(photos / "00.jpg").save(photos / "11.jpg", exif=record)
    embed.main([str(folder / "student.safetensors"), str(photos), str(folder / "photos.npy"), "--workers", "0"])
    config = TimmNetworkConfig(model="timm/resnet18", timm="", image_size=112, interpolation="bicubic")
    network = TimmStudent(config)
    network.align(torch.randn(384, 512), torch.randn(384), "output_cls")
    (folder / "runs" / "resnet18").mkdir()
    save_student(network, folder / "runs" / "resnet18" / "student.safetensors")
    (folder / "photo.jpg").write_bytes(encoded_image(0))
    (folder / "yamls").symlink_to(ROOT / "yamls")
    return folder


def with_sound(folder: Path) -> Path:
    """Write a student that takes waveforms."""
    teacher = load_teacher(GOLDEN / "audio_base.pt")
    save_student(teacher.build_student(depth=1, normalization="layer"), folder / "student.safetensors")
    return folder


@pytest.mark.parametrize(
    "page",
    [slow(page) if page in SLOW else page for page in sorted(PAGES) if blocks_of(page)],
)
def test_a_page_runs(page: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_sound(tmp_path) if page == "audio.md" else files
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": page}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert (names["embeddings"].shape, names["targets"].shape) == ((2, 192), (2, 65, 192))
    if page == "export-and-embed.md":
        torch.testing.assert_close(names["by_timm"], names["embeddings"], rtol=1e-5, atol=1e-5)
    if page == "students.md":
        assert [names[name].shape for name in ("embeddings", "pooled", "logits")] == [(1, 384), (1, 512), (1, 10)]


@pytest.mark.slow
def test_the_recipe_without_torch_embeds_as_the_command(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    export.main(["student.safetensors", "student.onnx", "--overwrite"])
    mixed = files / "mixed"
    (mixed / "in a folder").mkdir(parents=True)
    for number, path in enumerate(sorted((files / "photos").iterdir())):
        if number % 2:
            Image.open(path).save(mixed / "in a folder" / f"{path.stem}.PNG")
        else:
            shutil.copy(path, mixed / f"{path.stem}.jpeg")
    embed.main(["student.safetensors", "mixed", "expected.npy"])
    (mixed / "notes.txt").write_text("no image")
    runpy.run_path(str(ROOT / "recipes" / "embed_onnx.py"))["main"]("student.onnx", "mixed", "by_onnx.npy")
    assert sorted(np.load("by_onnx.ids.npy")) == sorted(np.load("expected.ids.npy"))
    given, expected = (
        torch.from_numpy(np.load(f"{name}.npy")[np.argsort(np.load(f"{name}.ids.npy"))])
        for name in ("by_onnx", "expected")
    )
    assert cosine_similarity(given, expected).min() > 0.99999


def test_the_toy_teacher_names_its_embedding() -> None:
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert teacher.embedding[:2] == ("output_mean", "teacher")
    assert torch.equal(teacher.embed(images), teacher.embed(images, pooling="mean"))

"""A folder instead of a file, or a file instead of a folder: one line and status 2, before any work."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_composer.checkpoints.load import load_teacher, save_student
from d2v_composer.system import command_line
from helpers import GOLDEN, ROOT, small_run

Command = Callable[..., str]

TEACHER = GOLDEN / "tiny_base.pt"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Return a function that runs a recipe in this process and returns the line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: str, *arguments: str | Path) -> str:
        main = importlib.import_module(f"recipes.{recipe}").main
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command_line.run(main)
        output = capfd.readouterr()
        assert caught.value.code == 2, output
        assert "Traceback" not in output.err
        assert output.out == ""
        last = output.err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    return tmp_path / "file"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    save_student(load_teacher(TEACHER).build_student(depth=1), tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


@pytest.mark.parametrize("name", [".in_use", "latest-rank0.pt", "log.jsonl", "report.html", "run.yaml"])
def test_a_folder_in_place_of_a_runs_file_is_refused(
    name: str, refused: Command, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    line = refused("train", *small_run(tmp_path / "run", small_data))
    assert line == f"error: save_folder: {tmp_path / 'run' / name}: is a folder, expected a run's file, or none"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_train_refuses_wrong_kinds(
    refused: Command, small_data: Path, tmp_path: Path, folder: Path, file: Path
) -> None:
    def line(*overrides: str) -> str:
        return refused("train", *small_run(tmp_path / "run", small_data, *overrides))

    assert refused("train", folder) == f"error: {folder}: cannot be read (Is a directory)"
    assert refused("train", file / "a.yaml") == f"error: {file / 'a.yaml'}: cannot be read (Not a directory)"
    assert line(f"teacher.checkpoint={folder}") == f"error: teacher.checkpoint: {folder}: is a folder, not a file"
    assert line(f"load_path={folder}") == f"error: load_path: {folder}: is a folder, not a file"
    assert line(f"save_folder={file}") == f"error: save_folder: {file}: cannot be written: {file} is not a folder"
    assert f"save_folder: {file}/run: cannot be written: {file} is not a folder" in line(f"save_folder={file}/run")
    assert f"train_loader.local: {file}: no index.json: no such folder; " in line(f"train_loader.local={file}")
    assert str(file) in line(f"retrieval.datasets={{x: {{format: folder, root: {file}}}}}")
    assert str(file) in line(f"retrieval.datasets={{x: {{format: mds, root: {file}}}}}")
    assert str(file) in line(f"retrieval.datasets={{x: {{format: cifar10, root: {file}, download: true}}}}")
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    (data / "index.json").rename(data / "index")
    (data / "index.json").mkdir()
    assert str(data) in line(f"train_loader.local={data}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report").touch()
    assert "is a file, expected the folder of a run's report" in line("report=true")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_train_refuses_folders_in_place_of_images(refused: Command, tmp_path: Path, small_data: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat" / "a.jpg").mkdir(parents=True)
    datasets = f"retrieval.datasets={{x: {{format: folder, root: {tmp_path / 'images'}}}}}"
    assert str(tmp_path / "images") in refused("train", *small_run(tmp_path / "run", small_data, datasets))


def test_evaluate_refuses_wrong_kinds(refused: Command, folder: Path, file: Path) -> None:
    yaml = ROOT / "yamls" / "evaluate.yaml"
    assert refused("evaluate", folder) == f"error: {folder}: cannot be read (Is a directory)"
    assert refused("evaluate", yaml, f"model={folder}").endswith(f"{folder}: is a folder, not a file")
    line = refused("evaluate", yaml, f"model={TEACHER}", f"out={file}")
    assert line == f"error: out: {file}: cannot be written: {file} is not a folder"
    (folder / "evaluation.csv").mkdir()
    line = refused("evaluate", yaml, f"model={TEACHER}", f"out={folder}")
    assert line == f"error: {folder / 'evaluation.csv'}: is a folder, expected a file to write"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("convert_teacher", "teacher.safetensors"),
        ("export_student", "student.safetensors"),
        ("export_student", "student.onnx"),
        ("export_student", "student.pt2"),
    ],
)
def test_converters_refuse_wrong_kinds(
    recipe: str, name: str, refused: Command, student: Path, file: Path, tmp_path: Path
) -> None:
    source = TEACHER if recipe == "convert_teacher" else student
    (tmp_path / "there" / name).mkdir(parents=True)
    assert "is a folder, not a file" in refused(recipe, tmp_path / "there", tmp_path / "out" / name)
    assert "is a folder, expected a file to write" in refused(recipe, source, tmp_path / "there" / name)
    assert f"{file} is not a folder" in refused(recipe, source, file / "x" / name)
    assert "must be a local file" in refused(recipe, source, f"s3://bucket/{name}")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "s3:").exists()


def test_embed_refuses_wrong_kinds(refused: Command, folder: Path, file: Path, tmp_path: Path) -> None:
    (folder / "a.npy").mkdir()
    assert "is a folder, not a file" in refused("embed", folder, folder, "out.npy")
    assert f"{file}: is not a folder" in refused("embed", TEACHER, file, "out.npy")
    assert f"{folder / 'a.npy'}: is a folder, expected a file to write" in refused(
        "embed", TEACHER, folder, folder / "a.npy"
    )
    assert f"{file} is not a folder" in refused("embed", TEACHER, folder, file / "a.npy")
    assert "must be a local file" in refused("embed", TEACHER, folder, "s3://bucket/a.npy")


def test_convert_images_refuses_wrong_kinds(refused: Command, folder: Path, file: Path, tmp_path: Path) -> None:
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    shutil.copy(file, images / "a.jpg")
    assert f"{file}: is not a folder" in refused("convert_images", file, tmp_path / "out")
    assert f"{file}: " in refused("convert_images", images.parent, file)
    assert str(folder) in refused("convert_images", images.parent, tmp_path / "out", "--labels", folder)


def test_report_refuses_wrong_kinds(refused: Command, folder: Path, file: Path) -> None:
    assert f"{file}: no such folder" in refused("report", file)
    (folder / "run.yaml").mkdir()
    assert f"{folder / 'run.yaml'}: " in refused("report", folder)

"""Composer parses addresses as we do; those that it would parse differently are refused."""

import itertools
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from composer.utils import parse_uri
from composer.utils.misc import partial_format

from d2v_composer.checkpoints.load import load_any
from d2v_composer.config.load import load_config, load_evaluate_config
from d2v_composer.system.addresses import Address, RunFolder, check_path, check_run_name
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import fetch
from helpers import ROOT, checkpoints_of, load_checkpoint, losses_of, small_run
from recipes import train as train_recipe

# Parts of names in the property test: all that is special in URLs, format strings or file systems.
ATOMS = [
    *"aB7.-_ %+=@:,~!&$*()[]'\"<>|^`/",
    *"#?;{}\\",
    *("é", "e\u0301", "日本", "..", "//", "{run_name}", "{rank}", "s3:", "%23", "%2F", "\t", "\n"),
    *("\u00a0", "\u202e", "\x00", "\udc80"),
]


def odd_texts(num: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices(ATOMS, k=dice.randint(1, 6))) for _ in range(num)]


def accepted(folders: list[str]) -> dict[str, RunFolder]:
    read = {}
    for folder in folders:
        with suppress(ValueError):
            read[folder] = RunFolder.parse(folder)
    return read


def composers_folder(save_folder: str, run_name: str) -> tuple[str, str, Path]:
    """Return store, bucket and path that Composer parses from a save_folder."""
    store, bucket, path = parse_uri(save_folder)
    return store, bucket, Path(partial_format(path, run_name=run_name, rank=0, local_rank=0) or ".")


def test_composer_saves_where_we_look() -> None:
    """Composer accepts each odd folder that we accept, of thousands, and no two are the same."""
    names = dict.fromkeys(odd_texts(500))
    folders = [f"{start}{name}" for name in names for start in ("", "/x/", "runs/", "s3://bucket/runs/", "s3://")]
    read = accepted(folders)
    assert len(read) > 100
    for text, folder in read.items():
        store, bucket, path = composers_folder(text, "other")
        assert path == folder.local, text
        assert (folder.address is not None) == (store != "")
        if folder.address is not None:
            assert folder.address == f"{store}://{bucket}/{folder.prefix}".rstrip("/")
            assert folder.key("log.jsonl") == parse_uri(f"{folder.address}/log.jsonl")[2]
            assert not folder.local.is_absolute()
            assert ".." not in folder.local.parts
    by_place: dict[Any, set[str]] = {}
    for text, folder in read.items():
        by_place.setdefault(folder, set()).add(os.path.normpath(text.replace("s3://", "s3:", 1)))
    assert all(len(texts) == 1 for texts in by_place.values())


def test_a_run_name_is_one_folder() -> None:
    names = dict.fromkeys(odd_texts(500, seed=1))
    allowed = []
    for name in names:
        with suppress(ValueError):
            check_run_name(name)
            allowed.append(name)
    assert len(allowed) > 15
    for start in ("runs/", "/x/", "s3://bucket/"):
        folders = [RunFolder.parse(f"{start}{name}") for name in allowed]
        assert len(set(folders)) == len(allowed)
        assert [folder.local.name for folder in folders] == allowed


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("runs/a", RunFolder(Path("runs/a"), None, None)),
        ("/x/a b/é=1e-3@2,%23/", RunFolder(Path("/x/a b/é=1e-3@2,%23"), None, None)),
        ("../a", RunFolder(Path("../a"), None, None)),
        ("s3://bucket", RunFolder(Path(), "", "s3://bucket")),
        ("s3://bucket/", RunFolder(Path(), "", "s3://bucket")),
        ("s3://bucket/runs/a/", RunFolder(Path("runs/a"), "runs/a", "s3://bucket/runs/a")),
        ("gs://b/a b", RunFolder(Path("a b"), "a b", "gs://b/a b")),
        ("dbfs:/Volumes/a/b/c", RunFolder(Path("Volumes/a/b/c"), "Volumes/a/b/c", "dbfs:/Volumes/a/b/c")),
    ],
)
def test_save_folders_are_parsed(text: str, folder: RunFolder) -> None:
    assert RunFolder.parse(text) == folder
    assert folder.key("report/loss.png") in (None, f"{folder.prefix}/report/loss.png", "report/loss.png")
    assert not (folder.key("a") or "").startswith("/")


REFUSED = [
    *("/x/vit#3", "/x/vit?3", "/x/vit;3", "/x/a\\b", "/x/{run_name}", "s3://b/}", "//x/y", "a:b", "s3:/b/x"),
    *("ftp://x/y", "s3://a@b/x", "s3:///x", "s3://", "s3://b c/x", "s3://[b/x", "s3://b/a//c", "s3://b/../c"),
    *(" /x/y", "/x/y ", "/x/\n", "", "/x/" + "a" * 256, "/x/" + "é" * 128),
]


@pytest.mark.parametrize("text", REFUSED, ids=[text[:20] for text in REFUSED])
def test_folders_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected ") as caught:
        RunFolder.parse(text)
    assert "got " in str(caught.value)


@pytest.mark.parametrize("path", ["/x/a#3", "/x/a?3", "/x/a;3", "/x/{run_name}", "//x/y", "a:b"])
def test_only_paths_that_composer_misreads_are_refused(path: str) -> None:
    store, bucket, read = parse_uri(path)
    assert (store, bucket, partial_format(read, run_name="a")) != ("", "", path)
    with pytest.raises(ValueError, match="expected "):
        check_path(path)


def test_addresses_are_parsed() -> None:
    assert Address.parse("a#b?c;{d}/../e f") == ("", "", "a#b?c;{d}/../e f")  # a local path
    assert Address.parse("https://host/a.pt?signature=1#2").is_remote
    assert Address.parse("s3://bucket/a;b.pt") == ("s3", "bucket", "a;b.pt")
    assert Address.parse("hf://datasets/org/name@v1/train") == ("hf", "datasets", "org/name@v1/train")
    assert Address.parse("dbfs:/Volumes/a") == ("dbfs", "", "Volumes/a")
    for wrong in ("s3://b/a#1.pt", "s3://b/a?1.pt", "s3:///a.pt", "s3://b/a/../c.pt", "s3://b//c.pt"):
        with pytest.raises(ValueError, match="expected "):
            Address.parse(wrong)
        for door in (fetch, load_any):
            with pytest.raises(InputError, match="expected ") as caught:
                door(wrong)
            assert str(caught.value).startswith(f"{wrong}: expected ")


def test_malformed_addresses_in_a_config_are_refused(tmp_path: Path, small_data: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            load_config(small_run(tmp_path / "run", small_data, *overrides))
        return str(caught.value)

    assert refusal("run_name='vit#3'").startswith("run_name: ")
    assert "${run_name}" in refusal("save_folder='/x/{run_name}'")
    assert refusal("teacher.checkpoint='s3://b/a#1'").startswith("teacher.checkpoint: ")
    assert refusal("train_loader.remote='s3:///a'").startswith("train_loader.remote: ")
    assert refusal("load_path='s3://b/a?1'").startswith("load_path: ")
    odd = tmp_path / "a;b.pt"
    odd.touch()
    assert refusal(f"load_path='{odd}'").startswith("load_path: ")
    sets = "retrieval.datasets={a: {format: cifar10, root: s3://b/a, download: true}}"
    assert refusal(sets) == "retrieval.datasets.a.root: must be a folder on this machine, got 's3://b/a'"
    with pytest.raises(InputError, match=r"out: must be a folder on this machine, got 's3://b/out'"):
        load_evaluate_config([str(ROOT / "yamls" / "evaluate.yaml"), "model=x", "out=s3://b/out"])


def test_runs_resume_from_their_own_checkpoints(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs whose names differ in one odd character, trained in turn and resumed, do not share files."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data#1?;{x}"  # local data sets may have any name
    shutil.copytree(small_data, data)
    train = train_recipe.main
    names = ["vit 3", "vit=3@%23,é"]
    short = ("scheduler.t_warmup=1ba", "student.depth=1", "save_num_checkpoints_to_keep=1")
    for name, batches in itertools.product(names, (2, 4)):
        chosen = (f"run_name='{name}'", f"max_duration={batches}ba", f"train_loader.local='{data}'")
        train(small_run(Path("runs/${run_name}"), small_data, *short, *chosen))
    assert {path.name for path in Path("runs").iterdir()} == set(names)
    for name in names:
        folder = Path("runs") / name
        assert checkpoints_of(folder) == {"ep0-ba4-rank0.pt"}
        assert load_checkpoint(folder / "latest-rank0.pt")["state"]["run_name"] == name
        steps = [line for line in (folder / "log.jsonl").read_text().splitlines() if "loss/" in line]
        assert len(steps) == len(losses_of(folder)) == 4  # the second start resumed the first

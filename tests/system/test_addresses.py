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
    *("é", "e\u0301", "日本", "..", "//", "{run_name}", "{rank}", "s3:", "AZURE_BLOBS", "%23", "%2F", "\t", "\n"),
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
    names = dict.fromkeys(odd_texts(4000))
    folders = [f"{start}{name}" for name in names for start in ("", "/x/", "runs/", "s3://bucket/runs/", "s3://")]
    read = accepted(folders)
    assert 0.1 * len(folders) < len(read) < 0.7 * len(folders)
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
    names = dict.fromkeys(odd_texts(4000, seed=1))
    allowed = []
    for name in names:
        with suppress(ValueError):
            check_run_name(name)
            allowed.append(name)
    assert 0.1 * len(names) < len(allowed) < 0.8 * len(names)
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


REFUSED = {
    "/x/vit#3": r"must not have any of # \? ; \{ \} \\, got '/x/vit#3'",
    "/x/vit?3": r"must not have any of",
    "/x/vit;3": r"must not have any of",
    "/x/a\\b": r"must not have any of",
    "/x/{run_name}": r"placeholders such as \{run_name\} are not supported; in a YAML write \$\{run_name\}",
    "/x/{x}": "placeholders",
    "s3://b/}": "placeholders",
    "//x/y": "must be a folder or an address in one of s3,",
    "a:b": "must be a folder or an address in one of s3,",
    "s3:/b/x": "must be a folder or an address in one of s3,",
    "ftp://x/y": "must be a folder or an address in one of s3,",
    "s3://a@b/x": "must be a folder or an address in one of s3,",
    "/x/AZURE_BLOBS": "must be a folder or an address in one of s3,",
    "s3:///x": r"must be s3://BUCKET/…, got 's3:///x'",
    "s3://": r"must be s3://BUCKET/…",
    "s3://b c/x": r"must be s3://BUCKET/…",
    "s3://[b/x": r"must be s3://BUCKET/…",
    "s3://b/a//c": "must have a name between any two slashes",
    "s3://b/../c": "not '.' or '..'",
    "s3://b/./c": "not '.' or '..'",
    " /x/y": "without spaces around them",
    "/x/y ": "without spaces around them",
    "/x/\n": "must be printable characters",
    "": "must be printable characters",
    "/x/" + "a" * 256: "must have names of at most 255 bytes, got one of 256",
    "/x/" + "é" * 128: "must have names of at most 255 bytes, got one of 256",
    "/" + "/".join(["a" * 200] * 20): "must be a path of at most 3975 bytes",
    "s3://b/" + "/".join(["a" * 200] * 5): "must have a key of at most 904 bytes, got 1004",
}


@pytest.mark.parametrize("text", REFUSED, ids=[text[:20] for text in REFUSED])
def test_folders_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text]) as caught:
        RunFolder.parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["/x/a#3", "/x/a?3", "/x/a;3", "/x/{run_name}", "//x/y", "a:b", "/x/AZURE_BLOBS"])
def test_only_paths_that_composer_misreads_are_refused(path: str) -> None:
    store, bucket, read = parse_uri(path)
    assert (store, bucket, partial_format(read, run_name="a")) != ("", "", path)
    with pytest.raises(ValueError, match=r"must |placeholders "):
        check_path(path)


def test_addresses_are_parsed() -> None:
    assert Address.parse("a#b?c;{d}/../e f") == ("", "", "a#b?c;{d}/../e f")  # a local path
    assert Address.parse("https://host/a.pt?signature=1#2").is_remote
    assert Address.parse("s3://bucket/a;b.pt") == ("s3", "bucket", "a;b.pt")
    assert Address.parse("hf://datasets/org/name@v1/train") == ("hf", "datasets", "org/name@v1/train")
    assert Address.parse("dbfs:/Volumes/a") == ("dbfs", "", "Volumes/a")
    for wrong in ("s3://b/a#1.pt", "s3://b/a?1.pt", "s3:///a.pt", "s3://b/a/../c.pt", "s3://b//c.pt"):
        with pytest.raises(ValueError, match="must "):
            Address.parse(wrong)
        for door in (fetch, load_any):
            with pytest.raises(InputError, match="must ") as caught:
                door(wrong)
            assert str(caught.value).startswith(f"{wrong}: must ")


def test_malformed_addresses_in_a_config_are_refused(tmp_path: Path, small_data: Path) -> None:
    def refusal(*overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            load_config(small_run(tmp_path / "run", small_data, *overrides))
        return str(caught.value)

    assert refusal("run_name='vit#3'").startswith("run_name: must not have any of")
    assert refusal("run_name='{rank}'").startswith("run_name: placeholders")
    assert refusal("run_name=a/b") == "run_name: must be a name without '/', got 'a/b'"
    assert refusal("save_folder='/x/{run_name}'").startswith("save_folder: placeholders such as")
    assert refusal("run_name='vit 3'", "save_folder='s3:${run_name}'").startswith("save_folder: must be a folder or an")
    assert refusal("teacher.checkpoint='s3://b/a#1'").startswith("teacher.checkpoint: must not have #")
    assert refusal("train_loader.remote='s3:///a'").startswith("train_loader.remote: must be s3://BUCKET/")
    assert refusal("train_loader.local=s3://b/a", "train_loader.remote=s3://b/a").startswith("train_loader.local: must")
    assert refusal("load_path='s3://b/a?1'").startswith("load_path: must not have ?")
    assert refusal(f"load_path={tmp_path}") == f"load_path: {tmp_path}: is a folder, not a file"
    odd = tmp_path / "a;b.pt"
    odd.touch()
    assert refusal(f"load_path='{odd}'").startswith("load_path: must not have any of")
    sets = "retrieval.datasets={a: {format: cifar10, root: s3://b/a, download: true}}"
    assert refusal(sets) == "retrieval.datasets.a.root: must be a folder of this machine, got 's3://b/a'"
    with pytest.raises(InputError, match=r"out: must be a folder of this machine, got 's3://b/out'"):
        load_evaluate_config([str(ROOT / "yamls" / "evaluate.yaml"), "model=x", "out=s3://b/out"])


def test_runs_resume_from_their_own_checkpoints(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs whose names differ in one odd character, trained in turn and resumed, do not share files."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data#1?;{x}"  # local data sets may have any name
    shutil.copytree(small_data, data)
    train = train_recipe.main
    names = ["vit", "vit 3", "vit=3@%23,é", "vit.3"]
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

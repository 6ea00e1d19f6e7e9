"""Composer parses addresses as we do; those that it would parse differently are refused."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from composer.utils import parse_uri
from composer.utils.misc import partial_format

from d2v_composer.config.reference import load_any
from d2v_composer.system.addresses import Address, RunFolder, check_run_name, hide_secrets, place_to_write
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import fetch
from helpers import time_limit

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


def test_composer_saves_where_we_look() -> None:
    """Composer parses each odd folder that we accept, of thousands, as we do; a run's name is one folder."""
    folders = [
        f"{start}{name}" for name in odd_texts(500) for start in ("", "/x/", "runs/", "s3://bucket/runs/", "s3://")
    ]
    read: dict[str, RunFolder] = {}
    for text in folders:
        with suppress(ValueError):
            read[text] = RunFolder.parse(text)
    assert len(read) > 100
    for text, folder in read.items():
        store, bucket, path = parse_uri(text)
        assert Path(partial_format(path, run_name="run", rank=0, local_rank=0)) == folder.local, text
        assert (folder.address is not None) == (store != "")
        if folder.address is not None:
            assert parse_uri(f"{folder.address}/log.jsonl")[:2] == (store, bucket)
            assert Path(parse_uri(f"{folder.address}/log.jsonl")[2]) == Path(path) / "log.jsonl"
            assert not folder.local.is_absolute()
            assert ".." not in folder.local.parts
    for name in odd_texts(500, seed=1):
        with suppress(ValueError):
            check_run_name(name)
            assert RunFolder.parse(f"runs/{name}").local.name == name


def test_folders_that_are_refused() -> None:
    for text in (
        *("/x/vit#3", "/x/a\\b", "/x/{rank}", "//x/y", "a:b", "s3:/b/x", "ftp://x/y", "s3://a@b/x", "s3:///x"),
        *("s3://b c/x", "s3://[b/x", "s3://b/a//c", "s3://b/../c", " /x/y", "/x/\n", "", "s3://b", "s3://b/"),
    ):
        with pytest.raises(ValueError, match=r"expected .*got "):
            RunFolder.parse(text)


def test_a_place_to_write_is_an_address_or_an_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_to_write("s3://b/x/") == "s3://b/x"
    assert place_to_write("dbfs:/Volumes/x") == "dbfs:/Volumes/x"
    assert place_to_write("x/") == str(tmp_path / "x")


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
            assert str(caught.value).startswith(f"{hide_secrets(wrong)}: expected ")


SHOWN = {
    "https://user:hunter2@host/base.pt#top": "https://host/base.pt",
    "https://host/base.pt?token=topsecret&versionId=3": "https://host/base.pt?versionId=3",
    "https://b.s3.host/f?X-Amz-Credential=A%2Fs3&X-Amz-Signature=topsecret": "https://b.s3.host/f",
    "https://a.blob.core.windows.net/c/f?sv=2022&sp=r&sig=topsecret": "https://a.blob.core.windows.net/c/f",
    "sftp://user:hunter2@host:22/data/train": "sftp://host:22/data/train",
    "cannot (https://u:hunter2@[::1]/f?sig=topsecret): 403": "cannot (https://[::1]/f): 403",
    """a=https://u:h"u\\n't/e?r#2@host/f?token=top"secret b""": "a=https://host/f b",
    "https://u:hun%22ter2@host/f, then s3://KEY:hunter2@b/k.": "https://host/f, then s3://b/k.",
    "https://u:hunter 2@host/f and https://topsecret@host/g": "https://host/f and https://host/g",
    "--teacher=u:hunter2@host/f: no such file": "--teacher=host/f: no such file",
    "wandb.init_kwargs.settings.api_key='hunter 2' b": "wandb.init_kwargs.settings.api_key=hidden b",
    "{settings: {api_key: hunter2, mode: offline}}": "{settings: {api_key: hidden, mode: offline}}",
}
HARMLESS = (
    "oci://bucket@namespace/key",
    "/data/what?/file#1",
    "https://host:8080/a@b/c and hf://org/name@v1/f",
    "/data/2026-11-28T10:30:00@host/f hub:timm/vit@main",
    "the tensor 'cls_token' has the shape (1, 8) in the checkpoint, and is missing in the model",
)


def test_secrets_are_removed_from_text() -> None:
    for text, shown in SHOWN.items():
        assert hide_secrets(text) == shown
    for text in (*SHOWN.values(), *HARMLESS):
        assert hide_secrets(text) == text
    nested = {"a": ['say "https://u:hunter2@host/f\\" é', 3, None], "b": {"c": "https://host/f?token=topsecret\n"}}
    assert hide_secrets(nested) == {"a": ['say "https://host/f\\" é', 3, None], "b": {"c": "https://host/f\n"}}
    assert hide_secrets({"api_key": "hunter2", "extra_tokens": "drop"}) == {"api_key": "hidden", "extra_tokens": "drop"}


def test_a_hostile_text_takes_no_minutes() -> None:
    with time_limit(30):
        for part in ("://a:", ",a:", "a-", "://a?", "api_key: '"):
            hide_secrets(part * 50_000)

"""Parquet files of the Hugging Face hub are sources: fetched once, and refused if it is not clear which are meant."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import reset_sessions

from containers import write_parquet
from d2v_composer.conversion.convert import open_samples
from d2v_composer.data.images import Images
from d2v_composer.sources import NAMES
from d2v_composer.sources.open import open_source
from d2v_composer.system.errors import InputError
from helpers import encoded_image, write_files
from hub_stub import serve

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = encoded_image(0)


def test_files_of_the_hub_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit's files are fetched once; without them, the bot's; offline, one line."""
    hub, columns = tmp_path / "hub" / "org", {"image": [IMAGE] * 3}
    write_parquet(hub / "a" / "main" / "data" / "train-0.parquet", columns)
    write_parquet(hub / "a" / "main" / "data" / "test-0.parquet", {"image": [IMAGE] * 4})
    write_parquet(hub / "a" / "v2" / "train.parquet", {"image": [IMAGE] * 5})
    write_files(hub, {"b/main/birds.7z": b""})
    write_parquet(hub / "b" / "refs" / "convert" / "parquet" / "default" / "train" / "0.parquet", columns)
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        for address, count in {"a": 3, "a@v2": 5, "a/data/test-0.parquet": 4, "a/data/te*": 4, "b": 3}.items():
            assert len(open_samples(f"hf://datasets/org/{address}")) == count
        fetched = ["data/test-0.parquet", "data/train-0.parquet", "default/train/0.parquet", "train.parquet"]
        assert sorted(server.asked) == fetched
        for address, line in {"a/none": f"no {NAMES}", "c": "cannot be listed"}.items():
            with pytest.raises(InputError, match=rf"hf://datasets/org/{address}:? {line}"):
                open_source(f"hf://datasets/org/{address}", Images())
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()
        with pytest.raises(InputError, match=r"^hf://datasets/org/a cannot be listed"):
            open_source("hf://datasets/org/a", Images())
    reset_sessions()  # they keep being offline


def test_what_the_hub_has_twice_or_not_whole_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, bot = tmp_path / "hub" / "org", "@refs/convert/parquet"
    for path in ("cut/default/partial-train/0", "cut/default/test/0", "two/a/train/0", "two/b/train/0"):
        name, _, rest = path.partition("/")
        (hub / name / "main").mkdir(parents=True, exist_ok=True)
        write_parquet(hub / name / "refs" / "convert" / "parquet" / f"{rest}.parquet", {"image": [IMAGE]})
    for language in ("en", "fr"):
        write_parquet(hub / "card" / "main" / language / "0.parquet", {"image": [IMAGE]})
    card = "---\nconfigs:\n- config_name: english\n- config_name: french\n---\n"
    for name in ("card", "files"):
        (hub / name / "main").mkdir(exist_ok=True, parents=True)
        (hub / name / "main" / "README.md").write_text(card)
    write_parquet(hub / "files" / "main" / "english.parquet", {"image": [IMAGE]})
    address = "hf://datasets/org"
    refused = {
        f"cut{bot}": f"only a part of this data set to Parquet; to read this part, use {address}/cut{bot}/",
        "cut": f"cut{bot}: the hub has converted only a part of this",
        f"cut{bot}/default": "has converted only a part of this",
        "two": f"two{bot} has the configurations a, b; append a glob or one of the folders a/train, b/train$",
        "card": "card has the configurations english, french; append a glob or one of the folders en, fr$",
        "files": "files has the configurations english, french; append a glob$",
    }
    named = (f"cut{bot}/default/partial-train", f"cut{bot}/default/test", f"two{bot}/a", "card/fr", "card/en/*.parquet")
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        for name, line in refused.items():
            with pytest.raises(InputError, match=line):
                open_source(f"{address}/{name}", Images())
        for name in named:
            assert len(open_source(f"{address}/{name}", Images())) == 1

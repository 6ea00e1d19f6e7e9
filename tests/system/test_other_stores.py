"""Google Cloud Storage and Azure, on emulators: conversions, lists, reads, and runs that resume from there."""

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v_composer.commands import convert_images, embed, merge
from d2v_composer.conversion.convert import convert, open_samples
from d2v_composer.sources.mds import INDEX, SUMMARY
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download_existing, fetch, is_lasting, names_in, transfer
from emulators import CONTAINER, azure_store, google_store
from helpers import (
    GOLDEN,
    assert_same_student,
    run_command,
    small_run,
    started_ranks,
    traced,
    wait_until,
    write_images,
)
from streams import open_images, read_epoch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Google's packages warn of Python 3.10

NUM_IMAGES = 40


@pytest.fixture(scope="module", params=["gs", "azure"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a store that this process, and those that it starts, can use."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "azure":
        pytest.importorskip("libcloud")
    with (
        {"gs": google_store, "azure": azure_store}[request.param](folder) as variables,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**variables, "TORCH_HOME": str(folder / "torch")}.items():
            patch.setenv(name, value)
        if request.param == "azure":
            from azure.storage.blob import BlobServiceClient

            account, key = variables["AZURE_ACCOUNT_NAME"], variables["AZURE_ACCOUNT_ACCESS_KEY"]
            BlobServiceClient(f"https://{account}.blob.core.windows.net", key).create_container(CONTAINER)
        yield f"{request.param}://{CONTAINER}"


@pytest.fixture(scope="module")
def converted(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a data set."""
    folder = write_images(tmp_path_factory.mktemp("images"), [f"{number}.png" for number in range(NUM_IMAGES)])
    convert(open_samples(folder), f"{store}/data", workers=2, shard_bytes=1 << 15)
    with pytest.raises(InputError, match=r"data holds a finished data set"):
        convert(open_samples(folder), f"{store}/data")
    return f"{store}/data"


def test_a_data_set_is_listed_and_read(converted: str, tmp_path: Path) -> None:
    images = open_images(tmp_path, converted, timeout=2)
    assert read_epoch(images, workers=2) == [*range(NUM_IMAGES)]
    names = [path.name for path in (tmp_path).glob("shard*")]
    assert len(names) > 1
    assert names_in(converted) == sorted([*names, INDEX, SUMMARY])


def test_missing_and_denied_files_are_told_apart(
    converted: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v_composer.system.fetch.RETRY_SECONDS", 0)
    assert not download_existing(f"{converted}/none", tmp_path / "none")
    with pytest.raises(InputError, match=rf"{store}/none/index.json cannot be fetched"):
        fetch(f"{store}/none/index.json")
    (tmp_path / "left").write_bytes(b"of an attempt before")
    transfer(f"{converted}/index.json", tmp_path / "left", 10)
    assert (tmp_path / "left").read_bytes() == fetch(f"{converted}/index.json").read_bytes()
    if store.startswith("azure"):  # Google's emulator lets anyone in
        monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "b3RoZXI=")
        with pytest.raises(Exception, match="AuthorizationFailure") as caught:
            download_existing(f"{converted}/index.json", tmp_path / "denied")
        assert is_lasting(caught.value)


def test_a_killed_run_resumes_on_another_machine(
    store: str, small_data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    options = small_run(Path("unused"), small_data, f"save_folder={store}/runs/a", "save_interval=5ba")
    arguments = [sys.executable, *traced(options)]
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    with started_ranks(*arguments[1:], ranks=1, environment={"AT": "batch_start 12 hang"}, folders=[here]) as [killed]:
        # Uploads run beside the training, and a fast one would be killed before them.
        wait_until(lambda: "ep1-ba10-rank0.pt" in names_in(f"{store}/runs/a"), seconds=60)
        killed.kill()
        assert killed.wait(30) == -signal.SIGKILL, killed.stderr
    ended = run_command(*arguments, cwd=there)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"resumed.* at batch (5|10)\b", ended.stdout)
    assert_same_student(there / "runs" / "a", uninterrupted)


def test_parts_are_merged(store: str, tmp_path: Path) -> None:
    write_images(tmp_path, [f"{number}.png" for number in range(4)])
    teacher, options = str(GOLDEN / "tiny_base.pt"), ["--batch-size", "1", "--workers", "0"]
    for part in ("1/2", "0/2"):
        convert_images.main([str(tmp_path), f"{store}/merged", "--shard-size", "1kb", "--workers", "1", "--part", part])
        embed.main([teacher, str(tmp_path), f"{store}/merged.npy", *options, "--part", part])
    merge.main([f"{store}/merged"])
    merge.main([f"{store}/merged.npy"])
    assert read_epoch(open_images(tmp_path / "cache", f"{store}/merged", timeout=2), workers=1) == [*range(4)]
    embed.main([teacher, str(tmp_path), str(tmp_path / "whole.npy"), *options])
    assert fetch(f"{store}/merged.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    with pytest.raises(InputError, match=r"merged\.npy already exists"):
        merge.main([f"{store}/merged.npy"])

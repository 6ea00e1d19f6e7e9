"""A run resumes from its newest complete checkpoint, and from no other program's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_composer.checkpoints import checkpoint as checkpoints
from d2v_composer.checkpoints.checkpoint import (
    CorruptCheckpointError,
    drop_unused_scaler,
    find_newest,
    read_checkpoint,
)
from d2v_composer.runs import trainer
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import Canary, load_checkpoint, small_run
from recipes import train


@pytest.fixture
def run_folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with the checkpoints of batches 12 and 14."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True))


def newest_in(folder: Path, address: str | None = None) -> Path | None:
    newest = find_newest(RunFolder(folder, address), lambda checkpoint: None)
    return newest and newest.path


def test_no_flipped_bit_of_the_directory_changes_a_tensor(tmp_path: Path) -> None:
    """The checkpoint is refused, or its content is unchanged."""
    path, weight = tmp_path / "ep0-ba1-rank0.pt", torch.arange(8.0)
    torch.save({"state": {"algorithms": [], "model": {"weight": weight}}}, path)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    places = [*range(entry, whole.index(b"PK\x01\x02", entry + 1)), *range(whole.rindex(b"PK\x05\x06"), len(whole))]
    num_corrupt = 0
    for bit in (8 * place + bit for place in places for bit in range(8)):
        contents = bytearray(whole)
        contents[bit // 8] ^= 1 << bit % 8
        path.write_bytes(contents)
        try:
            checkpoint = read_checkpoint(path)
        except CorruptCheckpointError:
            num_corrupt += 1
        else:
            assert torch.equal(checkpoint.tensors["weight"], weight), bit
    assert num_corrupt > len(places)


def test_the_pointer_says_which_checkpoint_is_the_newest(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a pointer, the checkpoint of the latest batch is."""
    pointer, newest = run_folder / "latest-rank0.pt", run_folder / "ep2-ba14-rank0.pt"
    later = run_folder / "ep10-ba100-rank0.pt"
    shutil.copy(newest, later)
    assert newest_in(run_folder) == newest  # the run was restarted before the later one
    pointer.unlink()
    assert newest_in(run_folder) == later == pointer.resolve()
    pointer.unlink()
    shutil.copy(newest, run_folder / "ep11-ba100-rank0.pt")
    assert newest_in(run_folder) == run_folder / "ep11-ba100-rank0.pt"
    assert caplog.text == ""

    assert newest_in(tmp_path / "new") is None


def test_no_code_of_a_checkpoint_runs(run_folder: Path, small_data: Path, tmp_path: Path) -> None:
    """Composer evaluates the representation of a required algorithm when it loads a checkpoint."""
    newest = run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    expression = f"__import__('os').system('touch {tmp_path}/canary')"
    checkpoint["state"]["algorithms"] = [("BlurPool", {"repr": f"BlurPool if {expression} else 0"})]
    torch.save(checkpoint, newest)
    with pytest.raises(InputError, match=f"^load_path: {newest} is not a checkpoint written by recipes/train.py"):
        train.main(small_run(tmp_path / "another", small_data, f"load_path={newest}"))
    assert not (tmp_path / "canary").exists()


def test_composer_gets_what_was_checked(
    run_folder: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume reads its checkpoint once: it runs no code of a file that replaces it after the check."""
    read, paths = trainer.find_newest, []

    def read_and_replace(*arguments: Any, **options: Any) -> Any:
        newest = read(*arguments, **options)
        assert newest is not None
        paths.append(newest.path)
        checkpoint = load_checkpoint(newest.path)
        checkpoint["state"]["callbacks"]["Health"] = Canary(tmp_path / "canary")
        torch.save(checkpoint, tmp_path / "replacement.pt")
        (tmp_path / "replacement.pt").replace(newest.path)
        return newest

    monkeypatch.setattr(trainer, "find_newest", read_and_replace)
    trained = train.main(small_run(run_folder, small_data, "max_duration=15ba"))
    assert (paths, trained.state.timestamp.batch.value) == ([run_folder / "ep2-ba14-rank0.pt"], 15)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("ours", "stored", "expected"),
    [
        ("0 1\n", "0 1\n2 3\n", "0 1\n"),  # logged elsewhere since, after another checkpoint
        ("0 1\n2\n", "0 1\n", "0 1\n2\n"),  # not uploaded
        (None, "0 1\n", "0 1\n"),  # another machine
        ("0\n", None, "0\n"),  # never uploaded
    ],
)
def test_a_resumed_run_keeps_its_log_and_uploads_its_checkpoint(
    ours: str | None, stored: str | None, expected: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, uploaded = run_folder / "log.jsonl", []
    path.unlink()
    if ours is not None:
        path.write_text(ours)

    def fetch(address: str, file: Path) -> bool:
        if address == "s3://bucket/run/log.jsonl" and stored is not None:
            file.write_text(stored)
            return True
        return False

    monkeypatch.setattr(checkpoints, "download_existing", fetch)
    monkeypatch.setattr(checkpoints, "list_names", lambda address: [])
    monkeypatch.setattr(checkpoints, "upload_checkpoint", lambda *arguments: uploaded.append(arguments))
    assert newest_in(run_folder, "s3://bucket/run") == run_folder / "ep2-ba14-rank0.pt"
    assert uploaded == []
    checkpoints.upload_missing(RunFolder(run_folder, "s3://bucket/run"))  # when the training begins
    assert uploaded == [(run_folder / "ep2-ba14-rank0.pt", "s3://bucket/run")]
    assert path.read_text() == expected


@pytest.mark.parametrize(
    ("saved", "precision", "is_loaded"),
    [
        ({"GradScaler": {"scale": 512.0}}, "amp_fp16", True),
        ({"GradScaler": {"scale": 512.0}}, "amp_bf16", False),
        ({"GradScaler": {}}, "amp_fp16", False),  # a CPU's is disabled, and a GPU's refuses an empty state
        ({"ClosureGradScaler": {"scale": 512.0}}, "amp_fp16", False),
    ],
)
def test_precision_and_device_may_change(saved: dict[str, Any], precision: str, is_loaded: bool) -> None:
    checkpoint = {"state": {"scaler": saved, "model": {}}}
    drop_unused_scaler(checkpoint, precision)
    assert ("scaler" in checkpoint["state"]) == is_loaded

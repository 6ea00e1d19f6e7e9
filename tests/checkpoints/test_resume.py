"""A run resumes from its newest complete checkpoint, and from no other program's."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composer import Trainer
from composer.trainer import _scaler
from composer.utils import checkpoint as composer_checkpoint
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader

from d2v_composer.checkpoints import resume
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.checkpoints.resume import drop_unused_scaler, find_newest_checkpoint
from d2v_composer.checkpoints.safe_load import CorruptCheckpointError, check_checkpoint
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, load_checkpoint, small_run
from recipes import train


@pytest.fixture
def run_folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with the checkpoints of batches 12 and 14."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Flip a bit of a tensor, in the middle of the file."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def encrypt(path: Path) -> None:
    """Set the bit of the archive's directory that declares its first file encrypted."""
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(contents)


def span_disks(path: Path) -> None:
    """Flip a bit of the directory that only torch's reader checks."""
    flip_in_entry(path, b"/data/3", 34, 1)


def make_folder(path: Path) -> None:
    """Flip a bit of the directory that makes torch return uninitialized memory for a tensor."""
    flip_in_entry(path, b"/data/3", 38, 4)


def flip_in_entry(path: Path, name: bytes, place: int, bit: int) -> None:
    contents = bytearray(path.read_bytes())
    entry = contents.rindex(b"PK\x01\x02", 0, contents.rindex(name))
    contents[entry + place] ^= 1 << bit
    path.write_bytes(contents)


@pytest.mark.parametrize("corrupt", [truncate, empty, flip, encrypt, span_disks, make_folder])
def test_a_corrupt_newest_checkpoint_is_skipped_with_a_warning(
    run_folder: Path, corrupt: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = run_folder / "ep2-ba14-rank0.pt", run_folder / "ep1-ba12-rank0.pt"
    assert find_newest_checkpoint(RunFolder(run_folder)) == newest
    corrupt(newest)
    with pytest.raises(CorruptCheckpointError, match=str(newest)):
        check_checkpoint(newest)
    assert find_newest_checkpoint(RunFolder(run_folder)) == before
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(newest) in caplog.text
    corrupt(before)
    with pytest.raises(InputError, match="none of its checkpoints is complete: remove them to restart"):
        find_newest_checkpoint(RunFolder(run_folder))


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
            check_checkpoint(path)
        except CorruptCheckpointError:
            num_corrupt += 1
        else:
            assert torch.equal(load_checkpoint(path)["state"]["model"]["weight"], weight), bit
    assert num_corrupt > len(places)


def test_the_pointer_says_which_checkpoint_is_the_newest(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a pointer, as while Composer replaces it, the checkpoint of the latest batch is."""
    pointer, newest = run_folder / "latest-rank0.pt", run_folder / "ep2-ba14-rank0.pt"
    later = run_folder / "ep10-ba100-rank0.pt"
    shutil.copy(newest, later)
    assert find_newest_checkpoint(RunFolder(run_folder)) == newest  # the run was restarted before the later one
    pointer.unlink()
    assert find_newest_checkpoint(RunFolder(run_folder)) == later
    shutil.copy(newest, run_folder / "ep11-ba100-rank0.pt")
    assert find_newest_checkpoint(RunFolder(run_folder)) == run_folder / "ep11-ba100-rank0.pt"
    assert caplog.text == ""

    assert find_newest_checkpoint(RunFolder(tmp_path / "new")) is None


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def with_canary(checkpoint: dict[str, Any], path: Path) -> None:
    checkpoint["state"]["callbacks"]["Health"] = Canary(path)


def with_algorithm(checkpoint: dict[str, Any], path: Path) -> None:
    """Composer evaluates the representation of a required algorithm when it loads a checkpoint."""
    expression = f"__import__('os').system('touch {path}')"
    checkpoint["state"]["algorithms"] = [("BlurPool", {"repr": f"BlurPool if {expression} else 0"})]


@pytest.mark.parametrize("poison", [with_canary, with_algorithm])
def test_no_code_of_a_checkpoint_runs(
    run_folder: Path, small_data: Path, tmp_path: Path, poison: Callable[[dict[str, Any], Path], None]
) -> None:
    """Neither as a run's newest checkpoint nor as load_path. torch.load and Composer would run it."""
    canary, newest = tmp_path / "canary", run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    poison(checkpoint, canary)
    torch.save(checkpoint, newest)
    if poison is with_canary:
        arguments = small_run(run_folder, small_data)
    else:
        arguments = small_run(tmp_path / "another", small_data, f"load_path={newest}")
    message = f"^(load_path: )?{newest}: is not a checkpoint of recipes/train.py"
    with pytest.raises(InputError, match=message) as refused:
        train.main(arguments)
    assert poison is with_algorithm or "it names posix.system, which no checkpoint needs" in str(refused.value)
    assert not canary.exists()
    if poison is with_canary:
        load_checkpoint(newest)
        assert canary.exists()  # the poison works


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": 1.0}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("ours", "stored", "expected"),
    [
        pytest.param(lines(0, 1), lines(0, 1, 2, 3), lines(0, 1, 2, 3), id="logged elsewhere since"),
        pytest.param(lines(0, 1, 2), lines(0, 1), lines(0, 1, 2), id="not uploaded"),
        pytest.param(None, lines(0, 1), lines(0, 1), id="another machine"),
        pytest.param(lines(0), None, lines(0), id="never uploaded"),
    ],
)
def test_a_resumed_run_keeps_the_longer_log_and_uploads_its_checkpoint(
    ours: bytes | None,
    stored: bytes | None,
    expected: bytes,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, uploaded = run_folder / "log.jsonl", []
    path.unlink()
    if ours is not None:
        path.write_bytes(ours)

    def fetch(address: str, file: Path) -> bool:
        if address == "s3://bucket/run/log.jsonl" and stored is not None:
            file.write_bytes(stored)
            return True
        return False

    monkeypatch.setattr(resume, "download_existing", fetch)
    monkeypatch.setattr(resume, "upload_checkpoint", lambda *arguments: uploaded.append(arguments))
    assert find_newest_checkpoint(RunFolder(run_folder, "s3://bucket/run")) == run_folder / "ep2-ba14-rank0.pt"
    assert uploaded == [(run_folder / "ep2-ba14-rank0.pt", "s3://bucket/run")]
    assert path.read_bytes() == expected
    assert not list(run_folder.glob("*.stored"))


def test_a_store_that_cannot_be_read_stops_the_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bool:
        raise TimeoutError("no answer")

    monkeypatch.setattr(resume, "download_existing", fail)
    with pytest.raises(InputError, match=r"^s3://bucket/run/latest.*: cannot be read \(no answer\)"):
        find_newest_checkpoint(RunFolder(run_folder, "s3://bucket/run"))


@pytest.mark.parametrize("contents", [b"\x80\x04N.", pickle.dumps({"state": {}})])
def test_a_bare_pickle_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "ep0-ba1-rank0.pt"
    path.write_bytes(contents)
    with pytest.raises(InputError, match="truncated, or not a PyTorch checkpoint"):
        check_checkpoint(path)


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ep0-ba1-rank0.pt"
    for saved in ({"model": {}}, [1, 2], {"state": {}}, {"state": {"algorithms": 3}}):
        torch.save(saved, path)
        with pytest.raises(InputError, match=r"is not a checkpoint of recipes/train\.py"):
            check_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear stranger")
    with pytest.raises(InputError, match="truncated, or not a PyTorch checkpoint"):
        check_checkpoint(path)


class ClosureGradScaler(_scaler.ClosureGradScaler):
    """Composer's, on a CPU; enabled as on a GPU, or not."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__("cpu", enabled=enabled)


# The Trainer's scaler, by device and precision.
SCALERS: dict[str, Callable[[], GradScaler]] = {
    "cpu fp32": partial(ClosureGradScaler, enabled=False),
    "gpu fp32": ClosureGradScaler,
    "gpu amp_bf16": ClosureGradScaler,
    "gpu amp_fp16": partial(GradScaler, "cpu"),
}


def with_scaler(trainer: Trainer, kind: str) -> GradScaler:
    """Give the trainer the scaler of a device and precision."""
    scaler = SCALERS[kind]()
    trainer.state.scaler = cast(Any, scaler)
    return scaler


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    teacher = load_teacher(GOLDEN / "tiny_base.pt")
    model = DistillationModel(teacher, teacher.build_student(depth=1))
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW([each for each in model.parameters() if each.requires_grad]),
        train_dataloader=DataLoader([torch.zeros(3, 32, 32)], batch_size=1),  # pyright: ignore[reportArgumentType]
        max_duration="1ba",
        progress_bar=False,
    )


@pytest.mark.parametrize(
    ("before", "now"),
    [("cpu fp32", "gpu fp32"), ("gpu fp32", "cpu fp32"), *((each, "gpu amp_fp16") for each in SCALERS)],
)
def test_precision_and_device_may_change(before: str, now: str, trainer: Trainer, tmp_path: Path) -> None:
    """Only an enabled loss scaler loads the scale, and only from an enabled one."""
    saved = with_scaler(trainer, before)
    if saved.is_enabled():
        saved.load_state_dict(saved.state_dict() | {"scale": 512.0})
    path = trainer.save_checkpoint(str(tmp_path / "checkpoint.pt"))
    assert path is not None
    loaded = with_scaler(trainer, now)
    forget = partial(drop_unused_scaler, precision=now.split()[1])
    composer_checkpoint.load_checkpoint(path, trainer.state, trainer.logger, ignore_keys=forget)
    if loaded.is_enabled():
        assert loaded.get_scale() == (512.0 if before == now == "gpu amp_fp16" else 65536.0)


def resumed(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Trainer:
    """The trainer of a resumed run, before it trains."""
    monkeypatch.setattr(Trainer, "fit", lambda trainer: None)
    trainer = train.main(small_run(folder, data, "max_duration=20ba", *overrides))
    assert trainer.state.timestamp.batch == 14
    return trainer


def test_another_data_set_is_refused(
    run_folder: Path, small_data: Path, many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images in other shards are another data set: their order differs."""
    shards = len(list(many_shards.glob("*.mds")))
    assert shards > 20
    with pytest.raises(InputError) as refused:
        resumed(run_folder, many_shards, monkeypatch)
    now = rf"{many_shards} \(96 samples in {shards} shards, \w{{8}}\)"
    before = rf"{small_data} \(96 samples in \d shards, \w{{8}}\)"
    assert re.fullmatch(
        rf"train_loader\.local: {now}, but the checkpoint .* on another data set, {before}; .*",
        str(refused.value),
    )


def test_a_data_set_may_move(
    run_folder: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(small_data, elsewhere)
    index = json.loads((elsewhere / "index.json").read_text())
    (elsewhere / "index.json").write_text(json.dumps(index, indent=4, sort_keys=True))
    resumed(run_folder, elsewhere, monkeypatch, "train_loader.crop_scale=[0.5,1.0]")


def test_composer_runs_no_code_of_a_checkpoint_replaced_after_the_check(
    run_folder: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    with_canary(checkpoint, tmp_path / "canary")
    torch.save(checkpoint, newest)
    monkeypatch.setattr(resume, "check_checkpoint", lambda path: None)
    with pytest.raises(pickle.UnpicklingError, match=r"unsupported GLOBAL posix\.system"):
        resumed(run_folder, small_data, monkeypatch)
    assert not (tmp_path / "canary").exists()

"""Which checkpoint a run goes on from: whole, ours, and the newest such."""

import datetime
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

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.trainer import _scaler
from composer.utils import checkpoint as composer_checkpoint
from torch.amp.grad_scaler import GradScaler
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader

from d2v_composer.checkpoints.composer_checkpoint import DamagedCheckpointError, check_checkpoint
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.checkpoints.resume import drop_unused_scaler, find_newest_checkpoint
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, load_checkpoint, run_command, small_run, student_of, train_command
from recipes import train


@pytest.fixture
def run_folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with two checkpoints: those of batches 12 and 14."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit of a tensor, in the middle of the file."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def encrypt(path: Path) -> None:
    """The bit of the archive's directory that says so, of its first file."""
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(contents)


def span_disks(path: Path) -> None:
    """One bit of the directory, which torch's reader alone minds."""
    flip_in_entry(path, b"/data/3", 34, 1)


def make_folder(path: Path) -> None:
    """One bit of the directory, with which torch gives what happens to be in memory for a tensor."""
    flip_in_entry(path, b"/data/3", 38, 4)


def flip_in_entry(path: Path, name: bytes, place: int, bit: int) -> None:
    contents = bytearray(path.read_bytes())
    entry = contents.rindex(b"PK\x01\x02", 0, contents.rindex(name))
    contents[entry + place] ^= 1 << bit
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [cut, empty, flip, encrypt, span_disks, make_folder])
def test_a_damaged_newest_checkpoint_is_passed_over(
    run_folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = run_folder / "ep2-ba14-rank0.pt", run_folder / "ep1-ba12-rank0.pt"
    assert find_newest_checkpoint(run_folder) == newest
    damage(newest)
    with pytest.raises(DamagedCheckpointError, match=str(newest)):
        check_checkpoint(newest)
    assert find_newest_checkpoint(run_folder) == before
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(newest) in caplog.text
    damage(before)
    with pytest.raises(InputError, match="none of its 2 checkpoints is whole: remove them to start anew"):
        find_newest_checkpoint(run_folder)


def test_any_bit_of_the_directory(tmp_path: Path) -> None:
    """It is damaged, or the content is as it was."""
    path, weight = tmp_path / "ep0-ba1-rank0.pt", torch.arange(8.0)
    torch.save({"state": {"algorithms": [], "model": {"weight": weight}}}, path)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    places = [*range(entry, whole.index(b"PK\x01\x02", entry + 1)), *range(whole.rindex(b"PK\x05\x06"), len(whole))]
    num_damaged = 0
    for bit in (8 * place + bit for place in places for bit in range(8)):
        contents = bytearray(whole)
        contents[bit // 8] ^= 1 << bit % 8
        path.write_bytes(contents)
        try:
            check_checkpoint(path)
        except DamagedCheckpointError:
            num_damaged += 1
        else:
            assert torch.equal(load_checkpoint(path)["state"]["model"]["weight"], weight), bit
    assert num_damaged > len(places)


def test_which_is_the_newest(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the pointer says; without it, as between Composer's removing and setting it, that of the latest batch."""
    pointer, newest = run_folder / "latest-rank0.pt", run_folder / "ep2-ba14-rank0.pt"
    later = run_folder / "ep10-ba100-rank0.pt"
    shutil.copy(newest, later)
    assert find_newest_checkpoint(run_folder) == newest  # somebody began again before the later one
    pointer.unlink()
    assert find_newest_checkpoint(run_folder) == later
    shutil.copy(newest, run_folder / "ep11-ba100-rank0.pt")
    assert find_newest_checkpoint(run_folder) == run_folder / "ep11-ba100-rank0.pt"
    assert caplog.text == ""

    assert find_newest_checkpoint(tmp_path / "new") is None
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "ep0-ba2-rank0.pt").write_bytes(newest.read_bytes()[:999])
    assert find_newest_checkpoint(killed) is None
    assert "its first checkpoint was not written to its end: the run starts anew" in caplog.text


def test_a_run_with_a_cut_checkpoint_ends_with_the_same_bits(
    run_folder: Path, uninterrupted: Path, small_data: Path
) -> None:
    cut(run_folder / "ep2-ba14-rank0.pt")
    ended = run_command(*train_command(small_run(run_folder, small_data)))
    assert ended.returncode == 0, ended.stderr
    assert "ep2-ba14-rank0.pt: is cut or damaged" in ended.stderr
    ours, expected = student_of(run_folder), student_of(uninterrupted)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def with_canary(checkpoint: dict[str, Any], path: Path) -> None:
    checkpoint["state"]["callbacks"]["Health"] = Canary(path)


def with_algorithm(checkpoint: dict[str, Any], path: Path) -> None:
    """Composer evaluates the representation of an algorithm that must be there when a checkpoint is loaded."""
    expression = f"__import__('os').system('touch {path}')"
    checkpoint["state"]["algorithms"] = [("BlurPool", {"repr": f"BlurPool if {expression} else 0"})]


@pytest.mark.parametrize("poison", [with_canary, with_algorithm])
def test_a_strangers_checkpoint_runs_nothing(
    run_folder: Path, small_data: Path, tmp_path: Path, poison: Callable[[dict[str, Any], Path], None]
) -> None:
    """Neither as a run's newest nor as load_path; torch.load itself would, and Composer."""
    canary, newest = tmp_path / "canary", run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    poison(checkpoint, canary)
    torch.save(checkpoint, newest)
    if poison is with_canary:
        arguments = small_run(run_folder, small_data)
    else:
        arguments = small_run(tmp_path / "another", small_data, f"load_path={newest}")
    refused = run_command(*train_command(arguments))
    assert refused.returncode == 2, refused.stderr
    assert f"{newest}: is not a checkpoint of recipes/train.py" in refused.stderr.splitlines()[-1]
    assert not canary.exists()
    if poison is with_canary:
        load_checkpoint(newest)
        assert canary.exists()  # the poison works


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (lambda: b"\x80\x04N.", "is cut or damaged, or no checkpoint"),
        (lambda: pickle.dumps({"state": {}}), "is cut or damaged, or no checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, contents: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "ep0-ba1-rank0.pt"
    path.write_bytes(contents())
    with pytest.raises(InputError, match=message):
        check_checkpoint(path)


def test_what_is_another_programs_file(tmp_path: Path) -> None:
    path = tmp_path / "ep0-ba1-rank0.pt"
    for saved in ({"model": {}}, [1, 2], {"state": {}}, {"state": {"algorithms": 3}}):
        torch.save(saved, path)
        with pytest.raises(InputError, match=r"is not a checkpoint of recipes/train\.py"):
            check_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear stranger")
    with pytest.raises(InputError, match=r"is not a checkpoint of recipes/train\.py"):
        check_checkpoint(path)


class ClosureGradScaler(_scaler.ClosureGradScaler):
    """Composer's, enabled as where there is a GPU, or not."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__("cpu", enabled=enabled)


# What the Trainer has, by device and precision.
SCALERS: dict[str, Callable[[], GradScaler]] = {
    "cpu fp32": partial(ClosureGradScaler, enabled=False),
    "cpu amp_bf16": partial(ClosureGradScaler, enabled=False),
    "gpu fp32": ClosureGradScaler,
    "gpu amp_bf16": ClosureGradScaler,
    "gpu amp_fp16": partial(GradScaler, "cpu"),
}


def with_scaler(trainer: Trainer, kind: str) -> GradScaler:
    """Give the trainer the scaler that it would have there."""
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


@pytest.mark.parametrize("now", SCALERS)
@pytest.mark.parametrize("before", SCALERS)
def test_precision_and_device_may_change(before: str, now: str, trainer: Trainer, tmp_path: Path) -> None:
    """From each to each; only a loss scaler that is in use takes over the scale of another one in use."""
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
    """The trainer of a run that goes on, before it does."""
    monkeypatch.setattr(Trainer, "fit", lambda trainer: None)
    trainer = train.main(small_run(folder, data, "max_duration=20ba", *overrides))
    assert trainer.state.timestamp.batch == 14
    return trainer


def test_a_gpu_goes_on_with_a_cpus_checkpoint(
    run_folder: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    checkpoint["state"]["scaler"] = {"ClosureGradScaler": {}}  # as on a CPU, but where torch_xla is installed
    torch.save(checkpoint, newest)
    monkeypatch.setattr("composer.trainer.trainer.ClosureGradScaler", ClosureGradScaler)
    trainer = resumed(run_folder, small_data, monkeypatch)
    assert trainer.state.scaler is not None
    assert trainer.state.scaler.is_enabled()
    expected = student_of(run_folder)
    assert all(torch.equal(trainer.state.model.state_dict()[name], expected[name]) for name in expected)


def test_another_data_set_is_refused(
    run_folder: Path, small_data: Path, many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images in other shards are another data set: the order is another."""
    shards = len(list(many_shards.glob("*.mds")))
    assert shards > 20
    with pytest.raises(InputError) as refused:
        resumed(run_folder, many_shards, monkeypatch)
    now = rf"{many_shards} \(96 samples in {shards} shards, \w{{8}}\)"
    before = rf"{small_data} \(96 samples in \d shards, \w{{8}}\)"
    assert re.fullmatch(
        rf"train_loader\.local: {now}, but the checkpoint .* on another data set, {before}: set it back, or .*",
        str(refused.value),
    )


def test_another_order_is_refused(run_folder: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^train_loader\.shuffle: is False, but the checkpoint .* with True"):
        resumed(run_folder, small_data, monkeypatch, "train_loader.shuffle=false")


def test_a_data_set_may_move(
    run_folder: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(small_data, elsewhere)
    index = json.loads((elsewhere / "index.json").read_text())
    (elsewhere / "index.json").write_text(json.dumps(index, indent=4, sort_keys=True))
    resumed(run_folder, elsewhere, monkeypatch, "train_loader.crop_scale=[0.5,1.0]")


def test_a_checkpoint_that_does_not_name_its_data_set(
    run_folder: Path, many_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of version 0.1.0."""
    newest = run_folder / "ep2-ba14-rank0.pt"
    checkpoint = load_checkpoint(newest)
    del checkpoint["state"]["callbacks"]["RunRecord"]["record"]["data"]
    torch.save(checkpoint, newest)
    resumed(run_folder, many_shards, monkeypatch)


def test_only_composers_own_contents_need_an_allow_list(run_folder: Path, tmp_path: Path) -> None:
    """Composer reads checkpoints with weights_only after 0.32.1, and allows what its timestamps, versions and random
    states name."""
    checkpoint = load_checkpoint(run_folder / "latest-rank0.pt")
    state = checkpoint["state"]
    assert {"RunRecord", "Health"} <= state["callbacks"].keys()
    for composers in ("rng", "timestamp", "metadata", "CheckpointSaver"):
        owner = next(each for each in (checkpoint, state, state["callbacks"]) if composers in each)
        del owner[composers]
    torch.save(checkpoint, tmp_path / "ours.pt")
    assert torch.load(tmp_path / "ours.pt", weights_only=True)["state"].keys() == state.keys()


def test_composer_may_read_weights_only(run_folder: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, map_location: str) -> Any:
        reconstruct: Any = np.array(0).__reduce__()[0]
        numpys = [np.ndarray, np.dtype, type(np.dtype("uint32")), reconstruct]
        with torch.serialization.safe_globals([datetime.timedelta, TorchVersion, *numpys]):
            return torch.load(path, map_location=map_location, weights_only=True)

    monkeypatch.setattr(composer_checkpoint, "_torch_load_with_validation", load)
    resumed(run_folder, small_data, monkeypatch)

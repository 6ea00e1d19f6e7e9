"""The log: its uploads, its address, and corrupt lines."""

import json
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.callbacks import CheckpointSaver
from composer.loggers import Logger, RemoteUploaderDownloader

from d2v_composer.builders.loggers import build_loggers
from d2v_composer.callbacks import JSONLLogger, logging
from d2v_composer.config.load import load_config
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.system.errors import InputError
from helpers import (
    small_run,
)

BUCKET = "saved"


class Uploads(Logger):
    """Records the length of the log at each upload."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.destinations: tuple[Any, ...] = ()
        self.uploaded: list[tuple[str, int]] = []

    def upload_file(self, remote_file_name: str, file_path: Path | str, **_: Any) -> None:
        assert Path(file_path) == self.path
        self.uploaded.append((remote_file_name, len(self.path.read_text().splitlines())))


def test_the_log_is_uploaded_with_each_checkpoint_and_after_a_crash(tmp_path: Path) -> None:
    """Not with each epoch, which may be shorter or much longer."""
    log = tmp_path / "log.jsonl"
    saver, jsonl, logger = (
        CheckpointSaver(str(tmp_path)),
        JSONLLogger(str(log), "s3://bucket/run/log.jsonl"),
        Uploads(log),
    )
    state: Any = SimpleNamespace(callbacks=[jsonl, saver])
    jsonl.init(state, logger)
    for batch in range(6):
        jsonl.batch_start(state, logger)
        jsonl.log_metrics({"loss": 1.0}, step=batch)
        if batch in (1, 3):
            saver.saved_checkpoints.append(f"ep0-ba{batch + 1}-rank0.pt")
        jsonl.epoch_end(state, logger)
    assert logger.uploaded == [("run/log.jsonl", 2), ("run/log.jsonl", 4)]
    jsonl.close(state, logger)  # without fit_end, as after an error
    assert logger.uploaded[2:] == [("run/log.jsonl", 6)]
    jsonl.close(state, logger)
    assert len(logger.uploaded) == 3


@pytest.mark.parametrize("end", ["uploaded", "failed"])
def test_the_end_of_a_run_waits_for_uploads_outside_of_collectives(end: str, tmp_path: Path) -> None:
    uploader = RemoteUploaderDownloader.__new__(RemoteUploaderDownloader)
    uploader._logged_objects, uploader._exception_queue = {"run/log.jsonl": ("file", True)}, queue.Queue()
    jsonl, logger = JSONLLogger(str(tmp_path / "log.jsonl"), "s3://bucket/run/log.jsonl"), Uploads(tmp_path)
    logger.destinations = (uploader,)
    ended = threading.Thread(target=jsonl.fit_end, args=(None, logger))
    ended.start()
    ended.join(0.5)
    assert ended.is_alive()
    if end == "uploaded":
        uploader._logged_objects.clear()
    else:
        uploader._exception_queue.put(OSError())
    ended.join(30)
    assert not ended.is_alive()


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
def test_a_resumed_run_keeps_the_longer_log(
    ours: bytes | None, stored: bytes | None, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    if ours is not None:
        path.write_bytes(ours)

    def fetch(address: str, file: Path) -> bool:
        assert address == "s3://bucket/run/log.jsonl"
        if stored is not None:
            file.write_bytes(stored)
        return stored is not None

    monkeypatch.setattr(logging, "download_existing", fetch)
    jsonl = JSONLLogger(str(path), "s3://bucket/run/log.jsonl")
    for batch in (0, 3):
        state: Any = SimpleNamespace(callbacks=[jsonl], timestamp=SimpleNamespace(batch=batch))
        jsonl.after_load(state, Uploads(path))
        if batch == 0:  # a new run
            assert (path.read_bytes() if path.exists() else None) == ours
    assert path.read_bytes() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_cannot_be_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bool:
        raise TimeoutError("no answer")

    monkeypatch.setattr(logging, "download_existing", fail)
    jsonl = JSONLLogger(str(tmp_path / "log.jsonl"), "s3://bucket/run/log.jsonl")
    state: Any = SimpleNamespace(callbacks=[jsonl], timestamp=SimpleNamespace(batch=3))
    with pytest.raises(InputError, match=r"^s3://bucket/run/log\.jsonl: cannot be read: no answer"):
        jsonl.after_load(state, Uploads(tmp_path / "log.jsonl"))


def test_the_log_follows_save_folder_into_the_store(small_data: Path) -> None:
    config = load_config([*small_run(Path("unused"), small_data, f"save_folder=s3://{BUCKET}/run")])
    jsonl = next(each for each in build_loggers(config) if isinstance(each, JSONLLogger))
    assert (jsonl.path, jsonl.remote) == (Path("run/log.jsonl"), f"s3://{BUCKET}/run/log.jsonl")


CORRUPT = [
    b"\xff\xfe{",
    b"null",
    b"[1, 2]",
    b'{"loss/train/total": 1.0}',
    b'{"step": null, "loss/train/total": 1.0}',
    b'{"step": 3, "loss/train/total": [1.0]}',
    b'{"step": 3, "loss/train/tot',
    b"[" * 100_000,
]


@pytest.mark.parametrize("corrupt", CORRUPT, ids=[repr(line[:40]) for line in CORRUPT])
def test_skips_a_corrupt_line_of_a_log_with_a_warning(
    corrupt: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    whole = [f'{{"step": {step}, "loss/train/total": {step / 2}, "nan": NaN}}'.encode() for step in range(3)]
    path.write_bytes(b"\n".join([whole[0], corrupt, *whole[1:]]))
    series = read_jsonl(path)
    assert series["loss/train/total"] == {0: 0.0, 1: 0.5, 2: 1.0}
    assert list(series) == ["loss/train/total", "nan"]
    assert caplog.messages == [f"{path}: skipped 1 of 4 lines: corrupt"]

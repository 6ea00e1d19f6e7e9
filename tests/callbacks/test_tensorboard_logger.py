"""TensorBoard's files are uploaded below the run's folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.utils import dist

from d2v_composer.callbacks.logging import RunTensorboardLogger

STATE: Any = SimpleNamespace(run_name="mine")


@pytest.mark.parametrize(("folder", "prefix"), [("runs/mine", "runs/mine/"), ("", ""), (None, "")])
def test_files_are_uploaded_below_the_runs_folder(tmp_path: Path, folder: str | None, prefix: str) -> None:
    uploaded = []

    class Uploads:
        def upload_file(self, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
            uploaded.append((remote_file_name, Path(file_path).parent))

    logger: Any = Uploads()
    tensorboard = RunTensorboardLogger(str(tmp_path), remote_folder=folder)
    tensorboard.init(STATE, logger)
    tensorboard.log_metrics({"loss": 1.0}, step=0)
    tensorboard.close(STATE, logger)
    ((key, written),) = uploaded
    assert key.startswith(f"{prefix}tensorboard_logs/{{run_name}}/events.out.tfevents.")
    assert written == tmp_path / "mine"


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    tensorboard, logger = RunTensorboardLogger(str(tmp_path)), SimpleNamespace()
    unused: Any = logger
    tensorboard.init(STATE, unused)
    tensorboard.log_metrics({"loss": 1.0}, step=0)
    tensorboard.close(STATE, unused)
    assert not list(tmp_path.iterdir())

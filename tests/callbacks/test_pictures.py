"""Pictures of retrievals are drawn, and one that fails does not stop the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger, TensorboardLogger
from composer.utils import dist
from PIL import Image

from d2v_composer.callbacks.zero_shot_retrieval import Draw, ZeroShotRetrieval, log_picture_files
from d2v_composer.data.labeled import LabeledImages, LabeledSet
from d2v_composer.report.page import draw_gallery

STATE: Any = SimpleNamespace(timestamp=SimpleNamespace(batch=6))


class Shown:
    """A logger that keeps the names and shapes of pictures."""

    def __init__(self, *destinations: object) -> None:
        self.destinations = destinations
        self.pictures: list[tuple[str, tuple[int, ...]]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        pass

    def log_images(self, images: np.ndarray, name: str, *, channels_last: bool, use_table: bool) -> None:
        assert channels_last
        assert images.dtype == np.uint8
        self.pictures.append((name, images.shape))


def measured(logger: Any, draw: Draw | None) -> None:
    """Log a retrieval of a set."""
    images = LabeledImages(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8))
    retrieval = ZeroShotRetrieval({"squares": LabeledSet(images, images, ())}, draw=draw)
    retrieval.neighbors = {"squares": {"train": torch.zeros(8, 3, dtype=torch.int32)}}
    retrieval.record({"teacher": {}}, STATE, logger)
    assert logger.pictures == []
    retrieval.record({None: {}}, STATE, logger)


def test_a_retrieval_is_drawn_on_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Shown()
    measured(logger, draw_gallery)
    assert logger.pictures == [("retrieval/squares", (688, 640, 3))]
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    measured(Shown(), lambda *_: pytest.fail("drawn"))


def test_a_failure_to_draw_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGBA", (6, 4)).save(tmp_path / "loss.png")
    logger: Any = Shown(TensorboardLogger())
    log_picture_files(logger, [tmp_path / "gone.png", tmp_path / "loss.png"])
    assert logger.pictures == [("report/loss", (4, 6, 3))]
    assert "picture report/gone: cannot be logged (FileNotFoundError" in caplog.text


def test_nothing_is_drawn_without_a_logger_that_shows_it(tmp_path: Path) -> None:
    logger: Any = Shown(InMemoryLogger())
    log_picture_files(logger, [tmp_path / "missing.png"])
    assert logger.pictures == []

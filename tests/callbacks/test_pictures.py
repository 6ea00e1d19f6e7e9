"""Pictures of retrievals are drawn once each, and one that fails does not stop the training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger, TensorboardLogger
from composer.utils import dist
from PIL import Image

from d2v_composer.builders.loggers import build_pictures
from d2v_composer.callbacks.zero_shot_retrieval import RetrievalPictures, log_picture_files, shows_pictures
from d2v_composer.data.labeled import LabeledImages, LabeledSet

NEAREST = torch.zeros(8, 3, dtype=torch.int32)
STATE: Any = None


class Shown:
    """A logger that keeps the names and shapes of pictures."""

    def __init__(self, *destinations: object) -> None:
        self.destinations = destinations
        self.pictures: list[tuple[str, tuple[int, ...]]] = []

    def log_images(self, images: np.ndarray, name: str, *, channels_last: bool, use_table: bool) -> None:
        assert channels_last
        assert images.dtype == np.uint8
        self.pictures.append((name, images.shape))


def retrieval(*batches: int) -> Any:
    images = LabeledImages(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8))
    history = [{"batch": batch, "metrics": {}} for batch in batches]
    sets = {"squares": LabeledSet(images, images, ())}
    return SimpleNamespace(history=history, datasets=sets, neighbors={"squares": {"train": NEAREST}})


def test_each_retrieval_is_drawn_once() -> None:
    logger: Any = Shown()
    found = retrieval(6)
    (pictures,) = build_pictures(found, [TensorboardLogger()])
    pictures.after_load(STATE, logger)  # a resume: batch 6 was drawn before
    pictures.fit_start(STATE, logger)
    assert logger.pictures == []
    found.history.append({"batch": 12, "metrics": {}})
    pictures.batch_end(STATE, logger)
    pictures.epoch_end(STATE, logger)
    assert logger.pictures == [("retrieval/squares", (688, 640, 3))]


def test_only_rank_zero_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    logger: Any = Shown()
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    RetrievalPictures(retrieval(6), lambda *_: pytest.fail("drawn")).batch_end(STATE, logger)


def test_a_failure_to_draw_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def draw(*_: object) -> Any:
        raise OSError("no font")

    logger: Any = Shown()
    pictures = RetrievalPictures(retrieval(6), draw)
    pictures.batch_end(STATE, logger)
    pictures.batch_end(STATE, logger)
    assert [record.getMessage() for record in caplog.records] == [
        "picture retrieval/squares: cannot be logged (OSError: no font)"
    ]


def test_nothing_is_drawn_without_a_logger_that_shows_it(tmp_path: Path) -> None:
    assert not shows_pictures([InMemoryLogger()])
    assert build_pictures(retrieval(), [InMemoryLogger()]) == []
    assert build_pictures(None, [TensorboardLogger()]) == []
    logger: Any = Shown(InMemoryLogger())
    log_picture_files(logger, [tmp_path / "missing.png"])
    assert logger.pictures == []


def test_files_are_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGBA", (6, 4)).save(tmp_path / "loss.png")
    logger: Any = Shown(TensorboardLogger())
    log_picture_files(logger, [tmp_path / "gone.png", tmp_path / "loss.png"])
    assert logger.pictures == [("report/loss", (4, 6, 3))]
    assert "picture report/gone: cannot be logged (FileNotFoundError" in caplog.text

"""Log pictures to the loggers that show them: W&B, TensorBoard and MLflow."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.system.retry import reason

__all__ = ["RetrievalPictures", "log_picture_files", "shows_pictures"]

log = logging.getLogger(__name__)


class RetrievalPictures(Callback):
    """Log a picture of what each retrieval finds, ``retrieval/{dataset}``, on rank 0.

    The pictures are those of the test images as queries and the train images as the bank. Training continues if one
    cannot be drawn or logged.

    Args:
        retrieval: The retrieval of the run. It must be before this callback among the Trainer's callbacks.
        draw: Draws a labelled set, given the bank indices of each query's nearest images, (Q, K), nearest first, as
            (height, width, 3) uint8.
    """

    def __init__(self, retrieval: ZeroShotRetrieval, draw: Callable[[LabelledSet, Tensor], NDArray[np.uint8]]) -> None:
        self.retrieval = retrieval
        self.draw = draw
        self.last_drawn: int | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        self.last_drawn = self._last_retrieval()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._log_news(logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._log_news(logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._log_news(logger)

    def _last_retrieval(self) -> int | None:
        """Return the batch of the last retrieval."""
        history = self.retrieval.history
        return history[-1]["batch"] if history else None

    def _log_news(self, logger: Logger) -> None:
        """Draw the last retrieval, unless this was done."""
        last = self._last_retrieval()
        if last == self.last_drawn:
            return
        self.last_drawn = last
        if dist.get_global_rank() != 0:
            return
        for name, labelled in self.retrieval.datasets.items():
            log_picture(logger, f"retrieval/{name}", partial(self._draw, name, labelled))

    def _draw(self, name: str, labelled: LabelledSet) -> NDArray[np.uint8]:
        return self.draw(labelled, self.retrieval.neighbours[name]["train"].long())


def log_picture_files(logger: Logger, files: Iterable[Path]) -> None:
    """Log PNG files, such as a report's, as ``report/{name}``, if a logger shows pictures."""
    if shows_pictures(logger.destinations):
        for file in files:
            log_picture(logger, f"report/{file.stem}", partial(read_picture, file))


def read_picture(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def log_picture(logger: Logger, name: str, draw: Callable[[], NDArray[np.uint8]]) -> None:
    """Draw and log a picture, (height, width, 3) uint8; if it fails, warn, since a picture is not worth a training."""
    try:
        # An array: TensorBoard's logger would take the values of a tensor for 0 to 1. A table of W&B has no steps.
        logger.log_images(draw(), name, channels_last=True, use_table=False)
    except Exception as error:  # noqa: BLE001
        log.warning("picture %s: cannot be logged (%s: %s)", name, type(error).__name__, reason(error))


def shows_pictures(loggers: Sequence[LoggerDestination]) -> bool:
    """Tell whether one of the loggers shows pictures."""
    return any(isinstance(each, MLFlowLogger | TensorboardLogger | WandBLogger) for each in loggers)

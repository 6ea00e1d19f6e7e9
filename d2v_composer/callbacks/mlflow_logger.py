"""Log to MLflow as Composer does, under names that MLflow can keep as files."""

import re
from typing import Any

from composer.loggers import MLFlowLogger

__all__ = ["RunMLFlowLogger"]

# An accuracy, and those of several embeddings below it.
BELOW_AN_ACCURACY = re.compile(r"(/top\d+)/")


class RunMLFlowLogger(MLFlowLogger):
    """Composer's MLFlowLogger, with ``…/top1.output_cls`` instead of ``…/top1/output_cls``.

    MLflow's store of files keeps each metric as a file of that name. ``top1`` would be a file and a folder, and MLflow
    loses all the metrics of a call in which one cannot be written. Pictures have no ``/`` in their names either: MLflow
    writes ``#`` for it, and refuses to read such files.
    """

    def rename(self, key: str) -> str:
        return super().rename(BELOW_AN_ACCURACY.sub(r"\1.", key))

    def log_images(self, images: Any, name: str = "image", *others: Any, **named: Any) -> None:
        super().log_images(images, name.replace("/", "."), *others, **named)

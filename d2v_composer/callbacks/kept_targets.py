"""Store the teacher's targets for fixed views of the images, which recur in later epochs (``train_loader.views``)."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.utils.data import default_collate
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from d2v_composer.callbacks.trainer_state import has_ended
from d2v_composer.system.addresses import MARK
from d2v_composer.system.errors import InputError, writing
from d2v_composer.system.files import check_room
from d2v_composer.system.ranks import raise_on_all_ranks

CHECKSUM = 8  # bytes after the targets of each augmented image


class KeptTargets(Callback):
    """Store the teacher's targets in a file, from which later epochs read the targets.

    The teacher runs again for a batch if the file lacks valid targets for any sample of the batch. At the end of the
    run, the file is deleted.

    Args:
        path: The file, in the run's folder.
        num_samples: Number of images in the data set.
        views: Number of fixed views (crops and flips) of each image, which the epochs use in turn.
        width: Number of values in the targets of a view.
        made_from: JSON values that identify the teacher and the settings on which the targets depend.
    """

    def __init__(self, path: Path, num_samples: int, views: int, width: int, made_from: object) -> None:
        self.path, self.num_samples, self.row_bytes = path, num_samples, 2 * width + CHECKSUM
        self.num_bytes = views * num_samples * self.row_bytes
        self.seed = xxh3_64_intdigest(json.dumps(made_from, sort_keys=True))
        self.file = -1

    def check_room(self) -> str | None:
        """Return an error message if the disk lacks space for this node's share of the targets, else ``None``."""
        stored = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        what, advice = "train_loader.views: the targets of all views", "set views to a smaller number or null"
        return check_room(self.path.parent, what, self.num_bytes, stored, advice)

    def after_load(self, state: State, logger: Logger) -> None:
        if not has_ended(state):
            raise_on_all_ranks(self.check_room())

    def fit_start(self, state: State, logger: Logger) -> None:
        mark = self.path.with_name(MARK)
        is_file = self.path.is_file() and not self.path.is_symlink()
        if os.path.lexists(self.path) and not (is_file and mark.exists()):  # no mark: on a node without rank 0
            raise InputError(f"save_folder: {self.path} is not a file of this run; choose another save_folder")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()  # the folder is the run's on each node
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def after_forward(self, state: State, logger: Logger) -> None:
        outputs: Any = state.outputs
        if outputs.kept_targets is None:
            return
        values = outputs.kept_targets.cpu().numpy()
        with writing(self.path):
            origins = state.batch["origin"].tolist()
            for offset, origin, row in zip(self._offsets(state.batch), origins, values, strict=True):
                data = row.tobytes()
                os.pwrite(self.file, data + xxh3_64_digest(data, origin), offset)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate samples into a batch; add ``origin`` and, if the file has the targets of all samples, ``targets``.

        ``origin``, (B,) int64, is a hash of each view and of ``made_from``; ``targets`` is (B, width)
        float16.
        """
        batch, rows = default_collate(list(samples)), []
        images = (sample["image"].contiguous().numpy() for sample in samples)
        origins = [xxh3_64_intdigest(image, self.seed) >> 1 for image in images]  # an int64
        batch["origin"] = torch.tensor(origins)
        for offset, origin in zip(self._offsets(batch), origins, strict=True):
            try:
                data = os.pread(self.file, self.row_bytes, offset)
            except OSError:  # writing to such a disk ends the run
                return batch
            values, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
            if xxh3_64_digest(values, origin) != checksum:
                return batch
            rows.append(np.frombuffer(values, np.float16))
        return batch | {"targets": torch.from_numpy(np.stack(rows))}

    def _offsets(self, batch: dict[str, Tensor]) -> list[int]:
        return ((batch["view"] * self.num_samples + batch["sample_id"]) * self.row_bytes).tolist()

    def close(self, state: State, logger: Logger) -> None:
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)
        if has_ended(state) and dist.get_local_rank() == 0:
            with suppress(FileNotFoundError):  # another node deleted it
                os.truncate(self.path, 0)  # workers still have it open
                self.path.unlink()

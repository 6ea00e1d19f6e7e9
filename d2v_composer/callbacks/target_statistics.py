"""Measure what normalizes the targets with ``targets.normalization: dataset``."""

from itertools import islice
from typing import Any

from composer.core import Callback, State, ensure_data_spec, get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from d2v_composer.callbacks.trainer_state import unwrapped
from d2v_composer.system.progress import progress_bar


class TargetStatistics(Callback):
    """Measure mean and deviation of the teacher's layers on a run's first batches, before its first step.

    So all targets of a run, and of its resumes, are normalized alike, and any number of ranks measures the same. The
    loader then begins its epoch again.

    Args:
        num_batches: Number of batches, at most an epoch's.
        device_batch_size: Inputs in a forward pass.
    """

    def __init__(self, num_batches: int, device_batch_size: int) -> None:
        self.num_batches, self.device_batch_size = num_batches, device_batch_size

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch > 0:  # they are in the checkpoint
            return
        model: Any = unwrapped(state)
        loader: Any = state.dataloader
        split, to_device = ensure_data_spec(loader).split_batch, state.device.batch_to_device
        is_shown = dist.get_global_rank() == 0
        batches = progress_bar(islice(loader, self.num_batches), desc="targets", unit="batches", disable=not is_shown)
        with get_precision_context(state.precision, state.precision_config):
            model.measure_targets(part for batch in batches for part in split(to_device(batch), self.device_batch_size))
        loader.dataset.load_state_dict(loader.dataset.state_dict(0, from_beginning=True))

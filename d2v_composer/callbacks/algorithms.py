"""Clip the gradient, log its norm, seed each batch, measure target statistics, and share BatchNorm's among ranks.

Before each retrieval and at the end, align the student with its teacher.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from composer import algorithms
from composer.core import Algorithm, Callback, Event, State, ensure_data_spec, get_precision_context
from composer.loggers import Logger
from composer.utils import dist, model_eval_mode
from composer.utils.reproducibility import seed_all
from torch import Tensor

from d2v_composer.callbacks.trainer_state import has_ended, unwrapped
from d2v_composer.data.modality import collate
from d2v_composer.evaluation.labeled_retrieval import move_batch
from d2v_composer.evaluation.nearest_neighbors import Ranks
from d2v_composer.models.alignment import Moments, side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.sources.source import Int64Array, Source, map_in_workers
from d2v_composer.system.progress import progress_bar

EmbedAll = Callable[..., dict[str, Tensor]]
"""A function that embeds a batch and returns every embedding by name, (B, D) each."""

log = logging.getLogger(__name__)


def trained(state: State) -> list[Tensor]:
    """Return the parameters that the optimizers train, without the model's many frozen ones."""
    return [tensor for optimizer in state.optimizers for group in optimizer.param_groups for tensor in group["params"]]


class GradientClipping(algorithms.GradientClipping):
    """Composer's GradientClipping by the global norm, over the trained parameters alone.

    Args:
        clipping_threshold: Largest norm.
    """

    def __init__(self, clipping_threshold: float) -> None:
        super().__init__("norm", clipping_threshold)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        torch.nn.utils.clip_grad_norm_(trained(state), self.clipping_threshold)


class GradientNorm(Algorithm):
    """Log the norm of the gradient before clipping, at a fixed interval.

    The log key is ``l2_norm/grad/global``, as in Composer's OptimizerMonitor. A callback would see the gradient only
    after clipping, so this is an algorithm, though it changes nothing. Pass it to the Trainer after GradientClipping:
    Composer runs the algorithms of an AFTER event from last to first.

    Args:
        every: Interval in batches.

    Example:
        >>> from composer.algorithms import GradientClipping
        >>> from d2v_composer.callbacks import GradientNorm
        >>> algorithms = [GradientClipping("norm", 2.0), GradientNorm(every=100)]  # Trainer(algorithms=algorithms)
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH and int(state.timestamp.batch) % self.every == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        gradients = [tensor.grad for tensor in trained(state) if tensor.grad is not None]
        logger.log_metrics({"l2_norm/grad/global": torch.nn.utils.get_total_norm(gradients).item()})


class SeededBatches(Callback):
    """Seed Python, NumPy and torch at the start of each batch, from (seed, batch, rank).

    Algorithms such as MixUp draw from these generators, whose states Composer 0.32.1 does not restore when it resumes a
    StreamingDataset within an epoch.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        place = (self.seed, int(state.timestamp.batch), dist.get_global_rank())
        seed_all(int(np.random.SeedSequence(place).generate_state(1)[0]))


def broadcast_statistics(model: torch.nn.Module) -> None:
    """Give all ranks the BatchNorm statistics of rank 0, which a checkpoint stores; in training, each has its own."""
    for name, buffer in model.named_buffers():
        if "running_" in name:
            dist.broadcast(buffer, 0)


class SharedStatistics(Callback):
    """Give all ranks the BatchNorm statistics of rank 0 before each evaluation."""

    def eval_start(self, state: State, logger: Logger) -> None:
        broadcast_statistics(state.model)


class TargetStatistics(Callback):
    """Measure mean and deviation of the teacher's layers on a run's first batches, before its first step.

    ``targets.normalization: dataset`` normalizes all targets by these statistics, in the run and after each resume, on
    any number of ranks. After the measurement, the loader begins its epoch again.

    Args:
        num_batches: Number of batches; if an epoch has fewer, all of these are used.
        device_batch_size: Number of inputs in a forward pass.
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


class AlignStudent(Callback):
    """Fit a linear map from the student's embeddings to one of the teacher's, before each retrieval and at a run's end.

    The samples are training samples without augmentation. N are in a batch; the map has I inputs and P channels.

    The mapped embedding is the student's ``projected_cls``. Each rank embeds a share of the batches, and all ranks add
    up the same sums in the same order. So the map has the same bits on any number of ranks, and after a resume.

    Args:
        student: The model that gets the map.
        samples: The training samples.
        batches: Numbers of the samples to fit to, (number of batches, batch size), the same on all ranks.
        embed_student: Function that embeds a batch with the student.
        embed_teacher: Function that embeds a batch with the teacher.
        target: Name of the teacher's embedding to fit to.
        workers: Number of processes that decode samples.

    Attributes:
        batch: Number of training batches after which the map was last fitted; -1 for never. Checkpoints keep it.
        about: ``target`` and :attr:`Fit.about <d2v_composer.models.alignment.Fit.about>`. Checkpoints keep this, too,
            and the map.
    """

    def __init__(
        self,
        student: Backbone,
        samples: Source,
        batches: Int64Array,
        embed_student: EmbedAll,
        embed_teacher: EmbedAll,
        target: str,
        workers: int,
    ) -> None:
        self.student, self.samples, self.batches = student, samples, batches
        self.target, self.workers = target, workers
        self.embed_student, self.embed_teacher = embed_student, embed_teacher
        self.targets: list[Tensor] = []  # this rank's, embedded once
        self.batch, self.about = -1, dict[str, Any]()

    def batch_end(self, state: State, logger: Logger) -> None:
        if has_ended(state):
            broadcast_statistics(state.model)
            self.fit(state, state.device.tensor_to_device)

    epoch_end = batch_end

    def state_dict(self) -> dict[str, Any]:
        alignment = self.student.alignment
        fitted = {} if alignment is None else {name: tensor.cpu() for name, tensor in alignment.state_dict().items()}
        return {"batch": self.batch, "about": self.about, **fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch, self.about = state["batch"], state["about"]
        if "weight" in state:
            self.student.align(state["weight"], state["bias"])

    def fit(self, state: State, to_device: Callable[[Tensor], Tensor]) -> None:
        """Fit the map and give it to the student, unless this was done after the same batch.

        All ranks must share BatchNorm's statistics. If the map cannot be fitted, the student gets none, and a warning
        is logged.
        """
        if self.batch == (batch := int(state.timestamp.batch)):
            return
        moments, student = Moments(), self.student
        precision = get_precision_context(state.precision, state.precision_config)
        with model_eval_mode(state.model), torch.no_grad(), precision:
            for inputs, targets in self.pairs(to_device, student.alignment_inputs):
                moments.add(inputs, targets)
        try:
            fit = moments.fit()
        except ValueError as error:  # the run must not be lost
            student.alignment = None
            log.warning("the student is not aligned with its teacher: %s", error)
            return
        student.align(fit.weight, fit.bias)
        self.batch, self.about = batch, {"target": self.target, **fit.about}

    def pairs(self, to_device: Callable[[Tensor], Tensor], inputs: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs, (N, I), and targets, (N, P), of every batch, in the same order on every rank."""
        ranks, count = Ranks(dist.get_global_rank(), dist.get_world_size()), len(self.batches)
        rounds = range(0, count, ranks.world_size)
        mine = [self.batches[min(first + ranks.rank, count - 1)] for first in rounds]
        loaded = map_in_workers(self._load, mine, self.workers, torch.cuda.is_available())
        for step, (first, samples) in enumerate(zip(rounds, loaded, strict=True)):
            batch = move_batch(samples, to_device)
            rows = side_by_side(self.embed_student(*batch), inputs)
            if step == len(self.targets):
                self.targets.append(self.embed_teacher(*batch)[self.target].float().cpu())
            shares = rows, self.targets[step].to(rows.device)
            yield from zip(*(ranks.gather(share[None], count - first) for share in shares), strict=True)

    def _load(self, numbers: Int64Array) -> tuple[Tensor, ...]:
        return collate(list(map(self.samples.decode, numbers.tolist())))

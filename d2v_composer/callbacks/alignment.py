"""Fit the alignment of a student with its teacher, at a run's end or before a retrieval."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist, model_eval_mode
from torch import Tensor

from d2v_composer.callbacks.algorithms import broadcast_statistics
from d2v_composer.callbacks.trainer_state import has_ended
from d2v_composer.data.modality import Samples, collate
from d2v_composer.evaluation.embedded_set import move_batch
from d2v_composer.evaluation.nearest_neighbors import Ranks
from d2v_composer.evaluation.rows import TEACHER
from d2v_composer.models.alignment import Moments, side_by_side
from d2v_composer.models.names import EMBEDDING
from d2v_composer.models.provenance import Record
from d2v_composer.objectives.distillation import DistillationModel
from d2v_composer.sources.source import Int64Array, map_in_workers

log = logging.getLogger(__name__)


class AlignStudent(Callback):
    """Fit a linear map from the student's raw embeddings to its teacher's embedding, at a run's end or by :meth:`fit`.

    The samples are training samples without augmentation. A batch has N samples; the alignment has I inputs and P
    outputs.

    Each rank embeds a share of the batches, and all ranks add up the same sums in the same order. So the alignment has
    the same bits on any number of ranks, and after a resume.

    Args:
        model: The model that trains; its student gets the alignment.
        samples: The samples to fit to: a map-style dataset of torch, or a list, the same on all ranks. Each sample is
            an image, (3, height, width) uint8, all of one size, or a clip, (L,) float32. Only whole batches are used.
        device_batch_size: Number of samples embedded at once on each device.
        workers: Number of processes that load samples.

    Attributes:
        of: Description of the teacher's embedding.
        batch: Number of training batches after which the alignment was last fitted; -1 for never. Checkpoints keep it.
        statistics: ``of``, ``space``, ``batch`` and :attr:`Fit.statistics
            <d2v_composer.models.alignment.Fit.statistics>`. Checkpoints keep these statistics and the alignment, too.

    Example:
        >>> from d2v_composer.callbacks import AlignStudent
        >>> model = DistillationModel(teacher, student)
        >>> align = AlignStudent(model, images)  # Trainer(model, callbacks=[align])
    """

    def __init__(
        self,
        model: DistillationModel,
        samples: Samples,
        *,
        device_batch_size: int = 64,
        workers: int = 0,
    ) -> None:
        size = min(device_batch_size, len(samples))
        self.batches = np.arange(len(samples) // size * size).reshape(-1, size)
        self.student, self.samples, self.workers = model.student, samples, workers
        self.of = model.teacher.embedding
        self.embed_student, self.embed_teacher = model.embed_all, model.retrieval_baselines()[TEACHER]
        self.targets: list[Tensor] = []  # of this rank's samples, embedded once
        self.batch, self.statistics = -1, Record()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.fit_at_end(state)

    epoch_checkpoint = batch_checkpoint

    def state_dict(self) -> Record:
        alignment = self.student.alignment
        fitted = {} if alignment is None else {name: tensor.cpu() for name, tensor in alignment.state_dict().items()}
        return {"batch": self.batch, "about": self.statistics, **fitted}

    def load_state_dict(self, state: Record) -> None:
        self.batch, self.statistics = state["batch"], state["about"]
        if "weight" in state:
            self.student.align(state["weight"], state["bias"], self.of.of, space=self.of.space)

    def fit_at_end(self, state: State) -> None:
        """Fit the alignment if the run has ended.

        Call it when checkpoints are saved, not after a batch: in between, EarlyStopper or the like may end the run.
        """
        if has_ended(state):
            self.fit(state)

    def fit(self, state: State, before_batch: Callable[[], None] = lambda: None) -> None:
        """Fit the alignment and give it to the student, unless this was done after the same batch.

        Call it on all ranks. If the alignment cannot be fitted, the student gets none, and a warning is logged.
        ``before_batch`` is called before each batch of samples; it may raise to end the fit.
        """
        if self.batch == (batch := int(state.timestamp.batch)):
            return
        broadcast_statistics(state.model)
        student = self.student
        precision = get_precision_context(state.precision, state.precision_config)
        with model_eval_mode(state.model), torch.no_grad(), precision:
            moments = Moments(self.pairs(state.device.tensor_to_device, before_batch, student.alignment_inputs))
        try:
            fit = moments.fit()
        except ValueError as error:  # the run must not be lost
            student.alignment = None
            log.warning("the student is not aligned with its teacher: %s", error)
            return
        student.align(fit.weight, fit.bias, self.of.of, space=self.of.space)
        about = {"of": self.of.of, "space": self.of.space, "batch": batch}
        self.batch, self.statistics = batch, about | fit.statistics

    def pairs(
        self, to_device: Callable[[Tensor], Tensor], before_batch: Callable[[], None], inputs: list[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every batch's inputs of the alignment, (N, I), and targets, (N, P), in the same order on every rank."""
        ranks, count = Ranks(dist.get_global_rank(), dist.get_world_size()), len(self.batches)
        rounds = range(0, count, ranks.world_size)
        mine = [self.batches[min(first + ranks.rank, count - 1)] for first in rounds]
        loaded = map_in_workers(self._load, mine, self.workers, torch.cuda.is_available())
        for step, (first, samples) in enumerate(zip(rounds, loaded, strict=True)):
            before_batch()
            batch = move_batch(samples, to_device)
            rows = side_by_side(self.embed_student(*batch), inputs)
            if step == len(self.targets):
                self.targets.append(self.embed_teacher(*batch)[EMBEDDING].float().cpu())
            shares = rows, self.targets[step].to(rows.device)
            yield from zip(*(ranks.gather(share[None], count - first) for share in shares), strict=True)

    def _load(self, numbers: Int64Array) -> tuple[Tensor, ...]:
        return collate([self.samples[number] for number in numbers.tolist()])

"""Fit the alignment of a student with its teacher."""

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
    """Fit the alignment, a linear map from the student's pooled features to the teacher's embedding.

    The alignment is fitted at the end of the run, and when :meth:`fit` is called.

    Checkpoints keep the alignment and the attributes ``batch`` and ``statistics``.

    Args:
        model: The model that is trained; its student gets the alignment.
        samples: A list or a map-style dataset of torch, the same on all ranks. Samples are images, (3, height, width)
            uint8, all of one size, or clips, (L,) float32. An incomplete last batch is left out.
        device_batch_size: Number of samples embedded at once on each device.
        workers: Number of processes that load samples for each rank.

    Attributes:
        of: Description of the teacher's embedding, an :class:`~d2v_composer.models.alignment.EmbeddingInfo`.
        batch: Number of training batches before the last fit; -1 before the first fit.
        statistics: Dict about the last fit: ``of`` and ``space`` of the teacher's embedding, ``batch``, and the entries
            of :attr:`Fit.statistics <d2v_composer.models.alignment.Fit.statistics>`.

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
        self.fit_at_end(state)  # at batch_end, another callback may yet end the run

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
        """Fit the alignment if the run has ended."""
        if has_ended(state):
            self.fit(state)

    def fit(self, state: State, before_batch: Callable[[], None] = lambda: None) -> None:
        """Fit the student's alignment, unless the last fit was after the same batch; call this method on all ranks.

        If the fit fails, the student gets no alignment, and a warning is logged.

        Args:
            state: State of the Trainer.
            before_batch: Called before each batch of samples; an exception ends the fit.
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
        """Yield the inputs and the targets of the alignment for each batch of N samples.

        The inputs, (N, I), are the student's concatenated features; the targets, (N, P), are the teacher's embeddings.
        The order of the batches is the same on every rank.
        """
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

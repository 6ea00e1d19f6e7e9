"""The settings of an evaluation."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from d2v_composer.data.modality import Augmentation
from d2v_composer.evaluation.metrics import METRICS, RETRIEVAL
from d2v_composer.evaluation.metrics.metric import BANKS, CLASSES, Column, Metric
from d2v_composer.evaluation.nearest_neighbors import NUM_COMMON, ONE_RANK, Ranks
from d2v_composer.sources.labeled import EvaluationSet
from d2v_composer.system.errors import InputError


class Settings(NamedTuple):
    """Settings of an evaluation."""

    headline: str
    """Name of the embedding that tables show."""
    ks: Sequence[int]
    """Numbers of neighbors for top-k accuracies."""
    probes: Collection[str]
    """Names of the metrics to measure, besides retrieval, on sets with labels."""
    augment: Augmentation | None
    """The augmentation that makes the two views of a sample; ``None``: metrics that need views are left out."""
    batch_size: int
    """Number of samples that each rank embeds at once."""
    has_teacher: bool = False
    """True: the teacher is one of the models; False: metrics that need the teacher are left out."""
    needs_all: bool = False
    """True: measure every embedding of each model; False: measure only the embedding that tables show."""
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Moves a tensor to the device that embeds and searches."""
    before_batch: Callable[[], None] = lambda: None
    """Called before each batch of samples and each search; an exception ends the measurement."""
    ranks: Ranks = ONE_RANK
    """The rank of this process, and the number of ranks that share the work."""
    progress: str | None = None
    """Text of the progress bar before the name of the set; ``None``: no bar."""

    def metrics(self, labeled: EvaluationSet) -> list[Metric]:
        """Return the metrics to measure on a set."""
        has = {
            "labels": labeled.has_labels,
            "teacher": self.has_teacher,
            "texts": labeled.class_embeddings is not None,
            "views": self.augment is not None,
        }
        chosen = {RETRIEVAL.name, *self.probes} if labeled.has_labels else {metric.name for metric in METRICS}
        return [metric for metric in METRICS if metric.name in chosen and all(has[need] for need in metric.needs)]

    def columns(self, labeled: EvaluationSet, metric: Metric) -> list[Column]:
        sizes: dict[str, int] = dict(zip(BANKS, labeled.num_samples, strict=True))
        if labeled.class_embeddings is not None:
            sizes[CLASSES] = len(labeled.class_embeddings)
        return metric.columns(self.ks, sizes)

    def needs(self, labeled: EvaluationSet, what: str) -> bool:
        """Return True if a metric to measure on the set has ``what`` in ``Metric.needs``."""
        return any(what in metric.needs for metric in self.metrics(labeled))

    def conditions(self, name: str, labeled: EvaluationSet) -> dict[str, str]:
        """Return dotted name → text, for everything about a set's evaluation that a resumed run must not change."""
        classes = labeled.class_embeddings
        conditions = {f"{name}.embedding": self.headline, f"{name}.images": labeled.fingerprint()}
        if self.needs(labeled, "views"):
            conditions[f"{name}.augmented views"] = repr(self.augment)
        if self.needs(labeled, "texts") and classes is not None:
            conditions[f"{name}.class_embeddings"] = hashlib.sha256(classes.numpy().data).hexdigest()
        return conditions

    def check(self, name: str, labeled: EvaluationSet) -> None:
        """Check that a set has enough samples for every k and for agreement."""
        smallest, num_test, ks = min(filter(None, labeled.num_samples)), labeled.num_samples[1], self.ks
        if not 1 <= min(ks) <= max(ks) <= smallest:
            raise InputError(
                f"ks: must be from 1 to {smallest}, the number of samples in {name}'s smallest split; got {list(ks)}"
            )
        if num_test <= NUM_COMMON and ("agreement" in self.probes or not labeled.has_labels):
            raise InputError(f"datasets.{name}: agreement needs more than {NUM_COMMON} test samples, got {num_test}")

"""Measure embeddings during training, by zero-shot retrieval and further metrics."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from statistics import mean
from typing import Any

import torch
from composer.core import Callback, Event, State, Timestamp, get_precision_context
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, model_eval_mode
from torchmetrics import MeanMetric

from d2v_composer.callbacks.algorithms import broadcast_statistics
from d2v_composer.callbacks.alignment import AlignStudent
from d2v_composer.callbacks.run_record import find_changes
from d2v_composer.callbacks.trainer_state import due_every, has_ended, unwrapped
from d2v_composer.data.modality import Augmentation
from d2v_composer.evaluation.embedded_set import Embed, EmbeddedSet, embed_set
from d2v_composer.evaluation.measurement import measure
from d2v_composer.evaluation.metrics import PROBES
from d2v_composer.evaluation.metrics.metric import BANKS
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.nearest_neighbors import Ranks
from d2v_composer.evaluation.results import Result, read_results
from d2v_composer.evaluation.rows import ROWS, STUDENT, TEACHER, UNTRAINED, Row, metric_key, rows_of
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.names import EMBEDDING
from d2v_composer.models.provenance import Record
from d2v_composer.sources.labeled import EvaluationSet
from d2v_composer.system.errors import InputError

# Attributes in checkpoints.
KEPT = ("history", "baseline_metrics", "conditions", "was_stopped")


class _StoppedError(Exception):
    """Raised to abort a measurement when the run should stop."""


class ZeroShotRetrieval(Callback):
    """Measure top-k retrieval accuracy on evaluation sets, at an interval and at the end of training.

    Test samples are queries to the bank ``train``, and train samples are queries to the bank ``test``.

    The model needs a method ``embed_all`` or ``embed``, unless the argument ``embed`` is given. The method or function
    embeds images, (B, 3, height, width) uint8, or clips, (B, L) float32, on the model's device, and returns the
    embeddings, (B, D), or a dict of several embeddings by name. If any clips are padded, the second argument is the
    length of each clip without padding, (B,) int64.

    Logged:

    - ``metrics/{dataset}/{measure}``: the measure, from 0 to 1, of the model's embedding ``headline``;
    - ``metrics/{dataset}/{baseline}/{measure}``: the measure of a baseline;
    - ``metrics/{dataset}/in_index/{measure}``: the measure of the student's queries in the teacher's bank;
    - ``metrics/mean/top1``: mean of the model's top-1 retrieval accuracies over data sets and banks;
    - ``time/zero_shot_retrieval``: duration in seconds.

    A measure is ``bank_{train|test}/top{k}``, ``{knn|knn_majority|linear}/top1``, ``agreement@10`` or
    ``{instance|zero_shot}/top{k}``. With ``all_embeddings``, keys that end with ``/{embedding}`` are logged, too.

    For Composer's callbacks, each measurement of the model is an evaluation labeled ``retrieval``, whose metrics have
    the keys above without ``metrics/``. For example, ``EarlyStopper("mean/top1", "retrieval", patience="9ba")`` works.

    Checkpoints keep the attributes.

    Args:
        datasets: Name → evaluation set. On a set without labels, the metrics that need no labels are measured.
        interval: Time between evaluations, a Composer time string.
        ks: Numbers k of nearest samples among which top-k accuracy looks for the query's label.
        embed: Function to use instead of the model's method.
        headline: Name of the embedding that tables show, for a model with several embeddings.
        all_embeddings: Measure all embeddings, not only the headline.
        baselines: Name → function that embeds a batch, for comparison. Default: what the model's method
            ``retrieval_baselines`` returns, if the model has this method.
        at_start: Also evaluate the model before the first batch.
        probes: Names of further metrics, from :data:`d2v_composer.evaluation.metrics.PROBES`.
        augment: The augmentation that makes the two views for ``instance``.
        align: The callback that fits the student's alignment before evaluations that need the alignment.
        models: Name → model, for ``student`` and the baselines. The student's queries are also looked up in the
            teacher's bank if ``student`` and ``teacher`` are given, with embeddings in one space.
        should_stop: Function called before each batch of samples and each search. True ends the evaluation, which the
            resumed run repeats. The result must be the same on all ranks, and False before training.
        device_batch_size: Number of samples embedded at once on each device.
        progress_bar: Show a progress bar, on rank 0.

    Attributes:
        history: One entry for each evaluation of the model, oldest first:
            ``{"batch": int, "metrics": {key: accuracy}}``.
        baseline_metrics: Log key → accuracy of the baselines.
        results: The latest results that tables show.
        conditions: Dotted name → text, for everything about the sets' evaluation that a resumed run must not change.
        was_stopped: True if ``should_stop`` ended the last evaluation.

    Example:
        >>> from d2v_composer import load_labeled_set
        >>> cifar10 = load_labeled_set("mds", "cifar10", image_size=32, interpolation="bicubic", max_images=100)
        >>> callback = ZeroShotRetrieval({"cifar10": cifar10}, interval="1ep")  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        datasets: Mapping[str, EvaluationSet],
        interval: str = "5000ba",
        ks: Sequence[int] = (1, 3),
        *,
        embed: Embed | None = None,
        headline: str = EMBEDDING,
        all_embeddings: bool = False,
        baselines: Mapping[str, Embed] | None = None,
        at_start: bool = False,
        probes: Collection[str] = (),
        augment: Augmentation | None = None,
        align: AlignStudent | None = None,
        models: Mapping[str, Backbone] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        device_batch_size: int = 256,
        progress_bar: bool = True,
    ) -> None:
        known = [metric.name for metric in PROBES]
        if unknown := [probe for probe in probes if probe not in known]:
            raise ValueError(f"probes must be among {', '.join(known)}, got {unknown[0]!r}")
        if "agreement" in probes and baselines is not None and TEACHER not in baselines:
            raise ValueError("probes: agreement needs a baseline named 'teacher'")
        has_teacher = baselines is None or TEACHER in baselines  # else fit_start asks the model
        self.settings = Settings(
            headline,
            tuple(ks),
            probes,
            augment,
            batch_size=device_batch_size,
            has_teacher=has_teacher,
            needs_all=all_embeddings,
        )
        self.conditions: dict[str, str] = {}
        for name, labeled in datasets.items():
            self.settings.check(name, labeled)
            self.conditions |= self.settings.conditions(name, labeled)
            if augment is None and ("instance" in probes or not labeled.has_labels):
                raise ValueError(f"{name}: instance retrieval needs the argument 'augment'")
        self.datasets = dict(datasets)
        self.embed = embed
        self.baselines = baselines
        self.at_start = at_start
        self.align, self.models, self.should_stop = align, dict(models or {}), should_stop
        self.needs_alignment = headline == EMBEDDING or "zero_shot" in probes
        self.progress_bar = progress_bar
        self.is_due = due_every(interval, {Event.BATCH_END, Event.EPOCH_END})
        self.history: list[Record] = []
        self.baseline_metrics: dict[str, float] = {}
        self.of_teacher: dict[str, EmbeddedSet] = {}  # embeddings that rows of the student are compared with
        self.results: list[Result] = []
        self.was_stopped = False

    def fit_start(self, state: State, logger: Logger) -> None:
        model = unwrapped(state)
        if self.baselines is None:
            self.baselines = getattr(model, "retrieval_baselines", dict)()
        self.embed_student: Any = self.embed or getattr(model, "embed_all", None) or getattr(model, "embed", None)
        if self.embed_student is None:
            raise ValueError(
                f"{type(model).__name__} has no method embed_all or embed: pass ZeroShotRetrieval(embed=…)"
            )
        self.settings = self.settings._replace(has_teacher=TEACHER in self.baselines)
        wanted = {
            (row.title, dataset, column)
            for row in rows_of(self.baselines)
            for dataset, labeled in self.datasets.items()
            for metric in self.settings.metrics(labeled)
            if row.title == TEACHER or "texts" not in metric.needs  # pixels are in no space of texts
            for column in self.settings.columns(labeled, metric)
        }
        if wanted <= {result[:3] for result in self.results}:
            logger.log_metrics(self.baseline_metrics)
        else:  # not measured yet, or a resume adds some
            self.measure_baselines(state, logger)
        if self.at_start and state.timestamp.batch == 0:
            self.measure_student(state, logger)
        if self.was_stopped:
            self.evaluate(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END):
            self.evaluate(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END):
            self.evaluate(state, logger)

    def state_dict(self) -> Record:
        return {name: getattr(self, name) for name in KEPT} | {"results": [result.plain() for result in self.results]}

    def load_state_dict(self, state: Record) -> None:
        """Restore the measurements.

        Raises:
            InputError: An entry of ``conditions`` has changed.
        """
        before, now = self.conditions | state["conditions"], state["conditions"] | self.conditions
        if changes := "; ".join(find_changes("retrieval.datasets", before, now)):
            raise InputError(f"{changes}; give the data set another name, or restore its samples and settings")
        for name in KEPT:
            setattr(self, name, state[name])
        self.conditions, self.results = now, read_results(state["results"])

    def evaluate(self, state: State, logger: Logger) -> None:
        """Measure the model and log the results, unless the model was already measured after the same batch."""
        if self.history and self.history[-1]["batch"] == int(state.timestamp.batch):
            return
        self.was_stopped = True
        with suppress(_StoppedError):
            self.measure_student(state, logger)

    def measure_baselines(self, state: State, logger: Logger) -> None:
        """Measure the baselines on all sets; keep and log the results."""
        rows = rows_of(self.baselines or {})
        self.baseline_metrics = self._measure(rows, {row.title for row in rows}, state, logger)

    def measure_student(self, state: State, logger: Logger) -> None:
        """Measure the student on all sets; keep and log the results."""
        batch = int(state.timestamp.batch)
        student = STUDENT if batch else UNTRAINED
        # If a shorter run has ended before, the student has an alignment that does not fit its weights anymore.
        if (align := self.align) is not None and (
            align.student.alignment is not None or self.needs_alignment or has_ended(state)
        ):
            align.fit(state, self._stop_if_due)
        rows = [row for row in rows_of([*(self.baselines or {}), student], self.infos()) if student in row.models]
        outdated = {row.title for row in ROWS.values() if student in row.models}
        metrics = self._measure(rows, outdated, state, logger)
        self.history.append({"batch": batch, "metrics": metrics})
        self.was_stopped = False
        run_evaluation_events(state, logger, metrics)

    def infos(self) -> dict[str, EmbeddingInfo]:
        """Return name of a model → description of the model's embedding, for the models in ``models``."""
        names = {UNTRAINED: STUDENT, "encoder": TEACHER} | {name: name for name in self.models}
        return {name: self.models[model].embedding for name, model in names.items() if model in self.models}

    def weights(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return name of a model → hash of its weights, for those in ``models`` that embed the queries of ``rows``."""
        names = {name: {UNTRAINED: STUDENT}.get(name, name) for name in (row.queries.model for row in rows)}
        return {name: self.models[model].identify_weights() for name, model in names.items() if model in self.models}

    def _measure(
        self, rows: Sequence[Row], outdated: Collection[str], state: State, logger: Logger
    ) -> dict[str, float]:
        start, results, batch = time.monotonic(), list[Result](), int(state.timestamp.batch)
        ranks = Ranks(dist.get_global_rank(), dist.get_world_size())
        progress = "retrieval " if self.progress_bar and ranks.rank == 0 else None
        settings = self.settings._replace(
            to_device=state.device.tensor_to_device, before_batch=self._stop_if_due, ranks=ranks, progress=progress
        )
        infos, weights = self.infos(), self.weights(rows)
        embeds = {**(self.baselines or {}), STUDENT: self.embed_student, UNTRAINED: self.embed_student}
        broadcast_statistics(state.model)
        precision = get_precision_context(state.precision, state.precision_config)
        with model_eval_mode(state.model), torch.no_grad(), precision:
            for dataset, labeled in self.datasets.items():
                models = set[str]().union(*(row.models for row in rows))
                if needs_teacher := settings.needs(labeled, "teacher"):
                    models.add(TEACHER)
                embedded = dict[str, EmbeddedSet]()
                if self.of_teacher.get(dataset) and TEACHER not in outdated:  # embedded before
                    embedded[TEACHER] = self.of_teacher[dataset]
                used = {model: embed for model, embed in embeds.items() if model in models - embedded.keys()}
                embedded |= embed_set(used, dataset, labeled, settings, infos)
                results += measure(rows, embedded, dataset, labeled, settings, infos, weights)
                self.of_teacher[dataset] = {
                    part: {
                        name: vectors
                        for name, vectors in embeddings.items()
                        if name == EMBEDDING or (needs_teacher and part == "test")
                    }
                    for part, embeddings in embedded.get(TEACHER, {}).items()
                }
        self.results = [result for result in self.results if result.row not in outdated]
        for result in results:
            if result.is_headline:
                shown = result.nearest if result.row in (STUDENT, TEACHER) else None
                self.results.append(result._replace(batch=batch, nearest=shown))
        metrics = {
            metric_key(result.dataset, result.column, name, result.row): result.accuracy
            for result in results
            for name in ([""] if result.is_headline else []) + ([result.embedding] if settings.needs_all else [])
        }
        keys = (metric_key(dataset, retrieval_from(bank, 1)) for dataset in self.datasets for bank in BANKS)
        if top1 := [metrics[key] for key in keys if key in metrics]:
            metrics["metrics/mean/top1"] = mean(top1)
        logger.log_metrics({"time/zero_shot_retrieval": time.monotonic() - start})
        logger.log_metrics(metrics)
        return metrics

    def _stop_if_due(self) -> None:
        if self.should_stop():
            raise _StoppedError


def run_evaluation_events(state: State, logger: Logger, metrics: Mapping[str, float]) -> None:
    """Run Composer's EVAL_START and EVAL_END, with the accuracies as metrics, for all callbacks except loggers."""
    state.eval_metrics["retrieval"] = {}
    for key, accuracy in metrics.items():
        metric = MeanMetric(sync_on_compute=False)  # all ranks have the same accuracies
        metric.update(accuracy)
        state.eval_metrics["retrieval"][key.removeprefix("metrics/")] = metric
    loader, label, length = state.dataloader, state.dataloader_label, state.dataloader_len
    state.set_dataloader([], "retrieval")
    state.eval_timestamp = Timestamp()
    for event in (Event.EVAL_START, Event.EVAL_END):
        for callback in state.callbacks:
            if not isinstance(callback, LoggerDestination):  # loggers would look for this evaluation in the Trainer
                callback.run_event(event, state, logger)
    state.set_dataloader(loader, label, -1 if length is None else length)

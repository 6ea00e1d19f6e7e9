"""Read a run's folder, and answer whether its student is worth it: what it keeps of its teacher, and what it costs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from d2v_composer.checkpoints.checkpoint import LATEST, LOG, Checkpoint, read_newest
from d2v_composer.checkpoints.safe_load import load_untrusted
from d2v_composer.data import MODALITIES
from d2v_composer.data.modality import Modality
from d2v_composer.evaluation.metrics.metric import Column
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import Result, accuracy_interval, last_batch, pivot, read_results
from d2v_composer.evaluation.rows import GAP, GAP_CLOSED, STUDENT, TEACHER, metric_key
from d2v_composer.evaluation.run_log import Log, read_jsonl
from d2v_composer.sources.labeled import ONLY_SAMPLES, EvaluationSet, open_labeled_sets
from d2v_composer.system.errors import InputError, reading

# Side of the images of a folder in a gallery, in pixels.
SHOWN_SIZE = 96
# In % of the teacher gap. A student that closes less than ENOUGH gets advice: to train longer, if the batches since the
# measurement before the last closed at least RISING.
ENOUGH, RISING = 90, 2
COSTS = (("M parameters", "num_parameters", 1e-6), ("MB in float32", "num_parameters", 4e-6), ("GFLOP", "gflop", 1))


class Run(NamedTuple):
    """Contents of a report."""

    record: Mapping[str, Any]
    """The sections of run.yaml: config, command, versions, hardware, data, and teacher or model."""
    log: Log
    datasets: Mapping[str, EvaluationSet] = {}
    """Name → data set, of those that can still be read; each label has a name."""
    results: Sequence[Result] = ()
    """Results, as in :class:`~d2v_composer.callbacks.ZeroShotRetrieval`."""

    @property
    def modality(self) -> Modality:
        """The modality of the samples, with images of a gallery's size."""
        return MODALITIES[self.record["data"]["modality"]].of_side(SHOWN_SIZE)

    @property
    def retrieval(self) -> Mapping[str, Any]:
        """The section ``retrieval`` of the config; in a fine-tuning run, it has no data sets."""
        config = self.record["config"]
        return {"datasets": {}, "max_images": None} if "dataset" in config else config["retrieval"]

    @property
    def primary(self) -> str:
        """Text with the primary embedding and the batch after which the student was last measured."""
        return f"{self.retrieval['representation']}_{self.retrieval['pooling']}, batch {last_batch(self.results)}"


def latest(values: Mapping[int, float]) -> float | None:
    """Return the value of the last step, or ``None`` if there are no values."""
    return values[max(values)] if values else None


def read_run(folder: Path) -> Run:
    """Read the folder of a finished or unfinished run of ``recipes/train.py`` or ``recipes/finetune.py``.

    Results and neighbors are those of the newest checkpoint. Data sets that cannot be read, or have changed since, are
    left out, with a printed line.

    Raises:
        InputError: The folder is not a run's, or its newest checkpoint is corrupt.
    """
    record_file, log_file, checkpoint = folder / "run.yaml", folder / LOG, folder / LATEST
    measured: dict[str, Any] = {"conditions": {}, "results": []}
    with reading(record_file):
        run = Run(yaml.safe_load(record_file.read_bytes()), {})
        retrieval, modality = run.retrieval, run.modality
    with reading(log_file):
        log = read_jsonl(log_file)
    if checkpoint.is_file():
        with reading(checkpoint):
            measured |= Checkpoint(checkpoint, read_newest(checkpoint, load_untrusted)).saved_by("ZeroShotRetrieval")
    results, datasets = read_results(measured["results"]), {}
    shown = {result.dataset for result in results if result.row == STUDENT and result.nearest is not None}
    for name, load in open_labeled_sets(retrieval, modality, **ONLY_SAMPLES).items():
        try:
            if name in shown:
                dataset = load()
                if measured["conditions"][f"{name}.images"] != dataset.fingerprint():
                    raise InputError(f"its {modality.unit} differ from those that the run measured")
                datasets[name] = dataset
        except InputError as error:
            print(f"report: no gallery for {name}: {error}")
    return run._replace(log=log, datasets=datasets, results=results)


def verdicts(run: Run) -> Iterator[str]:
    """Yield the verdict on each data set on which the untrained student, the student and its teacher were measured.

    The verdict is about retrieval or, without labels, about the neighbor agreement with the teacher.
    """
    for dataset in run.retrieval["datasets"]:
        accuracies = pivot(run.results, dataset)
        for column, rows in accuracies.items():
            is_headline = column == retrieval_from("train", min(run.retrieval["ks"])) or column.name == "agreement"
            if is_headline and GAP_CLOSED in rows:
                yield f"On {dataset}, {_kept(run, dataset, column, rows)}"
                yield from _in_index(run, dataset, column)
                break


def _in_index(run: Run, dataset: str, column: Column) -> Iterator[str]:
    """Yield how well the student searches its teacher's index, if it is aligned with its teacher."""
    of_column = (result for result in run.results if (result.dataset, result.column) == (dataset, column))
    hits = {result.row: result.hits.double().numpy() for result in of_column if result.is_primary}
    if (row := f"{STUDENT} in the teacher's index") in hits:
        compared = []
        for name, other in (("its own index", STUDENT), ("the teacher", f"{TEACHER}, projected")):
            value, low, high = (100 * number for number in accuracy_interval(hits[row] - hits[other])[:3])
            compared.append(f"{value:+.1f} points compared with {name} [{low:+.1f}, {high:+.1f}]")
        yield f"In its teacher's index, the student scores {100 * hits[row].mean():.1f} %: {'; '.join(compared)}."


def _kept(run: Run, dataset: str, column: Column, rows: Mapping[str, Any]) -> str:
    untrained, student, teacher = (100 * rows[row].value for row in GAP)
    batch = last_batch(run.results)
    details = f"The student scores {student:.1f} % ({column.heading}, {run.primary}); untrained it scored "
    details += f"{untrained:.1f} %, and its teacher scores {teacher:.1f} %."
    costs = run.record["costs"]
    sizes = [
        f"{scale * costs['student'][key]:.2f} {name} (teacher: {scale * costs[TEACHER][key]:.2f})"
        for name, key, scale in COSTS
    ]
    details += f" It has {', '.join(sizes)}."
    if (closed := rows[GAP_CLOSED]) is None:
        return f"there is no teacher gap to close. {details}"
    value, low, high = (100 * fraction for fraction in closed[:3])
    verdict = f"the student closes {value:.0f} % of the teacher gap, 95 % interval {low:.0f} to {high:.0f}"
    verdict += f"{closed.note}. {details}"
    if value >= ENOUGH:
        return verdict
    logged = run.log.get(metric_key(dataset, column), {})  # may go beyond the last checkpoint
    first, before = max({0: untrained / 100, **{step: value for step, value in logged.items() if step < batch}}.items())
    gain = 100 * (student - 100 * before) / (teacher - untrained)
    more = "" if run.record["config"]["student"]["model"] else "more teacher.first_blocks or "  # timm's has its own
    tried = "longer training" if gain >= RISING else f"{more}smaller batches for the same number of samples"
    return f"{verdict} To close more, try {tried}: the last {batch - first} batches closed {gain:.0f} %."

"""Read a run's folder, and judge the student."""

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
from d2v_composer.evaluation.results import (
    GapClosed,
    Result,
    are_comparable,
    gap_closed,
    last_batch,
    pivot,
    read_results,
)
from d2v_composer.evaluation.rows import GAP, IN_INDEX, STUDENT, TEACHER, UNTRAINED, metric_key
from d2v_composer.evaluation.run_log import Log, read_jsonl
from d2v_composer.report.gallery import SHOWN_SIZE
from d2v_composer.report.tables import percent
from d2v_composer.sources.labeled import ONLY_SAMPLES, EvaluationSet, open_labeled_sets
from d2v_composer.system.errors import InputError, reading

# Shares of the teacher gap. A student that closes less than ENOUGH gets advice: to train longer, if the batches since
# the measurement before the last closed at least RISING.
ENOUGH, RISING = 0.9, 0.02


class Run(NamedTuple):
    """Contents of a run's folder from which a report is made."""

    record: Mapping[str, Any]
    """Contents of ``run.yaml``."""
    log: Log
    datasets: Mapping[str, EvaluationSet] = {}
    """Name → data set, for galleries."""
    results: Sequence[Result] = ()
    """Results of the evaluations during training, from the newest checkpoint."""

    @property
    def modality(self) -> Modality:
        """The modality of the samples, with images of ``SHOWN_SIZE`` pixels per side."""
        return MODALITIES[self.record["data"]["modality"]].of_side(SHOWN_SIZE)

    @property
    def retrieval(self) -> Mapping[str, Any]:
        """The section ``retrieval`` of the config."""
        return self.record["config"]["retrieval"]


def latest(values: Mapping[int, float]) -> float | None:
    """Return the value of the last step, or ``None`` if there are no values."""
    return values[max(values)] if values else None


def read_run(folder: Path) -> Run:
    """Read the folder of a run, finished or not.

    A data set that cannot be read, or has changed since the run, is left out, with a printed line.
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
                    raise InputError(f"the {modality.unit} have changed since the run")
                datasets[name] = dataset
        except InputError as error:
            print(f"report: no gallery for {name}: {error}")
    return run._replace(log=log, datasets=datasets, results=results)


def verdicts(run: Run) -> Iterator[str]:
    """Yield a text about the student's quality and the next step for each data set.

    Data sets without comparable results of the untrained student, the student and the teacher are left out.
    """
    for dataset in run.retrieval["datasets"]:
        for column, cells in pivot(run.results, dataset).items():
            is_judged = column == retrieval_from("train", min(run.retrieval["ks"])) or column.name == "agreement"
            if is_judged and (gap := gap_closed(cells)):
                found = _found(column, cells, gap, run.modality.unit)
                yield f"On {dataset}, {found} {_next(run, dataset, column, cells, gap)}"
                break


def _found(column: Column, cells: Mapping[str, Result], gap: GapClosed, unit: str) -> str:
    shown = {row: f"{100 * result.accuracy:.1f} %" for row, result in cells.items()}
    if IN_INDEX in cells and are_comparable(cells[IN_INDEX], cells[TEACHER]):
        beside = f"in its teacher's index, where the teacher scores {shown[TEACHER]} ({column.heading})"
        said = f"the student scores {shown[IN_INDEX]} {beside}; in its own index, the student scores {shown[STUDENT]}"
    else:
        said = f"the student scores {shown[STUDENT]}, and its teacher {shown[TEACHER]} ({column.heading})"
    if gap.interval is not None:
        way = f"of the way from the untrained student's {shown[UNTRAINED]} to the teacher"
        return f"{said}; that is {percent(gap.interval, 0)} % {way}."
    if not gap.queries_needed:
        return f"{said}; the teacher is no better than the untrained student ({shown[UNTRAINED]})."
    few = f"{len(cells[STUDENT].hits):,} {unit} are too few to tell how far the student has come toward the teacher"
    enough = f"{gap.queries_needed:,} or more would be enough"
    return f"{said}; the untrained student scores {shown[UNTRAINED]}; {few} ({enough})."


def _next(run: Run, dataset: str, column: Column, cells: Mapping[str, Result], gap: GapClosed) -> str:
    if gap.interval is None:
        unit = run.modality.unit
        if not gap.queries_needed:
            return f"Measure the student on other {unit}, or train it with another teacher."
        if cells[STUDENT].accuracy > cells[UNTRAINED].accuracy:
            return f"Measure the student on more test {unit}."
    elif gap.interval.value >= ENOUGH:
        return "Export or fine-tune the student: it has come most of the way to its teacher."
    if gap.interval is None or gap.interval.low <= 0:
        return "Train the student longer: so far, it is not clearly better than the untrained student."
    untrained, student, teacher = (cells[row].accuracy for row in GAP)
    batch = last_batch(run.results)
    logged = run.log.get(metric_key(dataset, column), {})  # may go beyond the last checkpoint
    before = {0: untrained, **{step: value for step, value in logged.items() if step < batch}}
    if student - before[max(before)] >= RISING * (teacher - untrained):
        return "Train the student longer: the curve still rises."
    more = "" if run.record["config"]["student"]["model"] else "a larger teacher.first_blocks, or "  # timm has its own
    return f"Try {more}smaller batches for the same number of samples: the curve is flat."

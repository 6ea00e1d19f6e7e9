"""Answer whether a student is worth it: what it keeps of its teacher, what it costs, and what to try next."""

from collections.abc import Iterator, Mapping
from typing import Any

from d2v_composer.evaluation.results import GAP_CLOSED, last_batch, pivot
from d2v_composer.evaluation.rows import AGREEMENT, GAP, TEACHER, Measure, metric_key, retrieval_from
from d2v_composer.report.run import Run

# In % of the teacher gap: a student that closes less gets advice; to train longer, if so much of it came last.
ENOUGH, RISING = 90, 2
COSTS = (("M parameters", "num_parameters", 1e-6), ("MB in float32", "num_parameters", 4e-6), ("GFLOP", "gflop", 1))


def answer(run: Run) -> Iterator[str]:
    """Yield the verdict on each data set on which the untrained student, the student and its teacher were measured.

    It is about retrieval or, without labels, about the neighbor agreement with the teacher.
    """
    for dataset in run.retrieval["datasets"]:
        accuracies = pivot(run.results, dataset)
        for measure in (retrieval_from("train", min(run.retrieval["ks"])), AGREEMENT):
            if GAP_CLOSED in accuracies.get(measure, ()):
                yield f"On {dataset}, {_kept(run, dataset, measure, accuracies[measure])}"
                break


def _kept(run: Run, dataset: str, measure: Measure, rows: Mapping[str, Any]) -> str:
    untrained, student, teacher = (100 * rows[row].value for row in GAP)
    batch = last_batch(run.results)
    shown = f"The student scores {student:.1f} % ({measure.heading}, {run.primary}); untrained it scored "
    shown += f"{untrained:.1f} %, and its teacher scores {teacher:.1f} %."
    costs = run.record["costs"]
    sizes = [
        f"{scale * costs['student'][key]:.2f} {name} (teacher: {scale * costs[TEACHER][key]:.2f})"
        for name, key, scale in COSTS
    ]
    shown += f" It has {', '.join(sizes)}."
    if (closed := rows[GAP_CLOSED]) is None:
        return f"there is no teacher gap to close. {shown}"
    value, low, high = (100 * each for each in closed[:3])
    said = f"the student closes {value:.0f} % of the teacher gap, 95 % interval {low:.0f} to {high:.0f}"
    said += f"{closed.note}. {shown}"
    if value >= ENOUGH:
        return said
    logged = run.log.get(metric_key(dataset, measure), {})  # of an interrupted run also of later batches
    first, before = max({0: untrained / 100, **{step: value for step, value in logged.items() if step < batch}}.items())
    gain = 100 * (student - 100 * before) / (teacher - untrained)
    more = "" if run.record["config"]["student"]["model"] else "more teacher.first_blocks or "  # timm's has its own
    tried = "longer training" if gain >= RISING else f"{more}smaller batches for the same number of samples"
    return f"{said} To keep more, try {tried}: the last {batch - first} batches closed {gain:.0f} %."

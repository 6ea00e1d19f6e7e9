"""Answer whether a student is worth it: what it keeps of its teacher, what it costs, and what to try next."""

from collections.abc import Iterator

from d2v_composer.evaluation.evaluate import gap_closed_interval
from d2v_composer.evaluation.metrics import AGREEMENT, TEACHER, UNTRAINED, Measure, metric_key, retrieval_from
from d2v_composer.models.names import embedding_name
from d2v_composer.report.run import Run

# In % of the teacher gap: a student that closes less gets advice; to train longer, if so much of it came last.
ENOUGH, RISING = 90, 2
COSTS = (("M parameters", "num_parameters", 1e-6), ("MB in float32", "num_parameters", 4e-6), ("GFLOP", "gflop", 1))


def answer(run: Run) -> Iterator[str]:
    """Yield the verdict on each data set on which the untrained student, the student and its teacher were measured.

    It is about retrieval or, without labels, about the neighbor agreement with the teacher.
    """
    for dataset in run.retrieval["datasets"]:
        for measure in (retrieval_from("train", min(run.retrieval["ks"])), AGREEMENT):
            keys = [metric_key(dataset, measure, baseline=name) for name in (UNTRAINED, "", TEACHER)]
            if keys[1] in run.log and run.hits.keys() >= {*keys}:
                yield f"On {dataset}, {_kept(run, measure, keys)}"
                break


def _kept(run: Run, measure: Measure, keys: list[str]) -> str:
    hits = [run.hits[key].numpy() for key in keys]
    untrained, student, teacher = (100 * float(each.mean()) for each in hits)
    embedding = embedding_name(run.retrieval["representation"], run.retrieval["pooling"])
    shown = f"The student scores {student:.1f} % ({measure.heading}, {embedding}); untrained it scored "
    shown += f"{untrained:.1f} %, and its teacher scores {teacher:.1f} %."
    costs = run.record["costs"]
    sizes = [
        f"{scale * costs['student'][key]:.2f} {name} (teacher: {scale * costs[TEACHER][key]:.2f})"
        for name, key, scale in COSTS
    ]
    shown += f" It has {', '.join(sizes)}."
    if (closed := gap_closed_interval(*hits)) is None:
        return f"there is no teacher gap to close. {shown}"
    value, low, high = (100 * each for each in closed)
    said = f"the student closes {value:.0f} % of the teacher gap, 95 % interval {low:.0f} to {high:.0f}. {shown}"
    if value >= ENOUGH:
        return said
    (first, before), (last, after) = sorted(({0: untrained / 100} | {**run.log[keys[1]]}).items())[-2:]
    gain = 1e4 * (after - before) / (teacher - untrained)
    more = "" if run.record["config"]["student"]["model"] else "more teacher.first_blocks or "  # timm's has its own
    tried = "longer training" if gain >= RISING else f"{more}smaller batches for the same number of samples"
    return f"{said} To keep more, try {tried}: the last {last - first} batches closed {gain:.0f} %."

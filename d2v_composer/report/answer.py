"""Answer whether a student is worth it: what it keeps of its teacher, what it costs, and what to try next."""

from collections.abc import Mapping

from d2v_composer.evaluation.evaluate import accuracy_interval, gap_closed_by_step, gap_closed_interval
from d2v_composer.evaluation.metrics import (
    AGREEMENT,
    TEACHER,
    UNTRAINED,
    Measure,
    metric_key,
    read_accuracies,
    retrieval_from,
)
from d2v_composer.report.run import Run

# A student that keeps less gets advice: to train longer, if it gained at least this much between its last measurements.
ENOUGH, RISING = 0.9, 0.02


def answer(run: Run) -> str:
    """Return a sentence for each data set on which the student was measured before training, too, and its teacher.

    It is about the teacher gap closed or, without labels, about the neighbor agreement with the teacher.
    """
    ks, sentences = run.retrieval.get("ks", [1]), []
    for dataset in run.retrieval["datasets"]:
        for measure in (retrieval_from("train", min(ks)), AGREEMENT):
            keys = [metric_key(dataset, measure, baseline=name) for name in (UNTRAINED, "", TEACHER)]
            if run.hits.keys() >= {*keys}:
                sentences.append(_answer(run, dataset, measure, keys))
                break
    return "\n".join(sentences)


def _answer(run: Run, dataset: str, measure: Measure, keys: list[str]) -> str:
    hits = [run.hits[key].numpy() for key in keys]
    before, _, best = (f"{100 * each.mean():.1f} %" for each in hits)
    about = "{}, {representation}_{pooling}".format(measure.heading, **run.retrieval)
    if measure == AGREEMENT:
        kept, curve = accuracy_interval(hits[1]), read_accuracies(run.log, dataset, measure)
        said, about = "finds {} of the neighbors that its teacher finds", f"{about}, untrained {before}"
    else:
        kept, curve = gap_closed_interval(*hits), gap_closed_by_step(run.log, dataset, "", measure.k or 1)
        said = "closes {} of the gap from untrained to its teacher"
    if kept is None:
        said, advice = f"has no gap to close: untrained {before}, teacher {best}", ""
    else:
        said = said.format("{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * each for each in kept)))
        about, advice = f"{about}, 95 % interval", "" if kept.value >= ENOUGH else _advice(run, curve)
    return f"On {dataset}, the student {said} ({about}){_costs(run)}{advice}."


def _costs(run: Run) -> str:
    """Say what the student takes at inference, and its teacher in parentheses; '' if the record is an older one."""
    if (costs := run.record.get("costs")) is None:
        return ""
    (millions, gflop), (of_teacher, gflop_of_teacher) = (
        (costs[name]["num_parameters"] / 1e6, costs[name]["gflop"]) for name in ("student", TEACHER)
    )
    return (
        f", with {millions:.2f} M parameters (teacher {of_teacher:.2f}), {4 * millions:.1f} MB in float32 "
        f"({4 * of_teacher:.1f}) and {gflop:.2f} GFLOP ({gflop_of_teacher:.2f})"
    )


def _advice(run: Run, curve: Mapping[int, float]) -> str:
    """Say what to try next, by the curve's slope; ``yamls/ablations`` has measured what helps."""
    if len(steps := sorted(curve)[-2:]) < 2:
        return ""
    first, last = steps
    gain = curve[last] - curve[first]
    shares = run.record["config"]["student"].get("model") is None  # a timm model has its own first blocks
    others = f"{'more teacher.first_blocks or ' * shares}smaller batches of as many samples in all"
    tried, still = ("train longer", "still ") if gain >= RISING else (f"try {others}", "")
    return f"; to keep more, {tried}: the last {last - first} batches {still}added {100 * gain:.1f} points"

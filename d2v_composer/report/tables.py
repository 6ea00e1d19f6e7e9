"""Format the results of a training and of an evaluation as text."""

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING

from d2v_composer.evaluation.bootstrap import Interval, share_recovered
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.metric_names import Measure, metric_key
from d2v_composer.evaluation.text_table import format_table

if TYPE_CHECKING:  # an evaluation prints tables without Composer, which takes seconds to import
    from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval

__all__ = ["PROBE_HEADS", "evaluation_tables", "retrieval_table"]

PROBE_HEADS = {"knn": "20-NN weighted", "knn_majority": "20-NN majority", "linear": "linear probe"}


def retrieval_table(retrieval: "ZeroShotRetrieval") -> str:
    """Return a table per data set with the headline accuracies of references and student, and the share recovered.

    The student before training is included if the run measured it (``retrieval.at_start``).
    """
    return "\n\n".join(_dataset_table(retrieval, dataset) for dataset in retrieval.datasets)


def _dataset_table(retrieval: "ZeroShotRetrieval", dataset: str) -> str:
    columns = retrieval.measures
    first, last, references = retrieval.history[0], retrieval.history[-1], retrieval.reference_metrics
    measured = {
        **{name: (references, name) for name in retrieval.references or {} if name != "teacher"},
        "student before": (first["metrics"] if first["batch"] == 0 else {}, None),
        "student after": (last["metrics"], None),
        "teacher": (references, "teacher"),
    }
    rows: dict[str, list[float]] = {}
    for name, (metrics, reference) in measured.items():
        keys = [metric_key(dataset, bank, measure, reference=reference) for bank, measure in columns]
        if all(key in metrics for key in keys):  # a resume may ask for another set, k or probe
            rows[name] = [metrics[key] for key in keys]

    head = _head(columns)
    title = f"Zero-shot retrieval on {dataset}, {retrieval.headline}, batch {last['batch']}, accuracy in %"
    cells = [[name, *(f"{100 * value:.1f}" for value in row)] for name, row in rows.items()]
    lines = [title, format_table(head, cells)]
    if {"student before", "student after", "teacher"} <= rows.keys():
        share = share_recovered(rows["student before"][0], rows["student after"][0], rows["teacher"][0])
        what = f"of the teacher's advantage over the untrained student ({head[1]})"
        lines.append(f"none {what}: the teacher has none" if share is None else f"{100 * share:.0f} % {what} recovered")
    return "\n".join(lines)


def evaluation_tables(evaluation: Evaluation) -> str:
    """Return accuracies with their intervals, the share recovered, the accuracy of each class, and costs."""
    parts = []
    looked_up = [(bank, measure) for bank, measure in evaluation.measures if isinstance(measure, int)]
    probed = [column for column in evaluation.measures if column not in looked_up]
    for dataset in evaluation.datasets:
        parts.append(_accuracy_table(evaluation, dataset, "Zero-shot retrieval", looked_up))
        if probed:
            parts.append(_accuracy_table(evaluation, dataset, "Probes fitted to train, judged on test", probed))
        parts.append(_class_table(evaluation, dataset))
    images_per_second = {each.candidate: each.images_per_second for each in reversed(evaluation.retrievals)}
    costs = [
        [name, f"{num_parameters / 1e6:.2f}", f"{gflop:.2f}", f"{images_per_second[name]:.0f}"]
        for name, _, num_parameters, gflop in evaluation.candidates
    ]
    return "\n\n".join([*parts, format_table(["", "M parameters", "GFLOP/image", "images/s"], costs)])


def _accuracy_table(evaluation: Evaluation, dataset: str, what: str, columns: Sequence[tuple[str, Measure]]) -> str:
    headlines, head = evaluation.headlines, _head(columns)
    rows = [
        [name, *(_percent(headlines[name, dataset, bank].accuracy(measure)) for bank, measure in columns)]
        for name in (candidate.name for candidate in evaluation.candidates)
    ]
    if ("train", "linear") in columns:
        head.append("L2 strength")
        for row in rows:
            row.append(f"{headlines[row[0], dataset, 'train'].strength:g}")
    shares = [evaluation.share_recovered(dataset, bank, measure) for bank, measure in columns]
    if any(shares):
        rows.append(["share recovered", *("–" if share is None else _percent(share) for share in shares)])
    title = f"{what} on {dataset}, {evaluation.headline}, accuracy in % [95 % interval]"
    return f"{title}\n{format_table(head, rows)}"


def _class_table(evaluation: Evaluation, dataset: str) -> str:
    """Return the student's (or teacher's) top-1 of each class, and the class it is most often confused with."""
    headlines = evaluation.headlines
    name = "student" if ("student", dataset, "train") in headlines else "teacher"
    found = headlines[name, dataset, "train"]
    rows = []
    for label, accuracy in enumerate(found.class_accuracy):
        others = found.confusion[label].copy()
        others[label] = 0
        confused_with = evaluation.class_name(dataset, int(others.argmax())) if others.any() else "–"
        percent = "–" if isnan(accuracy) else f"{100 * accuracy:.1f}"
        rows.append([evaluation.class_name(dataset, label), percent, confused_with])
    title = f"{name}, bank train, top-1 in % of each class, and the class it is most often confused with"
    return f"{title}\n{format_table(['', 'top-1', 'confused with'], rows)}"


def _head(columns: Sequence[tuple[str, Measure]]) -> list[str]:
    names = [PROBE_HEADS[each] if isinstance(each, str) else f"bank {bank} top-{each}" for bank, each in columns]
    return ["", *names]


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

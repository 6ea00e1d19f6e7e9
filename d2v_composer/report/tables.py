"""Results as text."""

from collections.abc import Iterator, Mapping, Sequence

from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.evaluation.bootstrap import Interval, share_recovered
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.metric_names import BANKS, metric_key

__all__ = ["evaluation_tables", "retrieval_table"]


def retrieval_table(retrieval: ZeroShotRetrieval) -> str:
    """The headline accuracies of references and student, a table per data set, and the share recovered.

    The student before training is there where the run measured it (``retrieval.at_start``).
    """
    return "\n\n".join(_dataset_table(retrieval, dataset) for dataset in retrieval.datasets)


def _dataset_table(retrieval: ZeroShotRetrieval, dataset: str) -> str:
    columns = [(bank, k) for bank in BANKS for k in retrieval.ks]
    first, last = retrieval.history[0], retrieval.history[-1]
    others = [reference for reference in retrieval.references or {} if reference != "teacher"]
    rows = {reference: _row(retrieval.reference_metrics, dataset, columns, reference) for reference in others}
    if first["batch"] == 0:
        rows["student before"] = _row(first["metrics"], dataset, columns)
    rows["student after"] = _row(last["metrics"], dataset, columns)
    rows["teacher"] = _row(retrieval.reference_metrics, dataset, columns, "teacher")
    rows = {label: row for label, row in rows.items() if row}

    heads = [f"bank {bank} top-{k}" for bank, k in columns]
    lines = [
        f"Zero-shot retrieval on {dataset}, {retrieval.headline}, batch {last['batch']}, accuracy in %",
        *_aligned(heads, {label: [f"{100 * value:.1f}" for value in row] for label, row in rows.items()}),
    ]
    if {"student before", "student after", "teacher"} <= rows.keys():
        share = share_recovered(rows["student before"][0], rows["student after"][0], rows["teacher"][0])
        what = f"of the teacher's advantage over the untrained student ({heads[0]})"
        lines.append(f"none {what}: the teacher has none" if share is None else f"{100 * share:.0f} % {what} recovered")
    return "\n".join(lines)


def _row(
    metrics: Mapping[str, float], dataset: str, columns: Sequence[tuple[str, int]], reference: str | None = None
) -> list[float]:
    """The accuracies of a row; none where they were not measured (a resume may ask for another set or k)."""
    keys = [metric_key(dataset, bank, k, reference=reference) for bank, k in columns]
    return [metrics[key] for key in keys] if all(key in metrics for key in keys) else []


def evaluation_tables(evaluation: Evaluation) -> str:
    """Accuracies with their intervals, the share recovered, each class's accuracy, and costs."""
    columns = [(bank, k) for bank in BANKS for k in evaluation.ks]
    heads = [f"bank {bank} top-{k}" for bank, k in columns]
    parts = []
    for dataset in dict.fromkeys(each.dataset for each in evaluation.retrievals):
        rows = {}
        for candidate in evaluation.candidates:
            found = {bank: evaluation.find(candidate.name, dataset, bank) for bank in BANKS}
            intervals = [each.accuracy(k) for bank, k in columns if (each := found[bank]) is not None]
            rows[candidate.name] = [_percent(interval) for interval in intervals]
        title = f"Zero-shot retrieval on {dataset}, {evaluation.headline}, accuracy in % [95 % interval]"
        shares = [evaluation.share_recovered(dataset, bank, k) for bank, k in columns]
        if any(shares):
            rows["share recovered"] = ["–" if share is None else _percent(share) for share in shares]
        parts.append("\n".join([title, *_aligned(heads, rows)]))
        parts.append("\n".join(_class_table(evaluation, dataset)))
    costs = {
        candidate.name: [
            f"{candidate.num_parameters / 1e6:.2f}",
            f"{candidate.gflop_per_image:.2f}",
            f"{next(each.images_per_second for each in evaluation.retrievals if each.candidate == candidate.name):.0f}",
        ]
        for candidate in evaluation.candidates
    }
    parts.append("\n".join(_aligned(["M parameters", "GFLOP/image", "images/s"], costs)))
    return "\n\n".join(parts)


def _class_table(evaluation: Evaluation, dataset: str) -> Iterator[str]:
    """The last student's or teacher's top-1 of each class, and what it is most often taken for."""
    name = "student" if evaluation.find("student", dataset, "train") else "teacher"
    found = evaluation.find(name, dataset, "train")
    assert found is not None
    yield f"{name}, bank train, top-1 in % of each class, and the class that its other queries find most"
    for label, accuracy in enumerate(found.class_accuracy):
        others = found.confusion[label].copy()
        others[label] = 0
        yield f"{label:5}  {100 * accuracy:5.1f}  {others.argmax():5}"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _aligned(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines with labels on the left, cells on the right of their columns."""
    label_width = max(map(len, rows), default=0)
    widths = [max(map(len, [head, *(row[i] for row in rows.values() if row)])) for i, head in enumerate(heads)]
    lines = [" ".join([" " * label_width, *(head.rjust(width) for head, width in zip(heads, widths, strict=True))])]
    for label, row in rows.items():
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" ".join([label.ljust(label_width), *cells]))
    return lines

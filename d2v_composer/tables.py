"""Results as text."""

from collections.abc import Mapping, Sequence

from d2v_composer.callbacks.zero_shot_retrieval import BANKS, ZeroShotRetrieval, metric_key

__all__ = ["retrieval_table", "share_recovered"]


def share_recovered(before: float, after: float, teacher: float) -> float | None:
    """The part of the teacher's advantage over the untrained student that training recovered, 1 for all of it."""
    return None if teacher <= before else (after - before) / (teacher - before)


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

    width = max(map(len, rows), default=0)
    heads = [f"bank {bank} top-{k}" for bank, k in columns]
    lines = [
        f"Zero-shot retrieval on {dataset}, {retrieval.headline}, batch {last['batch']}, accuracy in %",
        " ".join([" " * width, *heads]),
    ]
    for label, row in rows.items():
        cells = [f"{100 * value:.1f}".rjust(len(head)) for value, head in zip(row, heads, strict=True)]
        lines.append(" ".join([label.ljust(width), *cells]))
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

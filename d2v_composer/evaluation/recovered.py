"""The share of the teacher's advantage that a student recovers in the course of its run."""

from collections.abc import Mapping
from statistics import mean

from d2v_composer.evaluation.bootstrap import share_recovered
from d2v_composer.evaluation.metric_names import BANKS, metric_key

__all__ = ["recovered_shares"]

Log = Mapping[str, Mapping[int, float]]


def recovered_shares(
    log: Log, dataset: str, embedding: str, k: int = 1, references: Log | None = None
) -> dict[int, float]:
    """Return step → share of the teacher's advantage over the untrained student.

    It is the mean of both banks, or of the one with which the teacher has an advantage.

    Args:
        log: Key → step → value, of the student's run.
        dataset: Name of the labelled set.
        embedding: Of student and teacher alike.
        k: Of top-k.
        references: The log with the untrained student (``retrieval.at_start``) and the teacher
            (``retrieval.references``); default ``log``.

    Returns:
        Empty if either is missing, or the teacher has no advantage at all.
    """
    references = log if references is None else references
    by_bank = [_shares_of(log, references, dataset, embedding, k, bank) for bank in BANKS]
    steps = sorted({step for shares in by_bank for step in shares})
    return {step: mean(shares[step] for shares in by_bank if step in shares) for step in steps}


def _shares_of(log: Log, references: Log, dataset: str, embedding: str, k: int, bank: str) -> dict[int, float]:
    """Return step → share with one bank."""
    key = metric_key(dataset, bank, k, embedding)
    teacher = references.get(metric_key(dataset, bank, k, embedding, "teacher"), {})
    untrained = references.get(key, {}).get(0)
    if untrained is None or not teacher:
        return {}
    shares = {
        step: share_recovered(untrained, accuracy, teacher[max(teacher)]) for step, accuracy in log.get(key, {}).items()
    }
    return {step: share for step, share in shares.items() if share is not None}

"""Read a run's log of metrics, a file of JSON lines."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from operator import index
from pathlib import Path

# Logged below health/ as 0 or 1 → what the report says about 1.
HEALTH_STATES = {
    "collapse": "the prediction was nearly the same for all samples of a batch",
    "dead": "the prediction was no better than a constant",
    "diverging": "the loss rose far above its lowest mean",
    "non_finite": "the loss, the prediction or the target was infinite or NaN",
    "scaler_skips": "the loss scale fell",
}
Log = Mapping[str, Mapping[int, float]]
"""Key → step → value."""


def read_lines(path: Path) -> list[tuple[bytes, int, dict[str, float]]]:
    """Return each line of a log as bytes, with its step and its values by key; skip corrupt lines with a warning."""
    lines, entries = path.read_bytes().splitlines(), []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            entry = json.loads(line)
            entries.append((line, index(entry.pop("step")), {key: float(value) for key, value in entry.items()}))
    if num_corrupt := len(lines) - len(entries):
        logging.getLogger(__name__).warning("%s: skipped corrupt lines: %d of %d", path, num_corrupt, len(lines))
    return entries


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """Read a log as key → step → value; of several values for one key and step, the last one counts."""
    series: dict[str, dict[int, float]] = {}
    for _, step, values in read_lines(path):
        for key, value in values.items():
            series.setdefault(key, {})[step] = value
    return series

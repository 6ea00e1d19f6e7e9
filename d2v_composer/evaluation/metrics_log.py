"""Read the metrics that a run logged as JSON lines."""

import json
import logging
from pathlib import Path
from typing import Any

__all__ = ["read_jsonl"]

LARGEST_STEP = 1 << 40

log = logging.getLogger(__name__)


def read_jsonl(path: Path) -> dict[str, dict[int, float]]:
    """Read a log as key → step → value; of a step that a restart logged again, the later value.

    Corrupt lines, such as one truncated by a kill, are skipped with a warning.
    """
    series: dict[str, dict[int, float]] = {}
    lines = path.read_bytes().splitlines()
    num_corrupt = 0
    for line in lines:
        entry = _parse_line(line)
        if entry is None:
            num_corrupt += 1
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            series.setdefault(key, {})[step] = value
    if num_corrupt:
        log.warning("%s: skipped %d of %d lines: corrupt", path, num_corrupt, len(lines))
    return series


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the step and the numbers by name; ``None`` for any other line."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(_is_number(value) for value in entry.values()):
        return None
    step = entry.get("step")
    return entry if isinstance(step, int) and 0 <= step <= LARGEST_STEP else None


def _is_number(value: Any) -> bool:
    """Tell whether a plot can show the value; Python parses integers of any size, and NaN."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)

"""The table of a preflight: one row a check, printed as soon as it is known."""

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from d2v_composer.system.retry import reason

__all__ = ["Check", "Table"]

ValueT = TypeVar("ValueT")
NAME_WIDTH, VERDICT_WIDTH = 14, 7

log = logging.getLogger(__name__)


class Check(NamedTuple):
    """One row."""

    name: str
    verdict: str
    """``ok``, ``FAILED``, or ``skipped`` where an earlier failure leaves nothing to look at."""
    found: str
    remedy: str = ""
    """What to do, for a check that failed."""

    def __str__(self) -> str:
        row = f"{self.name:{NAME_WIDTH}} {self.verdict:{VERDICT_WIDTH}} {self.found}"
        return row if not self.remedy else f"{row}\n{'':{NAME_WIDTH + VERDICT_WIDTH + 1}} to do: {self.remedy}"


class Table:
    """Rows of checks, in the order in which they were made."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        print(f"{'check':{NAME_WIDTH}} verdict found", flush=True)

    @property
    def failed(self) -> set[str]:
        """The names of the checks that failed."""
        return {check.name for check in self.checks if check.verdict == "FAILED"}

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(check, flush=True)

    def check(self, name: str, remedy: str, look: Callable[[], tuple[str, ValueT]]) -> ValueT | None:
        """Make one check and add its row.

        Args:
            name: Of the row.
            remedy: What to do where it fails.
            look: Returns what was found, in words and as a value; raises where the run would fail.

        Returns:
            The value, or ``None`` where the check failed.
        """
        try:
            found, value = look()
        except Exception as error:  # the run would meet it as well
            log.debug("%s", name, exc_info=True)
            self.add(Check(name, "FAILED", reason(error), remedy))
            return None
        self.add(Check(name, "ok", found))
        return value

    def skip(self, name: str, because: str) -> None:
        """Add the row of a check that cannot be made."""
        self.add(Check(name, "skipped", because))

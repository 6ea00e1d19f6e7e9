"""Format rows as a table of plain text or Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

__all__ = ["format_table"]


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """Return a table whose first column is aligned left and whose other columns are aligned right.

    Args:
        head: The name of each column.
        rows: The cells of each row; missing ones are empty.
        markdown: Draw the lines of a Markdown table.
    """
    cells = list(rows)
    return tabulate(
        cells,
        head,
        tablefmt="github" if markdown else "plain",
        stralign="right",
        colalign=("left",) if cells else None,  # tabulate fails without rows
        disable_numparse=True,
    )

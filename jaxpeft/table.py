"""Rows of text as an aligned table."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, every column as wide as its widest cell.

    Example:
        >>> table([("site", "how"), ("up/kernel", "fused")])
        ['site       how', 'up/kernel  fused']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

"""Rows of text as a table: aligned lines, or HTML for notebooks."""

import html
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, every column as wide as its widest cell.

    Examples:
        >>> table([("site", "how"), ("up/kernel", "fused")])
        ['site       how', 'up/kernel  fused']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def html_table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """The rows as an HTML table: the first is the header, and numbers are on the right.

    Examples:
        >>> print(html_table([("site", "rank"), ("up<kernel>", "2")], "one site"))
        <table><caption>one site</caption>
        <tr><th style="text-align: left">site</th><th style="text-align: left">rank</th></tr>
        <tr><td style="text-align: left">up&lt;kernel&gt;</td><td style="text-align: right">2</td></tr>
        </table>
    """

    def cell(tag: str, text: str) -> str:
        side = "right" if text[:1].isdigit() else "left"
        return f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'

    lines = [f"<table><caption>{html.escape(caption)}</caption>"]
    for number, row in enumerate(rows):
        lines.append(f"<tr>{''.join(cell('td' if number else 'th', text) for text in row)}</tr>")
    return "\n".join([*lines, "</table>"])

"""Pieces of HTML: escaped text, links to names, and tables whose columns say what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from html import escape
import itertools
import re
from urllib.parse import quote

from adamw_xla.hlo import size

NOTHING = '<td class="n"></td>'


def address(*, kernel: str = "", line: str = "", collective: str = "", file: str = "") -> str:
    """Where a kernel, its line of HLO or a collective stands: ``#kernel=fusion.12``."""
    kind = "kernel" if kernel else "hlo" if line else "collective"
    return f"{quote(file)}#{kind}={quote(kernel or line or collective)}"


def link(to: str, text: str) -> str:
    """A link with ``text``, which is not HTML yet."""
    return f'<a href="{escape(to)}">{escape(text)}</a>'


# ----------------------------------------------------------------------------------- cells


def words(text: str) -> str:
    """A cell of a few words."""
    return f"<td>{escape(text)}</td>"


def scrolled(html: str) -> str:
    """A cell for what may be long: it scrolls inside of itself, and never the page."""
    return f'<td class="s"><div>{html}</div></td>' if html else "<td></td>"


def number(value: float | None, text: str | None = None, title: str = "") -> str:
    """A cell of a number, sorted by it; empty for None."""
    if value is None:
        return NOTHING
    about = f' title="{escape(title)}"' if title else ""
    shown = f"{value:,}" if text is None else text
    return f'<td class="n" data-v="{value:.12g}"{about}>{escape(shown)}</td>'


def sized(number_of_bytes: int, is_least: bool = False) -> str:
    """A cell of bytes, short, with the exact number behind it; empty for nothing.

    Where the number is a lower bound, ``>`` stands before it.
    """
    if not number_of_bytes:
        return '<td class="n" data-v="0"></td>'
    sign = ">" * is_least
    shown, exact = f"{sign}{size(number_of_bytes)}", f"{sign}{number_of_bytes:,} bytes"
    return number(number_of_bytes, shown, exact)


def share(part: float, largest: float, kind: str) -> str:
    """A cell with a bar, as long as the column where ``part`` is the ``largest``."""
    if part <= 0:
        return '<td class="b" data-v="0"></td>'
    width = 100 * part / largest
    text = f"{part:.1%}" if part >= 0.0005 else "<0.1%"
    return (
        f'<td class="b {kind}" data-v="{part:.6g}"><i style="width:{width:.2g}%"></i>'
        f"<span>{escape(text)}</span></td>"
    )


# ---------------------------------------------------------------------------------- tables


WIDTHS = {"": 90, "n": 72, "s": 190, "b": 130}
"""Of columns of each kind, in pixels where there is room; else in proportion."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
      head: its title.
      about: what it means, where that takes a sentence.
      kind: of its cells: words (""), numbers ("n"), names that scroll ("s") or bars ("b").
      group: a title above it and its neighbours of the same.
      width: as of ``WIDTHS``; 0: that of its kind.
    """

    head: str
    about: str = ""
    kind: str = ""
    group: str = ""
    width: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """Cells, as the functions above make them, and attributes of their row."""

    cells: Sequence[str]
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def table(
    name: str, columns: Sequence[Column], rows: Sequence[Row], foot: Row | None = None
) -> str:
    """A table that the script can sort; columns that say nothing are left out.

    Args:
      name: its id is ``NAME-table``.
      columns: all that there may be.
      rows: with a cell for each.
      foot: what they come to, and is not sorted.
    """
    kept = [i for i in range(len(columns)) if not all(_EMPTY.match(row.cells[i]) for row in rows)]
    shown = [columns[i] for i in kept]
    total = sum(column.width or WIDTHS[column.kind] for column in shown)
    widths = (f"{100 * (c.width or WIDTHS[c.kind]) / total:.2f}%" for c in shown)
    cols = "".join(f'<col style="width:{width}">' for width in widths)
    body = "\n".join(_row(row, kept, shown) for row in rows)
    end = f"<tfoot>{_row(foot, kept, shown)}</tfoot>" if foot is not None else ""
    return (
        f'<table id="{name}-table"><colgroup>{cols}</colgroup><thead>{_groups(shown)}'
        f"<tr>{''.join(map(_head, shown))}</tr></thead><tbody>\n{body}\n</tbody>{end}</table>"
    )


_EMPTY = re.compile(r"<td[^>]*></td>$")


def _groups(columns: Sequence[Column]) -> str:
    if not any(column.group for column in columns):
        return ""
    found = itertools.groupby(columns, key=lambda column: column.group)
    heads = (
        f'<th scope="colgroup" colspan="{len(list(members))}">{escape(group)}</th>'
        for group, members in found
    )
    return f'<tr class="groups">{"".join(heads)}</tr>'


def _head(column: Column) -> str:
    about = f' title="{escape(column.about)}"' if column.about else ""
    kind = f' class="{column.kind}"' if column.kind else ""
    kind += f' data-g="{escape(column.group)}"' if column.group else ""
    return f'<th scope="col"{kind}{about}>{escape(column.head)}</th>'


def _row(row: Row, kept: Sequence[int], columns: Sequence[Column]) -> str:
    attributes = "".join(f' {key}="{escape(value)}"' for key, value in row.attributes.items())
    cells = (_titled(row.cells[i], column) for i, column in zip(kept, columns, strict=True))
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def _titled(cell: str, column: Column) -> str:
    """A cell that knows its title, for where rows are cards: on a phone."""
    if _EMPTY.match(cell):
        return cell
    title = escape(f"{column.group} {column.head}".strip())
    return f'<td data-l="{title}"{cell.removeprefix("<td")}'

"""The page of a program: figures, the map of its params, and tables of all that it launches."""

from __future__ import annotations

from html import escape
from pathlib import Path

from inspection import tables
from inspection.inspect_cases import Inspected
from inspection.page import leaf_map, listings
from inspection.page.markup import address, link

import adamw_xla as ax

_BESIDE = Path(__file__).parent
_NOTHING_FROM_ELSEWHERE = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def page(x: Inspected) -> str:
    """The whole page; it needs nothing from elsewhere."""
    report = x.report
    found = {
        "params": ("Params", _params(x)),
        "collectives": ("Collectives", listings.collectives(x) if report.collectives else ""),
        "kernels": ("Kernels", listings.kernels(x)),
        "arguments": ("Arguments", listings.arguments(x)),
        "hlo": ("Optimized HLO", _hlo(x)),
    }
    shown = {name: section for name, section in found.items() if section[1]}
    places = "".join(link(f"#{name}", title) for name, (title, _) in shown.items())
    title = f"{x.name} on {x.target}"
    head = f"<h1>{escape(x.name)} <small>on {escape(x.target)}</small></h1>{_lede(x)}"
    body = "".join(section(name, *content) for name, content in shown.items())
    words = f'<pre class="wrapped">{escape(str(report))}</pre>'
    words = f"<details><summary>In words</summary>{words}</details>"
    return whole(title, f"{head}<nav>{places}</nav>{_figures(x)}{_lost(x)}{words}{body}")


def stem(x: Inspected) -> str:
    """What the files of a program are called, without their endings."""
    return f"{x.target}.{x.name}".replace(":", ".")


def section(name: str, title: str, content: str) -> str:
    """A part of the page, that can be gone to."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'


def whole(title: str, body: str) -> str:
    """A document with style and script in it."""
    style = (_BESIDE / "page.css").read_text(encoding="utf-8") + leaf_map.STYLE
    script = (_BESIDE / "page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_FROM_ELSEWHERE}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>\n"
        f"{body}\n<script>\n{script}</script></body></html>\n"
    )


def bound(x: Inspected) -> str:
    """What the least times are, in a sentence."""
    device = x.target.partition(":")[0]
    if device not in ax.hlo.BANDWIDTHS:
        return f"No bandwidth is known of {device}, so no least times."
    known = ax.hlo.BANDWIDTHS[device]
    rate = f"{known.bytes_per_second / 1e9:,.0f} GB/s"
    return f"Times are lower bounds: bytes over {rate} ({known.source})."


# ---------------------------------------------------------------------------------- its parts


def _lede(x: Inspected) -> str:
    report = x.report
    said = "Compiled, not run: all figures are read from the optimized HLO."
    if report.devices > 1:
        said += f" They are of each of {report.devices} devices."
    return f"<p>{escape(f'{said} {bound(x)}')}</p>"


def _figures(x: Inspected) -> str:
    found, kinds = [], ""
    for label, (text, *_) in tables.rows([x]).items():
        lines = (line.replace(" ", "\N{NO-BREAK SPACE}") for line in text.splitlines())
        name, shown = escape(label), escape(", ".join(lines))
        if label == "by kind":
            kinds = f'<div class="long"><dt>{name}</dt><dd>{shown}</dd></div>'
        elif text:
            found.append(f"<div><dt>{name}</dt><dd>{shown}</dd></div>")
    return f'<dl class="figures">{"".join(found)}{kinds}</dl>'


def _lost(x: Inspected) -> str:
    """Donated in vain: what a reader must not overlook."""
    if not x.report.undonated:
        return ""
    names = ", ".join(i.name or f"parameter {i.number}" for i in x.report.undonated[:8])
    more = len(x.report.undonated) - 8
    names += f" and {more} more" if more > 0 else ""
    return f'<p class="bad">Donated, and not updated in place: {escape(names)}.</p>'


def _params(x: Inspected) -> str:
    report = x.report
    if not report.leaves:
        return leaf_map.leaf_map(x)
    # On many devices what is cut counts once on each.
    params = "" if report.devices > 1 else f", {report.parameters:,} params"
    on = " on a device" if report.devices > 1 else ""
    text = (
        f"{len(report.leaves):,} leaves{params}. Areas are bytes{on}, of each param and its state; "
        "a leaf leads to its kernel."
    )
    skip = '<a class="skip" href="#kernels">Skip the map</a>'
    return (
        f'<p class="about">{escape(text)}</p>{skip}{leaf_map.leaf_map(x)}'
        f"<details><summary>All leaves</summary>{listings.leaves(x)}</details>"
    )


def _hlo(x: Inspected) -> str:
    lines = x.text.splitlines()
    named = listings.lines_of(x.report)
    text = "\n".join(_line(n, line, named) for n, line in enumerate(lines, start=1))
    about = f"{len(lines):,} lines, {ax.hlo.size(len(x.text))}"
    return f"<details><summary>{about}</summary><pre>{text}</pre></details>"


def _line(n: int, line: str, named: dict[int, str]) -> str:
    if n not in named:
        return escape(line, quote=False)
    name = named[n]
    return f'<a id="hlo={escape(name)}" href="{escape(address(line=name))}">{escape(line)}</a>'

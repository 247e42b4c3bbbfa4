"""A report as files: StableHLO, optimized HLO, and a page that links leaves to their kernels."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from inspection.inspect_cases import Inspected

from adamw_xla.hlo import Kernel, Leaf, Part

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #8884; padding: .2em .8em; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: 12px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; border: 1px solid #8884; padding: .5em; }
pre span { display: block; white-space: pre; }
pre span:target, tr:target { background: #fd08; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8bf; } }
"""


def write(inspected: Inspected, folder: Path) -> list[Path]:
    """Writes the three files, named after the target and whose step it is."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{inspected.target}.{inspected.name}".replace(":", ".")
    texts = {
        f"{stem}.stablehlo.mlir": inspected.program.stablehlo,
        f"{stem}.hlo": inspected.text,
        f"{stem}.html": page(inspected),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def page(inspected: Inspected) -> str:
    """The whole page; it needs nothing from elsewhere."""
    report = inspected.report
    title = escape(f"{inspected.name} on {inspected.target}")
    summary = escape(str(report).split("\n", 1)[1])
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            "<p>Compiled, not run: every figure is read from the optimized HLO below.</p>",
            f"<pre>{summary}</pre>",
            f"<h2>Leaves</h2>{_leaves(report.leaves, report.program)}",
            f"<h2>Kernels</h2>{_kernels(report.program, report.leaves)}",
            f"<h2>Arguments</h2>{_inputs(inspected)}",
            f"<h2>Optimized HLO</h2>{_hlo(inspected.text)}",
            "</body></html>",
        ]
    )


def _leaves(leaves: tuple[Leaf, ...], program: Part) -> str:
    known = {kernel.name: kernel for kernel in program.kernels}
    rows = []
    for leaf in leaves:
        landed = ", ".join(_kernel_link(known[name]) for name in leaf.kernels)
        cells = [escape(leaf.name), leaf.shape, f"{leaf.elements:,}", landed]
        rows.append([*cells, "yes" if leaf.in_place else "no"])
    return _table(["leaf", "shape", "params", "landed in", "in place"], rows, numbers={2})


def _kernels(program: Part, leaves: tuple[Leaf, ...]) -> str:
    landed = Counter(name for leaf in leaves for name in leaf.kernels)
    rows = []
    for kernel in program.kernels:
        row = [_line_link(kernel), kernel.kind, kernel.part, str(landed[kernel.name] or "")]
        row += [f"{kernel.read:,}", f"{kernel.written:,}"]
        row += ["?" if kernel.times is None else str(kernel.times)]
        row += ["" if kernel.estimated_cycles is None else f"{kernel.estimated_cycles:,}"]
        rows.append([*row, escape(kernel.op_name)])
    heads = ["kernel", "kind", "part", "leaves", "bytes read", "bytes written", "runs"]
    heads += ["cycles (the compiler's estimate)", "op_name"]
    ids = [f"k{kernel.line}" for kernel in program.kernels]
    return _table(heads, rows, numbers={3, 4, 5, 6, 7}, ids=ids)


def _inputs(inspected: Inspected) -> str:
    rows = []
    for x in inspected.report.inputs:
        reused = "" if x.output is None else f"output {x.output}" + " after a copy" * x.copied
        given = "?" if x.donated is None else "yes" if x.donated else "no"
        rows.append([escape(x.name or f"parameter {x.number}"), x.shape, f"{x.bytes:,}"])
        rows[-1] += [given, reused]
    heads = ["argument", "shape", "bytes", "donated", "its buffer becomes"]
    return _table(heads, rows, numbers={2})


def _hlo(text: str) -> str:
    lines = text.splitlines()
    spans = (f'<span id="l{n}">{escape(line)}</span>' for n, line in enumerate(lines, start=1))
    return f"<pre>{''.join(spans)}</pre>"


def _kernel_link(kernel: Kernel) -> str:
    return f'<a href="#k{kernel.line}"><code>{escape(kernel.name)}</code></a>'


def _line_link(kernel: Kernel) -> str:
    return f'<a href="#l{kernel.line}"><code>{escape(kernel.name)}</code></a>'


def _table(
    heads: list[str], rows: list[list[str]], numbers: set[int], ids: list[str] | None = None
) -> str:
    def cells(tag: str, row: list[str]) -> str:
        marks = (' class="n"' if i in numbers else "" for i in range(len(row)))
        return "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, row, strict=True))

    names = [f' id="{name}"' for name in ids] if ids else [""] * len(rows)
    body = (f"<tr{n}>{cells('td', row)}</tr>" for n, row in zip(names, rows, strict=True))
    return f"<table><tr>{cells('th', heads)}</tr>{''.join(body)}</table>"

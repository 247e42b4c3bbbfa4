"""The pages that ``inspect_hlo.py --dump`` writes: what is in them, without a browser."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
import re

from headless.parsed import Page
from headless.programs import (
    ODD,
    changed,
    on_devices,
    read,
    with_leaves,
    with_odd_names,
    without_update,
)
from inspection import tables
from inspection.page import comparison, document, files, listings, treemap
import pytest

import adamw_xla as ax

PARTS = ("update", "norm", "rest")


def test_rows_of_the_update_come_first() -> None:
    x = read("v5e.clip")
    page = Page(document.page(x))
    rows = [row["data-part"] for row in page.rows if "data-part" in row]
    assert len(rows) == len(x.report.program.kernels)
    assert rows == sorted(rows, key=PARTS.index)
    assert [rows.count(part) for part in PARTS[:2]] == [
        len(x.report.update.kernels),
        len(x.report.norm.kernels),
    ]


def test_anchors_are_names() -> None:
    for golden in ("cpu.train", "h100.train", "v5e.train"):
        x = read(golden)
        page = Page(document.page(x))
        assert {f"kernel={kernel.name}" for kernel in x.report.program.kernels} <= {*page.ids}
        assert not [name for name in page.ids if re.fullmatch(r"\w?\d+", name)]
        assert len({*page.ids}) == len(page.ids)
        assert page.dead_links == []


@pytest.mark.parametrize("count", [1, 4, 2000])
def test_many_leaves_or_one(count: int) -> None:
    x = with_leaves(read("v5e.step"), count)
    text = document.page(x)
    page = Page(text)
    assert page.dead_links == []
    assert text.count("<svg x=") >= 2 * count  # on wide screens, and on narrow ones
    assert {f"w{n}" for n in range(count)} <= {*re.findall(r"\['(w\d+)'\]", page.words)}
    assert "nan%" not in text


def test_what_sums_a_gradient_is_a_colour_of_its_leaf() -> None:
    x = on_devices(read("v5e.clip"))
    first, *rest = x.report.leaves
    x = changed(x, leaves=(dataclasses.replace(first, gradient_sums=("all-reduce.7",)), *rest))
    assert "all-reduce of the gradient, 1 leaf" in Page(document.page(x)).words


def test_loops_of_unknown_length_make_sums_lower_bounds() -> None:
    x = on_devices(read("v5e.clip"))
    gather, reduce = x.report.collectives
    x = changed(x, collectives=(gather, dataclasses.replace(reduce, times=None)))
    cells = tables.rows([x])
    assert {label: cells[label] for label in BOUNDS} == {k: [text] for k, text in BOUNDS.items()}
    figures = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", document.page(x))
    shown = {label: text.replace("\N{NO-BREAK SPACE}", " ") for label, text in figures}
    assert {label: shown[label] for label in BOUNDS} == {k: escape(x) for k, x in BOUNDS.items()}
    sums = re.findall(r">(&gt;[^<]*)</td>", listings.collectives(x))
    assert sums == ["&gt;64 B"] * 2 + ["&gt;4.16 kB", "&gt;64 B"]


BOUNDS = {
    "exchanged": ">4.16 kB",
    "of it by the update": "4 kB",
    "of it by the norm": ">64 B",
}


def test_odd_names_are_text() -> None:
    x = with_odd_names(read("cpu.train"))
    text = document.page(x)
    page = Page(text)
    assert page.dead_links == []
    assert "<b>" not in text
    assert all(leaf.name in page.words for leaf in x.report.leaves)


def test_a_program_without_params_has_no_map() -> None:
    for x in (without_update(read("v5e.train")), changed(read("cpu.step"), leaves=())):
        page = Page(document.page(x))
        assert "There is no map" in page.words
        assert page.dead_links == []
    nothing = changed(without_update(read("cpu.step")), program=ax.hlo.Part(()), inputs=())
    assert "The program launches nothing." in Page(document.page(nothing)).words


def test_a_leaf_without_elements_takes_no_room() -> None:
    assert treemap.tree(["params['a']", "params['b']"], [0, 8]).children[0].number == 1
    assert treemap.tree(["params['a']"], [0]).children == ()


SIZES = {
    # Bruls, Huizing and van Wijk (2000), figure 3: 6, 6 | 4, 3 over it | 2, then 2 and 1.
    "of the paper": ([6, 6, 4, 3, 2, 2, 1], (6, 4)),
    "one": ([5], (10, 3)),
    "many": ([(7 * n) % 31 + 1 for n in range(2000)], (1344, 600)),
    "with nothing": ([3, 0, 1], (8, 2)),
    "far apart": ([1e12, 1, 1, 1], (420, 640)),
}


@pytest.mark.parametrize("case", SIZES)
def test_areas_are_sizes(case: str) -> None:
    sizes, (width, height) = SIZES[case]
    boxes = treemap.squarified(sizes, treemap.Box(2.0, 1.0, width, height))
    for number, box in zip(sizes, boxes, strict=True):
        area = number / sum(sizes) * width * height
        assert box.width * box.height == pytest.approx(area, rel=1e-6, abs=1e-9)
        assert 2 - 1e-6 <= box.x <= box.x + box.width <= 2 + width + 1e-6
        assert 1 - 1e-6 <= box.y <= box.y + box.height <= 1 + height + 1e-6
    if len(sizes) < 100:
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
                down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
                assert min(across, down) < 1e-6
    if case == "of the paper":
        shapes = [(round(box.width, 3), round(box.height, 3)) for box in boxes]
        assert shapes[:4] == [(3, 2), (3, 2), (1.714, 2.333), (1.286, 2.333)]


def test_paths_are_groups() -> None:
    assert treemap.parts("params['h.0.attn'][1].w") == ("params", "h", "0", "attn", "1", "w")
    for odd in (*ODD, "", "[", "a b", "x['"):
        assert "".join(treemap.parts(odd)) or not odd
    names = [f"params['h.{i}.{name}.w']" for i in (10, 2) for name in ("a", "b")]
    root = treemap.tree([*names, "params['wte']"], [1, 2, 3, 4, 5])
    assert (root.name, root.size) == ("params", 15)
    layers, embedding = root.children
    assert (layers.name, layers.size, embedding.name) == ("h", 10, "wte")
    assert [(x.name, x.size) for x in layers.children] == [("2", 7), ("10", 3)]
    assert [x.name for x in layers.children[0].children] == ["a.w", "b.w"]


# --------------------------------------------------------------------------- two programs


def cells_by_row(text: str, table: str) -> dict[tuple[str, ...], tuple[bool, list[str]]]:
    """Of a table: the first cells of a row, whether it is marked, and the numbers of all."""
    inner = text.partition(f'<table id="{table}-table">')[2].partition("</table>")[0]
    found = {}
    for marks, row in re.findall(r"<tr([^>]*)>(<td.*?)</tr>", inner):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        words = tuple(re.sub("<[^>]*>", "", cell) for cell in cells)
        found[words[:3]] = ('class="differs"' in marks, list(words[3:]))
    return found


def test_what_differs_is_marked() -> None:
    old, new = read("v5e.step", "step"), read("v5e.clip", "clip")
    text = comparison.page([old, new])
    Page(text)
    figures = {words[0]: marked for words, (marked, _) in cells_by_row(text, "figures").items()}
    assert figures["kernels"]
    assert figures["moved"]
    assert not figures["params, on each"]
    assert not figures["compile"]
    rows = cells_by_row(text, "kernels")
    for part in PARTS:
        for x, at in ((old, 0), (new, 3)):
            counted = sum(
                int(row[at])
                for key, (_, row) in rows.items()
                if key[0] == part and row[at].isdecimal()
            )
            kernels = [k for k in x.report.program.kernels if (k.part or "rest") == part]
            assert counted == len(kernels), (part, x.name)
    assert any(marked for key, (marked, _) in rows.items() if key[0] == "norm")
    marks = [marked for marked, _ in rows.values()]
    assert marks == sorted(marks, reverse=True)
    same = comparison.page([old, dataclasses.replace(old, name="again")])
    assert 'class="differs"' not in same


def test_pages_of_one_target_stand_side_by_side(tmp_path: Path) -> None:
    found = [read("v5e.step", "a:b"), read("v5e.clip", "a:c"), read("cpu.step")]
    written = [path.name for path in files.write(found, tmp_path) if path.suffix == ".html"]
    assert written == ["v5e.a.b.html", "v5e.a.c.html", "cpu.adamw_xla.html", "v5e.compared.html"]
    page = Page((tmp_path / "v5e.compared.html").read_text())
    beside = {link.partition("#")[0] for link in page.links} - {""}
    assert beside == {"v5e.a.b.html", "v5e.a.c.html"}
    ids = {name: {*Page((tmp_path / name).read_text()).ids} for name in beside} | {"": page.ids}
    for link in page.links:
        name, _, anchor = link.partition("#")
        assert not anchor or anchor in ids[name], link

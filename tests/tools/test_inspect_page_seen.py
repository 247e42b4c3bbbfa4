"""The pages that ``inspect_hlo.py --dump`` writes, as a browser shows them.

``ADAMW_XLA_SCREENSHOTS=FOLDER`` writes pictures of them.
"""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import re
from urllib.parse import quote

from headless.browser import Browser, browser
from headless.programs import on_devices, read, with_odd_names
from inspection import tables
from inspection.page import comparison, document
import pytest

PAGES = ("one", "devices", "long", "two")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One program, one on devices, one with long names, and two side by side."""
    folder = tmp_path_factory.mktemp("pages")
    old, new = read("v5e.step", "step"), read("v5e.clip", "a_module_of_mine:a_function_in_it")
    texts = {
        "one": document.page(read("v5e.train")),
        "devices": document.page(on_devices(read("v5e.clip"))),
        "long": document.page(with_odd_names(read("v5e.train"))),
        "two": comparison.page([on_devices(old), on_devices(new)]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def column(chromium: Browser, head: str) -> list[str]:
    """The cells that are shown of a column of the kernels, by what they are sorted by."""
    script = """
        const table = document.querySelector("#kernels-table");
        const heads = [...table.tHead.rows].at(-1).cells;
        const at = [...heads].findIndex((head) => head.textContent === arguments[0]);
        return [...table.tBodies[0].rows].filter((row) => !row.hidden)
          .map((row) => row.cells[at].dataset.v ?? row.cells[at].textContent);
    """
    return chromium.run(script, head)


def head(chromium: Browser, name: str) -> tuple[str, object]:
    """How a column is sorted, and its button."""
    heads = chromium.all("#kernels-table thead tr:last-child th")
    (found,) = (x for x in heads if x.text.split("\n")[0].strip() == name)
    return found.get_attribute("aria-sort"), found.find_element("css selector", "button")


def test_columns_sort_by_mouse_and_by_keyboard(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["one"])
    moved = [tables.bytes_of(k) for k in read("v5e.train").report.program.kernels]
    total = sum(moved)
    assert head(chromium, "share")[0] == "none"
    for order, is_reversed in (("descending", True), ("ascending", False)):
        head(chromium, "share")[1].click()
        assert head(chromium, "share")[0] == order
        shares = [float(x) for x in column(chromium, "share")]
        expected = [n / total for n in sorted(moved, reverse=is_reversed)]
        assert shares == pytest.approx(expected, rel=1e-4)
    chromium.run("arguments[0].focus()", head(chromium, "kernel")[1])
    head(chromium, "kernel")[1].send_keys("\ue007")  # Enter
    assert head(chromium, "kernel")[0] == "ascending"
    assert head(chromium, "share")[0] == "none"
    numbers = [x.rpartition(".")[::2] for x in column(chromium, "kernel")]
    numbers = [int(number) for stem, number in numbers if stem == "fusion"]
    assert numbers == sorted(numbers)
    assert len(numbers) > 3


def test_rows_are_filtered(chromium: Browser, pages: dict[str, Path]) -> None:
    report = read("v5e.train").report
    chromium.open(pages["one"])
    output = chromium.one("form.filter output")
    assert output.text == f"{len(report.program.kernels)} of {len(report.program.kernels)}"
    chromium.one("select[name=part] option[value=update]").click()
    assert sorted(column(chromium, "kernel")) == sorted(k.name for k in report.update.kernels)
    chromium.one("select[name=part] option[value='']").click()
    chromium.one("input[name=text]").send_keys("DYNAMIC")
    fitting = {k.name for k in report.program.kernels if "dynamic" in f"{k.name} {k.op_name}"}
    assert {*column(chromium, "kernel")} == fitting
    assert 0 < len(fitting) < len(report.program.kernels)
    # A leaf's name finds the kernel that it lands in.
    leaf = report.leaves[0]
    chromium.one("input[name=text]").clear()
    chromium.one("input[name=text]").send_keys(leaf.name)
    named = {k.name for k in report.program.kernels if leaf.name in k.op_name}
    assert {*column(chromium, "kernel")} == {*leaf.kernels, *named}
    assert not {*leaf.kernels} & named


def shown(chromium: Browser, selector: str) -> bool:
    """Whether the reader sees an element without scrolling."""
    script = """
        const box = arguments[0].getBoundingClientRect();
        return arguments[0].checkVisibility() && box.top >= 0 && box.bottom <= innerHeight;
    """
    return chromium.run(script, chromium.one(selector))


def test_an_address_finds_a_kernel_by_its_name(chromium: Browser, pages: dict[str, Path]) -> None:
    report = read("v5e.train").report
    last = sorted(report.program.kernels, key=lambda k: (not k.part, -k.line))[-1].name
    for anchor in (f"#kernel={last}", f"#{last}"):
        chromium.open(pages["one"], anchor)
        row = f"[id='kernel={last}']"
        assert shown(chromium, row), anchor
        assert "found" in chromium.one(row).get_attribute("class")
    # One that is filtered out is shown all the same.
    chromium.one("input[name=text]").send_keys("nothing is called like this")
    assert column(chromium, "kernel") == [last]
    other = report.update.kernels[0].name
    chromium.run("location.hash = arguments[0]", f"#kernel={other}")
    assert column(chromium, "kernel") == [other]
    # The line of its HLO is in what was folded away.
    assert not chromium.one(f"[id='hlo={other}']").is_displayed()
    chromium.one(f"[id='kernel={other}'] td:last-child a").click()
    assert shown(chromium, f"[id='hlo={other}']")
    # Not every browser unfolds by itself what an address names.
    chromium.run("""
        document.querySelectorAll("details").forEach((x) => { x.open = false; });
        dispatchEvent(new HashChangeEvent("hashchange"));
    """)
    assert shown(chromium, f"[id='hlo={other}']")


def test_names_in_an_address_may_be_any(chromium: Browser, pages: dict[str, Path]) -> None:
    name = with_odd_names(read("v5e.train")).report.program.kernels[-1].name
    chromium.open(pages["long"], f"#kernel={quote(name)}")
    assert shown(chromium, f"[id='kernel={name}']")
    chromium.open(pages["long"], "#100%")
    assert chromium.complaints() == []


def test_colours_of_the_map_are_switched(chromium: Browser, pages: dict[str, Path]) -> None:
    whole, zero1, *rest = read("v5e.clip").report.leaves
    chromium.open(pages["devices"])

    def colours() -> dict[str, str]:
        script = """
            return [...document.querySelectorAll("svg.wide a")].map((leaf) =>
              [leaf.ariaLabel, getComputedStyle(leaf.querySelector("rect")).fill]);
        """
        return {label.partition("  ")[0]: fill for label, fill in chromium.run(script)}

    def legend() -> str:
        (found,) = (x.text for x in chromium.all(".legend") if x.is_displayed())
        return found

    assert len({*colours().values()}) == len({leaf.kernels for leaf in (whole, zero1, *rest)})
    chromium.one("input[value=sharding]").click()
    found = colours()
    assert len({found[leaf.name] for leaf in rest}) == 1
    assert len({found[whole.name], found[zero1.name], found[rest[0].name]}) == 3
    assert f"over data, {len(rest)} leaves" in legend()
    assert "param whole, state over data, 1 leaf" in legend()
    chromium.one("input[value=collective]").click()
    found = colours()
    assert [name for name in found if found[name] != found[whole.name]] == [zero1.name]
    assert "all-gather of the param, 1 leaf" in legend()


def test_a_leaf_says_what_it_is_and_leads_to_its_kernel(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    leaf = read("v5e.clip").report.leaves[0]
    for width, kind in ((1400, "wide"), (360, "narrow")):
        chromium.open(pages["devices"], width=width)
        (drawn,) = (x for x in chromium.all(".map > svg") if x.is_displayed())
        assert drawn.get_attribute("class") == kind
        (link,) = (
            x
            for x in chromium.all(f"svg.{kind} a")
            if x.get_attribute("aria-label").startswith(f"{leaf.name}  ")
        )
        chromium.run("arguments[0].focus()", link)
        for what in (leaf.name, leaf.shape, "on each device", *leaf.kernels, "whole"):
            assert what in chromium.one("#tip").text
        link.send_keys("\ue00c")  # Escape
        assert not chromium.one("#tip").is_displayed()
        link.send_keys("\ue007")  # Enter
        assert shown(chromium, f"[id='kernel={leaf.kernels[0]}']")


@pytest.mark.parametrize("name", PAGES)
def test_the_page_never_scrolls_sideways(
    name: str, chromium: Browser, pages: dict[str, Path]
) -> None:
    for width in (360, 800, 1150, 1400):
        chromium.open(pages[name], width=width)
        chromium.run("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
        page, window = chromium.run(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert page <= window <= width
    # What is long scrolls in its cell.
    wide = chromium.run(f"return {WIDE_CELLS}.map((x) => getComputedStyle(x).overflowX)")
    assert {*wide} <= {"auto"}
    if name == "long":
        assert len(wide) >= 2 * len(read("v5e.train").report.program.kernels)


def test_figures_on_a_phone_have_their_titles(chromium: Browser, pages: dict[str, Path]) -> None:
    script = """
        const heads = [...document.querySelectorAll("#kernels-table thead tr:last-child th")];
        const titles = heads.map((head) => `"${head.dataset.g ?? ""} ${head.innerText.trim()}"`);
        return [...document.querySelectorAll("#kernels-table td.n")].filter((x) => x.innerText)
          .map((x) => [titles[x.cellIndex], getComputedStyle(x, "::before").content]);
    """
    for name in ("one", "two"):
        chromium.open(pages[name], width=360)
        found = chromium.run(script)
        assert len(found) > 20
        for title, before in found:
            assert before == title.replace('" ', '"')


WIDE_CELLS = """
  [...document.querySelectorAll("td.s > div")].filter((x) => x.scrollWidth > x.clientWidth + 1)
""".strip()


CONTRASTS = """
    const light = (text) => {
      const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
        .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const seen = (color) => !/^rgba\\(.*, 0\\)$|^transparent$/.test(color);
    const behind = (element) => {
      if (element instanceof SVGElement) {
        return getComputedStyle(element.parentElement.querySelector("rect")).fill;
      }
      for (let at = element; at; at = at.parentElement) {
        const color = getComputedStyle(at).backgroundColor;
        if (seen(color)) return color;
      }
      return "rgb(255, 255, 255)";
    };
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
      const style = getComputedStyle(element);
      const ink = element instanceof SVGElement ? style.fill : style.color;
      const paper = behind(element);
      const [high, low] = [light(ink), light(paper)].sort((a, b) => b - a);
      found.set(`${ink} on ${paper}`, (high + 0.05) / (low + 0.05));
    }
    return [...found];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(scheme: str, chromium: Browser, pages: dict[str, Path]) -> None:
    """A ratio of 4.5, WCAG's level AA, of text to what is behind it."""
    papers = set()
    for name in PAGES:
        chromium.open(pages[name], scheme=scheme)
        for colouring in ("kernel", "collective", "sharding"):
            chromium.run(
                "document.querySelectorAll(`input[value=${arguments[0]}]`)"
                ".forEach((x) => { x.checked = true; })",
                colouring,
            )
            for colours, ratio in chromium.run(CONTRASTS):
                assert ratio >= 4.5, (name, colours, ratio)
                papers.add(colours.partition(" on ")[2])
    assert len(papers) >= 6
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")


def test_nothing_is_fetched_and_nothing_complains(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.complaints()
    chromium.requests()
    folder = os.environ.get("ADAMW_XLA_SCREENSHOTS")
    for name, path in pages.items():
        for width in (360, 1400):
            for scheme in ("light", "dark"):
                chromium.open(path, width=width, scheme=scheme)
                if folder:
                    chromium.shoot(Path(folder) / f"{name}.{width}.{scheme}.png")
    assert chromium.complaints() == []
    own = {path.resolve().as_uri() for path in pages.values()}
    assert {url for url in chromium.requests() if url != "about:blank"} == own


def test_without_a_script_all_is_there(
    chromium: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = re.sub("<script>.*</script>", "", pages["devices"].read_text(), flags=re.DOTALL)
    (tmp_path / "quiet.html").write_text(text)
    for width in (360, 1400):
        chromium.open(tmp_path / "quiet.html", width=width)
        kernels = read("v5e.clip").report.program.kernels
        rows = [x for x in chromium.all("#kernels-table tbody tr") if x.is_displayed()]
        assert len(rows) == len(kernels)
        assert not chromium.one("form.filter").is_displayed()
        assert not chromium.all("#kernels button")
        fill = "return getComputedStyle(document.querySelector('svg a rect')).fill"
        before = chromium.run(fill)
        chromium.one("input[value=collective]").click()
        assert chromium.run(fill) != before


def test_on_paper_names_are_whole(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["long"], width=794, media="print")
    assert not chromium.one("form.filter").is_displayed()
    assert chromium.run(f"return {WIDE_CELLS}.length") == 0

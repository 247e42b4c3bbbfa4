"""An HTML page without a browser: its ids, links, rows and words."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote

VOID = {"br", "col", "input", "meta"}


class Page(HTMLParser):
    """Collects them; complains of tags that are not closed, and of what comes from elsewhere.

    Attributes:
      ids: of all elements, in order.
      links: where they go to, as they are written.
      rows: attributes of each row of a table that has some.
      words: all text but style and script.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.words = "".join(self.texts)

    @property
    def dead_links(self) -> list[str]:
        """Those that go to no id of the page."""
        ids = {*self.ids}
        return [x for x in self.links if not x.startswith("#") or unquote(x[1:]) not in ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [found["href"]] if found.get("href") else []
        self.rows += [found] if tag == "tr" and found else []
        assert not {"src", "srcset"} & set(found)
        assert tag != "link"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.texts.append(data)

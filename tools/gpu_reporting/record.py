"""The record of a report: one JSON file and its page, written anew whenever there is more."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
import time
from typing import Any

from gpu_reporting import child, page, verdict
from gpu_reporting.process import Ended


@dataclasses.dataclass
class Record:
    """What is known so far.

    Attributes:
      out: the folder of ``report.json`` and ``report.md``.
      device: "gpu" or "cpu", as asked for.
      minutes: for all of it.
      parts: by name, in order.
    """

    out: Path
    device: str
    minutes: float
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    started: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    _seen: int = -1

    def begin(self, name: str, limit: float) -> None:
        """A part runs now."""
        self.parts[name] = {"status": "running", "limit": round(limit, 1), "items": []}
        self._seen = -1
        self.write()

    def look(self, name: str, items: Path) -> None:
        """Takes over what the part has written by now."""
        size = items.stat().st_size if items.exists() else 0
        if size != self._seen:
            self._seen = size
            self.parts[name]["items"] = child.read_items(items)
            self.write()

    def end(self, name: str, ended: Ended, items: Path) -> None:
        """A part is over, well or not."""
        found = child.read_items(items)
        self.parts[name] |= {"status": ended.status, "seconds": round(ended.seconds, 1)}
        self.parts[name] |= {"items": found} | ({"tail": ended.tail} if ended.tail else {})
        self.write()

    def skip(self, name: str, why: str) -> None:
        """A part is not run."""
        self.parts[name] = {"status": "skipped", "why": why, "items": []}
        self.write()

    def stop(self) -> None:
        """Nothing more will come, as asked for or because somebody has ended it."""
        for part in self.parts.values():
            if part["status"] == "running":
                part["status"] = "interrupted"
        self.write()

    def item(self, name: str, key: str) -> Any:
        """What a part wrote last under this key; None if it did not."""
        items = self.parts.get(name, {}).get("items", [])
        return next((item[key] for item in reversed(items) if key in item), None)

    def as_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        whole: dict[str, Any] = {"started": self.started, "asked_for": self.device}
        whole |= {"minutes": self.minutes, "parts": self.parts}
        return whole | {"verdict": verdict.verdict(whole)}

    def write(self) -> None:
        """Both files; a reader never finds half of one."""
        whole = self.as_json()
        _replace(self.out / "report.json", json.dumps(whole, indent=1))
        _replace(self.out / "report.md", page.markdown(whole))


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(text)
    os.replace(draft, path)

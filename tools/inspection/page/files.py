"""Reports as files: StableHLO, optimized HLO, and pages to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inspection.inspect_cases import Inspected
from inspection.page import comparison, document


def write(found: Sequence[Inspected], folder: Path) -> list[Path]:
    """Writes three files for each program, and a page for those of one target together.

    They are named after the target and whose step it is: ``v5e.optax.html``; programs side by
    side stand in ``v5e.compared.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    by_target: dict[str, list[Inspected]] = {}
    for x in found:
        stem = document.stem(x)
        texts[f"{stem}.stablehlo.mlir"] = x.program.stablehlo
        texts[f"{stem}.hlo"] = x.text
        texts[f"{stem}.html"] = document.page(x)
        by_target.setdefault(x.target, []).append(x)
    for target, group in by_target.items():
        if len(group) > 1:
            texts[f"{target}.compared.html".replace(":", ".")] = comparison.page(group)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]

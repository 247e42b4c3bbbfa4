"""What every refusal has: the tables of this room say the words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import re
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OURS = (ROOT / "adamw_xla", ROOT / "lowering")
# A state that was trained is never to be built anew.
LOSES = re.compile(r"(re)?build (it|the state) (anew|again|with)|start (over|again)|re-?init", re.I)


@pytest.fixture
def refused() -> Callable[..., str]:
    """Makes a call that must fail, and checks what its error is and says; returns the text."""

    def check(call: Callable[[], Any], error: type[Exception], *parts: str, kept: Any = ()) -> str:
        before = jax.tree.map(np.asarray, kept)
        with pytest.raises(error) as caught:
            call()
        text = str(caught.value)
        assert type(caught.value) is error
        assert not [part for part in parts if part not in text], text
        assert "\n" not in text
        assert text.endswith((".", "?", ".)"))
        assert not LOSES.search(text), text
        raised = Path(caught.traceback[-1].path)
        assert any(raised.is_relative_to(folder) for folder in OURS), raised
        for new, old in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(np.asarray(new), old)
        return text

    return check

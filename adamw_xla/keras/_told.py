"""The part of the class that keeps what a step tells."""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any

import keras
import numpy as np

from adamw_xla._info.step_info import StepInfo
from adamw_xla._inside.update import hyper_dtype
from adamw_xla.keras import _check
from adamw_xla.keras._info import LENGTH, Kept, nothing_told


class Telling(keras.optimizers.AdamW):
    """The stock class with ``info``: in a variable behind all others, and in no file.

    Keras' trainers carry an optimizer's ``variables`` through their jitted steps; what is not one
    of them does not leave these.
    """

    _keep_info: bool
    _kept: Kept | None = None

    def build(self, var_list: Sequence[Any]) -> None:
        """Creates the state for these variables."""
        super().build(var_list)
        if not self.keep_info or self._kept is not None:
            return
        with keras.name_scope(self.name, caller=self):
            variable = keras.Variable(
                keras.initializers.Constant(np.nan),
                shape=(LENGTH,),
                dtype=hyper_dtype([variable.dtype for variable in var_list]).name,
                trainable=False,
                name="info",
            )
        self._kept = Kept(variable)

    @property
    def variables(self) -> list[Any]:
        """Those of the stock class; behind them, where it is kept, the one that holds ``info``."""
        own: list[Any] = super().variables
        return own if self._kept is None else [*own, self._kept.variable]

    @property
    def keep_info(self) -> bool:
        """Whether what a step tells is kept; not to be changed."""
        return self._keep_info

    @property
    def info(self) -> StepInfo:
        """What the last call told: scalars; NaN, and not applied, before the first.

        Raises:
          AttributeError: it is not kept.
        """
        if not self.keep_info:
            raise _check.no_info()
        return nothing_told() if self._kept is None else self._kept.info()

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables of the stock class."""
        with self._as_stock():
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads the variables of the stock class."""
        with self._as_stock():
            super().load_own_variables(store)

    @contextlib.contextmanager
    def _as_stock(self) -> Iterator[None]:
        kept, self._kept = self._kept, None
        try:
            yield
        finally:
            self._kept = kept

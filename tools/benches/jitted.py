"""A step as a program of JAX': called once for each step, or with a loop of them inside."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

Call: TypeAlias = Literal["donated", "undonated", "eager"]
"""How a step is called: jitted, with params and state given away or kept; or not jitted at all."""

Form: TypeAlias = Call | Literal["looped"]
"""Or many steps in one program."""

LOOP = 16
"""Steps of a loop that knows their number: between them the host is not asked whether to go on."""


@dataclasses.dataclass
class Carry:
    """The params and state that a step replaces."""

    value: tuple[Any, Any]

    @property
    def kind(self) -> Any:
        """Equal for those that the same program can take."""
        leaves, treedef = jax.tree.flatten(self.value)
        return treedef, tuple((x.shape, x.dtype) for x in leaves)


class Jitted:
    """A step ``fn(params, grads, state) -> (params, state)``, jitted and donated by default."""

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        grads: list[jax.Array],
        state: Any,
        call: Call = "donated",
    ) -> None:
        self._grads = grads
        self.carry = Carry((params, state))
        self._step: Any = lambda carry, grads: fn(carry[0], grads, carry[1])
        self._lowered: Any = None
        if call != "eager":
            jitted = jax.jit(self._step, donate_argnums=(0,) * (call == "donated"))
            self._lowered = jitted.lower(self.carry.value, grads)

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps beside the params."""
        return sum(int(x.nbytes) for x in jax.tree.leaves(self.carry.value[1]))

    def prepare(self) -> None:
        if self._lowered is not None:
            self._step, self._lowered = self._lowered.compile(), None

    def run(self, steps: int) -> None:
        self.prepare()
        carry = self.carry.value
        for _ in range(steps):
            carry = self._step(carry, self._grads)
        self.carry.value = jax.block_until_ready(carry)


def loop(fn: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """Of a step ``fn(params, grads, state)``, so many times ``LOOP`` steps, as one program.

    Returns:
      A function (times, (params, state), grads) -> (params, state).
    """

    def step(_: Any, carry: Any, grads: Any) -> Any:
        # Gradients that seem to be others each time: what is made of them alone stays in the loop.
        (params, state), grads = jax.lax.optimization_barrier((carry, grads))
        return fn(params, grads, state)

    def steps(times: Any, carry: Any, grads: Any) -> Any:
        one = functools.partial(step, grads=grads)

        def some(_: Any, carry: Any) -> Any:
            return jax.lax.fori_loop(0, LOOP, one, carry)

        return jax.lax.fori_loop(0, times, some, carry)

    return steps


class Looped(Jitted):
    """The same, ``LOOP`` steps at a time in a program that takes how many times.

    What it takes beyond no time at all is spent on the device: JAX's dispatch of the buffers,
    which costs as much as a whole step of many small leaves, is once for all steps.
    """

    def __init__(
        self, fn: Callable[..., Any], params: Any, grads: list[jax.Array], state: Any
    ) -> None:
        self._grads = grads
        self.carry = Carry((params, state))
        jitted = jax.jit(loop(fn), donate_argnums=1)
        self._lowered = jitted.lower(np.int32(0), self.carry.value, grads)

    def run(self, steps: int) -> None:
        """Makes so many, rounded up to a multiple of ``LOOP``."""
        self.prepare()
        new = self._step(np.int32(-(-steps // LOOP)), self.carry.value, self._grads)
        self.carry.value = jax.block_until_ready(new)

    def step_seconds(self, steps: int) -> float:
        """What a step takes on the device, from so many of them, rounded up likewise."""
        start = time.perf_counter()
        self.run(0)
        begun = time.perf_counter()
        self.run(steps)
        took = (time.perf_counter() - begun) - (begun - start)
        return took / (-(-steps // LOOP) * LOOP)

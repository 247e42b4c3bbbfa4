"""HLO's opcodes by what they do: one table for all that read a program."""

from __future__ import annotations

FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-dimension-size",
        "get-tuple-element",
        "optimization-barrier",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
"""What launches nothing."""

VIEWS = frozenset({"add-dependency", "bitcast", "optimization-barrier", "opt-barrier"})
"""What hands on its first operand without touching it."""

MOVE_STARTS = frozenset({"copy-start", "dynamic-slice-start", "slice-start"})
"""What has its first operand, or a piece of it, moved in the background."""

MOVES = MOVE_STARTS | {"copy", "copy-done", "dynamic-slice-done", "slice-done"}
"""What moves data, or hands on what was moved; nothing is computed."""

SLICES = frozenset({"dynamic-slice", "gather", "slice"})
SLICE_STARTS = frozenset({"dynamic-slice-start", "slice-start"})
"""What reads no more of its first operand than it returns."""

IN_PLACE = {"dynamic-update-slice": 1, "scatter": -1}
"""What writes into its first operand, and which operand holds what it writes."""

FUSIONS = frozenset({"fusion", "fusion-start"})
"""What is computed as one; XLA:GPU may begin it beside others."""

CALLS_ONE = FUSIONS | {"async-start", "call"}
"""What runs the computation that it calls, once."""

ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "and",
        "clamp",
        "compare",
        "convert",
        "divide",
        "exponential",
        "is-finite",
        "log",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "power",
        "reduce-precision",
        "reshape",
        "rsqrt",
        "select",
        "sign",
        "sqrt",
        "subtract",
    }
)
"""What an optimizer may compute, each element of its result from those at the same place."""

_COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)


def is_collective(opcode: str) -> bool:
    """Whether it exchanges data between devices, or begins to."""
    return opcode.removesuffix("-start") in _COLLECTIVES


ASYNC_RESULT = {"all-reduce-start": None, "copy-start": 0}
"""Which part of what an asynchronous start returns is its result, where it is not part 1."""

"""HLO's opcodes by what they do: one table for all that read a program."""

from __future__ import annotations

import re

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

_OF_ONE = (
    "abs convert exponential is-finite log negate not reduce-precision reshape rsqrt sign sqrt"
)
_OF_ONE += " bitcast broadcast copy get-tuple-element slice transpose"
ARITY = {
    **dict.fromkeys(ELEMENTWISE, 2),
    **dict.fromkeys(_OF_ONE.split(), 1),
    "clamp": 3,
    "dot": 2,
    "pad": 2,
    "select": 3,
}
"""How many operands these have."""

SAME_TYPE = ELEMENTWISE - {"clamp", "compare", "convert", "is-finite", "reshape", "select"}
"""Those whose operands and result are of one dtype."""

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


ASYNC_RESULT = {
    "all-gather-start": 1,
    "async-start": 1,
    "collective-permute-start": 1,
    "copy-start": 0,
    "dynamic-slice-start": 1,
    "slice-start": 1,
}
"""Which part of what an asynchronous start returns is its result, where others stand beside it."""

_OTHERS = frozenset(
    re.split(
        r"\s+",
        "acos acosh all-gather asin asinh async atan atan2 atanh batch-norm-grad "
        "batch-norm-inference batch-norm-training bitcast-convert broadcast call cbrt ceil "
        "cholesky collective-reduce complex concatenate conditional convolution copy cosine cosh "
        "count-leading-zeros custom-call dot dynamic-reshape dynamic-slice dynamic-update-slice "
        "erf exponential-minus-one fft floor fusion gather imag infeed iota log-plus-one logistic "
        "map mulhi outfeed pad popcnt ragged-dot real recv reduce reduce-window remainder reverse "
        "rng rng-bit-generator rng-get-and-update-state round-nearest-afz round-nearest-even "
        "scaled-dot scan scatter select-and-scatter send set-dimension-size shift-left "
        "shift-right-arithmetic shift-right-logical shuffle sine sinh slice sort "
        "stochastic-convert tan tanh topk transpose triangular-solve while xor",
    )
)


def is_known(opcode: str) -> bool:
    """Whether HLO has such an operation, or this is the beginning or the end of one."""
    for ending in ("-start", "-update", "-done"):
        opcode = opcode.removesuffix(ending)
    return opcode in FREE | ELEMENTWISE | _COLLECTIVES | _OTHERS

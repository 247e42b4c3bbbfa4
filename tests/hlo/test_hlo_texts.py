"""``adamw_xla.hlo`` on small texts, where counts and bytes are known by hand."""

from __future__ import annotations

import textwrap

import pytest

from adamw_xla.hlo import HloSyntaxError, report


def module(body: str, *, header: str = "", extra: str = "") -> str:
    head = f"HloModule m, is_scheduled=true{header}, entry_computation_layout={{()->()}}\n\n"
    return f"{head}{textwrap.dedent(extra)}ENTRY %main {{\n{textwrap.dedent(body)}}}\n"


def test_bytes_of_slices_and_of_updates_in_place():
    extra = """\
        %fused (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
          %p0 = f32[8,100]{1,0} parameter(0)
          %p1 = s32[] parameter(1)
          %z = s32[] constant(0)
          ROOT %s = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,100}
        }

        %fused.1 (q0: f32[8,100], q1: f32[1,100], q2: s32[]) -> f32[8,100] {
          %q0 = f32[8,100]{1,0} parameter(0)
          %q1 = f32[1,100]{1,0} parameter(1)
          %q2 = s32[] parameter(2)
          %z.1 = s32[] constant(0)
          ROOT %u = f32[8,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %z.1)
        }

        """
    body = """\
          %x = f32[8,100]{1,0} parameter(0)
          %i = s32[] parameter(1)
          %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
          ROOT %new = f32[8,100]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%fused.1
        """
    row, new = report(module(body, extra=extra)).program.kernels
    assert (row.read, row.written) == (400 + 4, 400)
    assert (new.read, new.written) == (400 + 4, 400)


def test_asynchronous_pairs_count_once():
    body = """\
          %x = f32[1024]{0} parameter(0)
          %start = (f32[1024]{0}, f32[1024]{0}, u32[]) copy-start(%x)
          ROOT %done = f32[1024]{0} copy-done(%start)
        """
    (copy,) = report(module(body), platform="cuda").program.kernels
    assert (copy.kind, copy.read, copy.written) == ("copy", 4096, 4096)
    to_vector_memory = module(body.replace("(f32[1024]{0}, ", "(f32[1024]{0:S(1)}, "))
    (prefetch,) = report(to_vector_memory, platform="tpu").program.kernels
    assert (prefetch.kind, prefetch.read, prefetch.written) == ("async-copy", 4096, 0)
    assert not prefetch.counted


def test_a_fusion_that_runs_beside_others_moves_what_it_would_alone():
    extra = """\
        %row (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
          %p0 = f32[8,100]{1,0} parameter(0)
          %p1 = s32[] parameter(1)
          %z = s32[] constant(0)
          ROOT %s = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,100}, \
metadata={op_name="jit(f)/adamw_update"}
        }

        """
    body = """\
          %x = f32[8,100]{1,0} parameter(0)
          %i = s32[] parameter(1)
          %start = ((f32[8,100]{1,0}, s32[]), f32[1,100]{1,0}, u32[]) fusion-start(%x, %i), \
kind=kLoop, calls=%row
          ROOT %done = f32[1,100]{1,0} fusion-done(%start)
        """
    (kernel,) = report(module(body, extra=extra), platform="cuda").update.kernels
    assert (kernel.name, kernel.kind, kernel.read, kernel.written) == ("start", "fusion", 404, 400)


@pytest.mark.parametrize(
    ("layout", "taken"),
    [
        ("{1,0:T(8,128)(2,1)}", {2560, 4096}),  # 10 rows lie in two tiles of 8
        ("{0,1:T(8,128)(2,1)}", {2560, 32768}),  # and so do 128 columns of 10 elements
        ("{1,0}", {2560}),
    ],
)
def test_bytes_of_an_array_may_be_those_that_pad_it_too(layout, taken):
    """Of which XLA:TPU makes slices that are fetched early."""

    def is_taken(size: int) -> bool:
        body = f"""\
            %x = bf16[10,128]{layout} parameter(0)
            ROOT %bytes = s8[{size}]{{0:T(1024)(128)(4,1)}} bitcast(%x)
            """
        try:
            return report(module(body)).program.count == 0
        except HloSyntaxError:
            return False

    assert {size for size in (2560, 3000, 4096, 5120, 32768, 40960) if is_taken(size)} == taken


@pytest.mark.parametrize("layout", ["{2,0:T(8,128)}", "{0:T(8,128)}", "{1,0:T(0,128)}"])
def test_a_layout_that_contradicts_its_shape_is_an_error_of_its_line(layout):
    body = f"""\
        ROOT %x = bf16[10,128]{layout} parameter(0)
        """
    with pytest.raises(HloSyntaxError, match="line 4"):
        report(module(body))


def test_text_with_types_at_the_operands_and_no_percent_signs():
    body = """\
          x = bf16[3,2]{1,0} parameter(0), metadata={op_name="p[\\'(w) = {\\']"}
          ROOT y = bf16[3,2]{1,0} negate(bf16[3,2]{1,0} x), metadata={op_name="jit(f)/neg"}
        """
    found = report(module(body))
    (kernel,) = found.program.kernels
    assert (kernel.name, kernel.kind, kernel.read, kernel.written) == ("y", "negate", 12, 12)
    assert found.inputs[0].name == "p['(w) = {']"


def test_a_function_that_is_called_like_the_update_is_not_it():
    body = """\
          %x = f32[8]{0} parameter(0)
          %y = f32[8]{0} negate(%x), metadata={op_name="jit(adamw_update)/my_adamw_update/neg"}
          ROOT %z = f32[8]{0} negate(%y), metadata={op_name="jit(adamw_update)/vmap()/adamw_update"}
        """
    assert [k.name for k in report(module(body)).update.kernels] == ["z"]


def test_joined_names_are_told_apart():
    body = """\
          %x = f32[8]{0} parameter(0)
          %y = f32[8]{0} negate(%x), metadata={op_name="jit(f)/mul;jit(f)/neg"}
          ROOT %z = f32[8]{0} negate(%y), metadata={op_name="jit(f)/adamw_update;jit(f)/add"}
        """
    assert [k.name for k in report(module(body)).update.kernels] == ["z"]


def test_calls_are_what_stands_in_them():
    extra = """\
        %command_buffer {
          %c0 = f32[8]{0} parameter(0)
          %c1 = f32[8]{0} negate(%c0)
          ROOT %c2 = f32[8]{0} sine(%c1)
        }

        """
    body = """\
          %x = f32[8]{0} parameter(0)
          ROOT %y = f32[8]{0} call(%x), to_apply=%command_buffer
        """
    assert [k.name for k in report(module(body, extra=extra)).program.kernels] == ["c1", "c2"]
    # XLA:CPU cuts one loop into the calls of several threads.
    parallel = body.replace(
        "buffer\n", """buffer, backend_config={"outer_dimension_partitions":["2"]}\n"""
    )
    assert [k.name for k in report(module(parallel, extra=extra)).program.kernels] == ["y"]


LOOP = """\
        %condition (c: (s32[], f32[8])) -> pred[] {
          %c = (s32[], f32[8]{0}) parameter(0)
          %i = s32[] get-tuple-element(%c), index=0
          %n = s32[] constant(3)
          ROOT %less = pred[] compare(%i, %n), direction=LT
        }

        %body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
          %b = (s32[], f32[8]{0}) parameter(0)
          %j = s32[] get-tuple-element(%b), index=0
          %x = f32[8]{0} get-tuple-element(%b), index=1
          %y = f32[8]{0} negate(%x)
          ROOT %next = (s32[], f32[8]{0}) tuple(%j, %y)
        }

        """


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_conditions_run_where_the_length_of_a_loop_is_not_known(platform):
    body = """\
          %t = (s32[], f32[8]{0}) parameter(0)
          ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
        """
    unknown = report(module(body, extra=LOOP), platform=platform).program
    assert [(k.name, k.times) for k in unknown.kernels] == [("less", None), ("y", None)]
    known = body.replace("=%body\n", """=%body, backend_config={"known_trip_count":{"n":"3"}}\n""")
    counted = report(module(known, extra=LOOP), platform=platform).program
    assert counted.launches == 3
    # A TPU's may run; it computes on scalars alone, which are no launches.
    assert [k.name for k in counted.kernels] == (["less"] if platform == "tpu" else []) + ["y"]


def test_a_loop_in_a_loop_runs_as_often_as_both():
    counts = """backend_config={"known_trip_count":{"n":"%d"}}"""
    inner = f"while(%b.1), condition=%condition, body=%body, {counts % 3}"
    outer = f"while(%t), condition=%condition.1, body=%body.1, {counts % 4}"
    around = f"""\
        %condition.1 (c.1: (s32[], f32[8])) -> pred[] {{
          %c.1 = (s32[], f32[8]{{0}}) parameter(0)
          ROOT %more = pred[] constant(true)
        }}

        %body.1 (b.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
          %b.1 = (s32[], f32[8]{{0}}) parameter(0)
          ROOT %inner = (s32[], f32[8]{{0}}) {inner}
        }}

        """
    body = f"""\
          %t = (s32[], f32[8]{{0}}) parameter(0)
          ROOT %w = (s32[], f32[8]{{0}}) {outer}
        """
    text = module(body, extra=LOOP.rstrip(" ") + around)
    assert {k.name: k.times for k in report(text).program.kernels}["y"] == 12


COUNTED = """\
          %x = f32[8]{0} parameter(0)
          %first = s32[] constant(1)
          %begin = s32[] copy(%first)
          %t = (s32[], f32[8]{0}) tuple(%begin, %x)
          ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
        """
STEP = "%one = s32[] constant(1)\n          %k = s32[] add(%j, %one)\n          "
ROUNDS = {
    "as it is": (2, "", ""),
    "another end": (6, "constant(3)", "constant(7)"),
    "over before it begins": (0, "constant(3)", "constant(-3)"),
    "steps of two": (1, "%one = s32[] constant(1)", "%one = s32[] constant(2)"),
    "steps beyond the end": (1, "%one = s32[] constant(1)", "%one = s32[] constant(5)"),
    "steps back": (None, "%one = s32[] constant(1)", "%one = s32[] constant(-1)"),
    "of another counter": (None, "tuple(%k, %y)", "tuple(%j, %y)"),
    "up to and with the end": (None, "direction=LT", "direction=LE"),
    "no constant": (None, "%begin = s32[] copy(%first)", "%begin = s32[] negate(%first)"),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_the_length_of_a_loop_is_read_from_its_counter(case):
    rounds, old, new = ROUNDS[case]
    loop = LOOP.replace("ROOT %next", STEP + "ROOT %next").replace("tuple(%j", "tuple(%k")
    text = module(COUNTED, extra=loop)
    assert old in text
    times = {
        k.name: k.times for k in report(text.replace(old, new), platform="tpu").program.kernels
    }
    assert times["y"] == rounds
    assert times["less"] == (None if rounds is None else rounds + 1)


def test_copies_are_of_those_whom_they_serve():
    body = """\
          %x = f32[8]{0} parameter(0), metadata={op_name="x"}
          %before = f32[8]{0} copy(%x)
          %both = f32[8]{0} copy(%x)
          %y = f32[8]{0} add(%before, %both), metadata={op_name="jit(f)/adamw_update"}
          %z = f32[8]{0} negate(%both), metadata={op_name="jit(f)/neg"}
          %after = f32[8]{0} copy(%y)
          %other = f32[8]{0} copy(%z)
          ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%after, %other)
        """
    found = report(module(body))
    assert [k.name for k in found.update.kernels] == ["before", "y", "after"]
    # Two arrays come, one goes; in all that happens between them, three copies more.
    assert found.update.least_bytes == 2 * 32 + 32
    assert found.update.read + found.update.written == 2 * 32 + 3 * 32 + 2 * 32


@pytest.mark.parametrize("opcode", ["copy", "slice", "dynamic-slice"])
def test_prefetches_are_of_those_whom_they_serve(opcode):
    named = 'metadata={op_name="jit(f)/adamw_update"}'
    body = f"""\
          %p = f32[8]{{0}} parameter(0), metadata={{op_name="p['w']"}}
          %m = f32[8]{{0}} parameter(1), metadata={{op_name="s.m['w']"}}
          %v = f32[8]{{0}} parameter(2), metadata={{op_name="s.v['w']"}}
          %start = ((f32[8]{{0}}), f32[8]{{0:S(1)}}, s32[]) {opcode}-start(%p)
          %done = f32[8]{{0:S(1)}} {opcode}-done(%start)
          %barrier = f32[8]{{0:S(1)}} optimization-barrier(%done)
          ROOT %new = f32[8]{{0}} fusion(%barrier, %m, %v), calls=%f, {named}
        """
    fused = """\
        %f {
          %a = f32[8]{0} parameter(0)
          %b = f32[8]{0} parameter(1)
          %c = f32[8]{0} parameter(2)
          %d = f32[8]{0} add(%a, %b)
          ROOT %e = f32[8]{0} add(%d, %c)
        }

        """
    found = report(module(body, extra=fused), platform="tpu")
    assert [(k.name, k.kind) for k in found.update.kernels] == [
        ("start", "async-copy"),
        ("new", "fusion"),
    ]
    assert [(leaf.name, leaf.kernels) for leaf in found.leaves] == [("p['w']", ("new",))]


def test_a_scalar_that_is_made_of_a_leaf_does_not_update_it():
    body = """\
          %p = f32[8]{0} parameter(0), metadata={op_name="p[\'w\']"}
          %m = f32[8]{0} parameter(1), metadata={op_name="s.m[\'w\']"}
          %v = f32[8]{0} parameter(2), metadata={op_name="s.v[\'w\']"}
          %first = f32[1]{0} slice(%p), slice={[0:1]}, metadata={op_name="jit(f)/adamw_update"}
          %mv = f32[8]{0} add(%m, %v), metadata={op_name="jit(f)/adamw_update"}
          ROOT %new = f32[8]{0} add(%p, %mv), metadata={op_name="jit(f)/adamw_update"}
        """
    (leaf,) = report(module(body)).leaves
    assert (leaf.name, leaf.kernels, leaf.in_place) == ("p['w']", ("new", "mv"), False)


REFUSED = {
    "module @jit_f {\n}\n": "no line that begins with HloModule",
    "HloModule m, num_partitions=1\n\nENTRY %main () -> f32[] {\n}\n": "not scheduled",
    "HloModule m, is_scheduled=true\n\n%a () -> f32[] {\n}\n": "no ENTRY computation",
    module("  %x = f32[2] what is this\n"): "line 4 cannot be read",
    module("  nothing at all\n"): "line 4 is no instruction",
    module("%x = f32[2] frobnicate()\n"): "line 4: frobnicate is no operation that is known",
    module("ROOT %x = f32[2] negate(%y)\n"): "line 4: %y is not made before it is used",
    module("ROOT %x = f32[2] call(), to_apply=%f\n"): "line 4: %f is called, and does not stand",
    module("%x = f32[2] parameter(0)\n"): "line 3: %main has 0 ROOT instructions",
    module("ROOT %x = f32[2] parameter(1)\n"): "line 3: %main has the parameters 1",
    module("%x = f32[2] parameter(0)\nROOT %y = f32[3] negate(%x)\n"): "line 5: %y, negate, contra",
    module("ROOT %x = f32[2] parameter(0)\n").rstrip("}\n"): "line 3, does not end; is the text",
    module("ROOT %x = f32[2] parameter(0)\n", header=", input_output_alias={ {0}: (1, {}) }"): (
        "line 1: parameter 1 is given away, of 1"
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_refuses_what_is_no_compiled_program(text):
    with pytest.raises(HloSyntaxError, match=REFUSED[text]):
        report(text)

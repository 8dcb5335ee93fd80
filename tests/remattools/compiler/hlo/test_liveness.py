# SPDX-License-Identifier: Apache-2.0
"""Live buffers of scheduled programs whose peak is known."""

import pytest

from remattools.compiler.hlo.liveness import find_live_buffers
from remattools.compiler.hlo.program import parse_program

K = "f32[256]{0}"  # 1 KiB


def _find_names(entry, other="", header=""):
    """Return names and bytes of the live buffers of a program with these lines."""
    lines = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    program = f"HloModule m{header}\n\n{other}\n\nENTRY %main (x: f32[256]) -> f32[] {{\n{lines}\n}}\n"
    live = find_live_buffers(parse_program(program.replace("K ", f"{K} ")))
    return {buffer.instruction.name for buffer in live}, sum(buffer.bytes for buffer in live)


def test_a_buffer_lives_until_it_is_last_read():
    # `a` is read last by `c`; then only `c` and `d` are live.
    names, size = _find_names("""
%x = K parameter(0)
%a = K custom-call(%x)
%b = K custom-call(%a)
%c = K custom-call(%a, %b)
%d = K custom-call(%c)
ROOT %r = f32[] custom-call(%d)
""")
    assert (names, size) == ({"a", "b", "c"}, 3072)


@pytest.mark.parametrize(
    ("operation", "is_written_over"),
    [
        pytest.param("sine(%a)", True, id="element-wise"),
        pytest.param("fusion(%a), kind=kLoop, calls=%chain", True, id="fusion of element-wise operations"),
        # Controls: these read other elements of their operand after they have written the first.
        pytest.param("reverse(%a)", False, id="control, not element-wise"),
        pytest.param("fusion(%a), kind=kLoop, calls=%mixing", False, id="control, fusion that mixes elements"),
    ],
)
def test_an_element_wise_operation_writes_over_an_operand_that_dies(operation, is_written_over):
    other = """%chain (p: f32[256]) -> f32[256] {
  %p = K parameter(0)
  %s = K sine(%p)
  ROOT %t = K add(%s, %p)
}

%mixing (p: f32[256]) -> f32[256] {
  %p = K parameter(0)
  ROOT %t = K reverse(%p), dimensions={0}
}"""
    _, size = _find_names(
        f"""
%x = K parameter(0)
%a = K custom-call(%x)
%b = K {operation}
ROOT %r = f32[] custom-call(%b)
""",
        other,
    )
    assert size == (1024 if is_written_over else 2048)


def test_an_operand_that_is_read_later_is_not_written_over():
    _, size = _find_names("""
%x = K parameter(0)
%a = K custom-call(%x)
%b = K sine(%a)
ROOT %r = f32[] custom-call(%a, %b)
""")
    assert size == 2048


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("%v = K bitcast(%a)", id="bitcast"),
        pytest.param("%v = K dynamic-update-slice(%a, %x, %x)", id="update in place"),
        pytest.param("%v = K fusion(%a, %x), kind=kLoop, calls=%update", id="fused update in place"),
        pytest.param("%v = K custom-call(%a), output_to_operand_aliasing={{}: (0, {})}, x=1", id="aliased by a kernel"),
        pytest.param("%v = K call(%a), to_apply=%same", id="call that returns its argument"),
    ],
)
def test_a_view_makes_no_buffer(line):
    other = """%update (p: f32[256], q: f32[256]) -> f32[256] {
  %p = K parameter(0)
  %q = K parameter(1)
  ROOT %u = K dynamic-update-slice(%p, %q, %q)
}

%same (p: f32[256]) -> f32[256] {
  ROOT %p = K parameter(0)
}"""
    names, size = _find_names(
        f"""
%x = K parameter(0)
%a = K custom-call(%x)
{line}
ROOT %r = f32[] custom-call(%v, %x)
""",
        other,
    )
    assert (names, size) == ({"a"}, 1024)


def test_a_loop_needs_what_its_body_needs_beyond_the_carry():
    body = """%body (arg: (f32[256])) -> (f32[256]) {
  %arg = (K ) parameter(0)
  %c = K get-tuple-element(%arg), index=0
  %inner = K custom-call(%c)
  %next = K custom-call(%inner)
  ROOT %out = (K ) tuple(%next)
}""".replace("(K )", f"({K})")
    names, size = _find_names(
        f"""
%x = K parameter(0)
%a = K custom-call(%x)
%start = ({K}) tuple(%a)
%loop = ({K}) while(%start), condition=%cond, body=%body
%end = K get-tuple-element(%loop), index=0
ROOT %r = f32[] custom-call(%end)
""",
        body,
    )
    assert (names, size) == ({"a", "inner"}, 2048)


def test_an_asynchronous_copy_owns_its_destination_alone():
    names, size = _find_names(f"""
%x = K parameter(0)
%a = K custom-call(%x)
%s = ({K}, {K}, u32[]) copy-start(%a)
%d = K copy-done(%s)
ROOT %r = f32[] custom-call(%d)
""")
    # The context is not counted: it lies in the memory of the result.
    assert (names, size) == ({"a", "s"}, 2048)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("", 0, id="free until the result is computed"),
        # Control: the memory of a donated argument is not free before.
        pytest.param(", input_output_alias={ {}: (0, {}, may-alias) }", 1024, id="control, donated"),
    ],
)
def test_a_temporary_lies_in_the_memory_of_a_result_to_come(header, expected):
    _, size = _find_names(
        """
%x = K parameter(0)
%a = K custom-call(%x)
%s = f32[] custom-call(%a)
ROOT %r = K custom-call(%s)
""",
        header=header,
    )
    assert size in (expected, expected + 4)


def test_arguments_constants_and_results_are_not_temporaries():
    assert _find_names("""
%x = K parameter(0)
%c = K constant({...})
ROOT %r = K custom-call(%x, %c)
""") == (set(), 0)

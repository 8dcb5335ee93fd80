# SPDX-License-Identifier: Apache-2.0
"""Compiled programs as text: types, operands and computations."""

import jax
import jax.numpy as jnp
import pytest

from remattools.compiler.hlo.program import list_arrays, parse_program

HLO = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %arg = (s32[], f32[8]{0}) parameter(0)
}

ENTRY %main (x: f32[8], y: TYPE) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = TYPE parameter(1)
  %long = (f32[8]{0}, (f32[8]{0}, u32[]), /*index=2*/f32[8]{0}) custom-call(%x, %y), custom_call_target="a(b)"
  %loop = (s32[], f32[8]{0}) while(%long), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("text", "shape", "size", "on_device"),
    [
        pytest.param("f32[8,128]{1,0}", "f32[8,128]", 4096, 4096, id="plain"),
        pytest.param("bf16[3]{0}", "bf16[3]", 6, 6, id="two bytes"),
        pytest.param("s4[3]{0}", "s4[3]", 2, 2, id="half bytes are rounded up"),
        pytest.param("f32[9,100]{1,0:T(8,128)}", "f32[9,100]", 16 * 128 * 4, 16 * 128 * 4, id="tiles are padded"),
        pytest.param("f32[100,9]{0,1:T(8,128)}", "f32[100,9]", 16 * 128 * 4, 16 * 128 * 4, id="other axis is minor"),
        pytest.param("f32[8]{0:S(1)}", "f32[8]", 32, 0, id="on-chip memory"),
        pytest.param("f32[8]{0:T(128)S(5)}", "f32[8]", 512, 0, id="host memory"),
        pytest.param("f32[]", "f32[]", 4, 4, id="scalar"),
    ],
)
def test_a_type_has_its_padded_bytes_and_memory(text, shape, size, on_device):
    parameter = parse_program(HLO.replace("TYPE", text)).computations["main"][1]
    (array,) = list_arrays(parameter.type)
    assert (str(array), array.bytes, array.device_bytes) == (shape, size, on_device)


def test_lines_keep_operands_calls_and_the_traced_operation():
    program = parse_program(HLO.replace("TYPE", "f32[8]{0}"))
    assert program.entry == "main"
    assert set(program.computations) == {"body", "main"}
    _, _, call, loop, out = program.computations["main"]
    assert call.operands == ("x", "y")
    assert [str(array) for array in list_arrays(call.type)] == ["f32[8]", "f32[8]", "u32[]", "f32[8]"]
    assert (loop.opcode, loop.op_name, loop.find_called("body", "condition")) == (
        "while",
        "jit(f)/while",
        ["body", "cond"],
    )
    assert out.is_root


def test_a_real_program_is_read_completely():
    compiled = (
        jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ c), c), x, None, length=3))
        .lower(jax.ShapeDtypeStruct((16, 16), jnp.float32))
        .compile()
    )
    text = compiled.as_text()
    program = parse_program(text)
    lines = sum(" = " in line and line.startswith("  ") for line in text.splitlines())
    assert sum(map(len, program.computations.values())) == lines
    assert all(one.opcode for lines in program.computations.values() for one in lines)

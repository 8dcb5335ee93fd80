# SPDX-License-Identifier: Apache-2.0
"""`timeline`: which values are live when, by module path."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.models import Tower, inputs, loss

X = jax.ShapeDtypeStruct((256,), jnp.float32)
KIB = 1024


@pytest.mark.parametrize(
    ("fn", "peak"),
    [
        pytest.param(lambda x: jnp.sin(x), KIB, id="one operation"),
        pytest.param(lambda x: jnp.sin(jnp.cos(jnp.sin(x))), 2 * KIB, id="a chain frees its inputs"),
        pytest.param(lambda x: jnp.sin(x) + jnp.cos(x), 3 * KIB, id="both operands and the sum"),
        pytest.param(lambda x: jax.jit(lambda y: jnp.sin(jnp.cos(y)))(x), 2 * KIB, id="inside jit"),
        pytest.param(
            lambda x: jax.lax.scan(lambda c, _: (jnp.sin(jnp.cos(c)), None), x, None, length=3)[0],
            2 * KIB,
            id="inside scan",
        ),
    ],
)
def test_peaks_equal_those_counted_by_hand(fn, peak):
    assert rt.timeline(fn, X).peak_bytes == peak


def test_the_peak_follows_the_rules_and_names_its_modules():
    model, x = nnx.eval_shape(lambda: Tower(depth=6)), inputs(32, 16)
    plain = rt.timeline(loss, model, x, differentiate=True)
    with rt.applied(model, {"layers.*": "nothing_saveable"}):
        ruled = rt.timeline(loss, model, x, differentiate=True)
    with rt.applied(model, {"layers.*": "everything_saveable"}):
        control = rt.timeline(loss, model, x, differentiate=True)
    assert ruled.peak_bytes < 0.4 * plain.peak_bytes
    assert control.peak_bytes > 0.9 * plain.peak_bytes
    assert any(a.path.startswith("layers.[0:6]") and a.count >= 6 for a in plain.largest)
    assert ruled.largest[0].path.startswith("layers.")
    assert plain.argument_bytes == ruled.argument_bytes > 0


def test_the_peak_is_close_to_the_compilers():
    model, x = Tower(depth=6, width=32), inputs(16, 32, 32)
    traced = rt.timeline(loss, model, x, differentiate=True).peak_bytes
    compiled = rt.measure(loss, model, x, differentiate=True, target="cpu").temp_bytes
    assert 0.7 * compiled < traced < 1.5 * compiled


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plots_are_written(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"timeline.{ending}"
    rt.timeline(loss, nnx.eval_shape(Tower), inputs(), differentiate=True).plot(path)
    assert path.stat().st_size > 1000


def test_text_json_and_repr_agree():
    result = rt.timeline(loss, nnx.eval_shape(Tower), inputs(), differentiate=True)
    data = json.loads(json.dumps(result.as_dict()))
    assert data["peak_bytes"] == result.peak_bytes == data["bytes"][data["peak_index"]]
    assert "layers.[0:3]" in str(result)
    assert repr(result) == f"Timeline({len(result.bytes)} operations, peak_bytes={result.peak_bytes})"

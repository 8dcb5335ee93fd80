# SPDX-License-Identifier: Apache-2.0
"""What `explain` says of values in pieces."""

import jax.numpy as jnp
from flax import nnx

import remattools as rt

from .test_evaluate import HIDDEN, VOCABULARY, Model, X, loss


def _explain(rules, fn=loss):
    return rt.explain(fn, nnx.eval_shape(lambda: Model(nnx.Rngs(0))), X, rules=rules)


def test_each_stretch_has_its_axis_its_bytes_and_its_line():
    (one,) = _explain({"@loss": rt.Tile(4)}).tiles
    assert (one.module, one.largest, one.axis, one.pieces) == ("@loss", f"f32[32,{VOCABULARY}]", 0, 4)
    assert one.vanished_bytes >= 3 * 32 * VOCABULARY * 4
    assert dict(one.recomputed)["dot_general"] >= 1
    assert f"f32[8,{VOCABULARY}]" in one.whole
    assert "test_evaluate.py" in one.source
    assert one.kept == ("f32[32]", "f32[32]")


def test_the_table_names_module_value_and_what_is_computed_again():
    text = str(_explain({"@loss": rt.Tile(4)}))
    assert "computed again" in text
    assert f"f32[32,{VOCABULARY}]" in text
    assert "computed again" not in str(_explain({".": "nothing_saveable"}))


def test_a_value_that_stays_whole_is_named_with_its_reason():
    def fn(model, x):
        hidden = model.hide(x)
        return jnp.linalg.eigh(hidden.T @ hidden)[1].sum() + jnp.linalg.qr(jnp.exp(x @ x.T))[0].sum()

    uncut = _explain({"@loss": rt.Tile(4)}, fn).uncut
    assert any("qr has no axis" in one.reason for one in uncut)
    assert HIDDEN  # values inside modules are not the loss's
    assert all(one.module == "@loss" for one in uncut)


def test_a_tiled_function_is_explained_without_rules():
    assert _explain(None, rt.tile(loss)).tiles

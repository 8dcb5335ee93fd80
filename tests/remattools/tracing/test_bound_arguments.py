# SPDX-License-Identifier: Apache-2.0
"""Arrays that a partial binds are arguments of the program, abstract ones too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.tracing.bound_arguments import lift_bound_arrays
from tests.remattools.models import MLP, Tower, inputs, loss

X = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)


class ByKeyword(nnx.Module):
    """A model that takes everything by keyword, and is entered by another method too."""

    def __init__(self):
        self.layers = nnx.List([MLP(8, nnx.Rngs(i)) for i in range(3)])

    def __call__(self, *, image, mask=None):
        return self.log_prob(image) if mask is None else self.log_prob(image * mask)

    def log_prob(self, x):
        for layer in self.layers:
            x = layer(x)
        return jnp.sum(x**2)


@pytest.mark.parametrize("array", [X, inputs(), np.ones((4, 6, 8), np.float32)], ids=["abstract", "jax", "numpy"])
def test_a_bound_array_is_an_argument(array):
    model = nnx.eval_shape(ByKeyword)
    fn = functools.partial(ByKeyword.__call__, image=array, mask=array)
    measured = rt.measure(fn, model, target="cpu")
    passed = rt.measure(lambda model, x, mask: model.log_prob(x * mask), model, array, array, target="cpu")
    assert (measured.argument_bytes, measured.temp_bytes, measured.flops) == (
        passed.argument_bytes,
        passed.temp_bytes,
        passed.flops,
    )


def test_models_and_static_values_stay_bound():
    fn = functools.partial(loss, Tower())
    assert lift_bound_arrays(fn) == (fn, {})
    assert lift_bound_arrays(loss) == (loss, {})
    static = functools.partial(loss, name="x", flag=True)
    assert lift_bound_arrays(static) == (static, {})


def test_positional_and_keyword_arrays_reach_their_places():
    fn, bound = lift_bound_arrays(functools.partial(lambda a, b, c, *, d, e: (a, b, c, d, e), 1, X, d=2, e=X))
    assert bound == {"1": X, "e": X}
    assert fn(3, {"1": 4, "e": 5}) == (1, 4, 3, 2, 5)
    assert fn.__name__ == "<lambda>"


CALLS = {
    "a bound method": (ByKeyword().log_prob, X),
    "a method": (ByKeyword.log_prob, ByKeyword(), X),
    "keywords of a model": (functools.partial(ByKeyword(), image=X),),
    "keywords of a method": (functools.partial(ByKeyword.__call__, image=X), ByKeyword()),
    "a loss": (lambda model, x: model(image=x), ByKeyword(), X),
    "a jitted method": (nnx.jit(ByKeyword.log_prob), ByKeyword(), X),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_entry_gives_the_same_residuals_peak_and_values(name):
    fn, *args = CALLS[name]
    expected = rt.residuals(lambda model, x: model.log_prob(x), ByKeyword(), X)
    assert rt.residuals(fn, *args).by_module() == expected.by_module()
    walked = rt.timeline(fn, *args, differentiate=True)
    assert walked.peak_bytes == rt.timeline(ByKeyword.log_prob, ByKeyword(), X, differentiate=True).peak_bytes
    rows = rt.explain(fn, *args, rules={"layers.*": "nothing_saveable"}, names=True).regions
    assert [value.label for value in rows[0].values if value.kind == "module"] == ["up", "down"]


def test_a_bound_keyword_is_named_in_the_residuals():
    rows = rt.residuals(functools.partial(lambda w, *, x: jnp.sum((w @ x) ** 2), x=jnp.ones((8, 8))), jnp.ones((8, 8)))
    assert "bound.x" in {row.path for row in rows.rows}


@pytest.mark.parametrize(
    "make_call",
    [
        pytest.param(lambda: (ByKeyword.log_prob, nnx.eval_shape(ByKeyword), X), id="method"),
        pytest.param(lambda: (functools.partial(ByKeyword.__call__, image=X), nnx.eval_shape(ByKeyword)), id="keyword"),
    ],
)
def test_any_entry_is_planned_checked_and_compared(make_call, tmp_path):
    fn, model, *batch = make_call()
    options = {"target": "cpu", "cache": tmp_path}
    plan = rt.plan(fn, model, *batch, budget=1.0, of="temp", max_compiles=2, **options)
    assert plan.measured.temp_bytes <= plan.budget_bytes
    rules = {"layers.*": "nothing_saveable"}
    result = rt.compare(fn, model, *batch, candidates={"plain": None, "all": rules}, differentiate=True, **options)
    assert result["plain"].temp_bytes == plan.points[0].measured.temp_bytes
    assert rt.check(fn, model, *batch, rules=rules, **options).residual_bytes[1] < plan.points[0].bytes

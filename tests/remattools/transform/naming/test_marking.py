# SPDX-License-Identifier: Apache-2.0
"""Names inside the forward rules of custom_vjp functions: what kernels save for their backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from tests.remattools.exactness import assert_exact
from tests.remattools.models import One, inputs, loss

WIDTH, KERNEL_PRODUCTS = 8, 6


def _kernel(x):
    for _ in range(KERNEL_PRODUCTS):
        x = jnp.sin(x @ jnp.full((WIDTH, WIDTH), 0.1))
    return x


def _make_flash(*, symbolic_zeros=False, in_jit=False, several=False, named=True):
    """A kernel like those of flash attention: its forward rule names the output, a residual."""

    @jax.custom_vjp
    def flash(x, y):
        out = _kernel(x)
        return (out, out.sum(-1)) if several else out + 0 * y

    def compute(x):
        out = _kernel(x)
        return checkpoint_name(out, "context") if named else out

    run = jax.jit(compute) if in_jit else compute

    def forward(x, y):
        if symbolic_zeros:
            x, y = x.value, y.value
        out = run(x)
        return ((out, out.sum(-1)) if several else out), (x, out)

    def backward(residuals, g):
        x, out = residuals
        g = g[0] if several else g
        return g * out + jnp.cos(x), jnp.zeros_like(x)

    flash.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
    return flash


class Attention(nnx.Module):
    def __init__(self, flash, rngs, scanned=0):
        self.q = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.flash, self.scanned = flash, scanned

    def attend(self, x):
        out = self.flash(self.q(x), jax.lax.stop_gradient(x))
        return out[0] if isinstance(out, tuple) else out

    def __call__(self, x):
        if self.scanned:
            return jax.lax.scan(lambda c, _: (c + self.o(self.attend(c)), None), x, length=self.scanned)[0]
        return x + self.o(self.attend(x))


def _count_sines(model, x):
    """How many sines the gradient computes: one for each step of each run of the kernel."""
    graphdef, state = nnx.split(model)
    gradient = jax.grad(lambda state, x: loss(nnx.merge(graphdef, state, copy=True), x))
    return str(jax.make_jaxpr(gradient)(state, x)).count(" sin ")


def _apply(make, save=(), offload=(), **options):
    return rt.apply(One(Attention(make(), nnx.Rngs(0), **options)), {"block": rt.Remat(save=save, offload=offload)})


@pytest.mark.parametrize(
    ("options", "save", "offload", "runs"),
    [
        pytest.param({}, (), (), 2, id="control"),
        pytest.param({}, ("q",), (), 2, id="control-another-name"),
        pytest.param({}, ("@context",), (), 1, id="name"),
        pytest.param({}, (), ("@context",), 1, id="offloaded"),
        pytest.param({"in_jit": True}, ("@context",), (), 1, id="name-in-jit"),
        pytest.param({"symbolic_zeros": True}, ("@context",), (), 1, id="symbolic-zeros"),
        pytest.param({"several": True}, ("@context",), (), 1, id="several-results"),
        pytest.param({"named": False}, (f".:sin[{KERNEL_PRODUCTS - 1}]",), (), 1, id="operation"),
        pytest.param({"named": False}, (".:custom_vjp_call",), (), 1, id="result"),
        pytest.param({"named": False, "several": True}, (".:custom_vjp_call",), (), 1, id="results"),
    ],
)
def test_a_saved_residual_spares_the_second_run_of_the_kernel(options, save, offload, runs):
    make = functools.partial(_make_flash, **options)
    x = inputs()
    model = _apply(make, save, offload)
    assert _count_sines(model, x) == runs * KERNEL_PRODUCTS
    assert_exact(loss, One(Attention(make(), nnx.Rngs(0))), model, x)


@pytest.mark.parametrize("name", ["context", "other"])
def test_the_program_is_that_of_a_jax_policy(name):
    x = inputs()
    by_jax = rt.apply(
        One(Attention(_make_flash(), nnx.Rngs(0))), {"block": jax.checkpoint_policies.save_only_these_names(name)}
    )
    by_name = _apply(_make_flash, ("@context",))
    same = _count_sines(by_jax, x) == _count_sines(by_name, x)
    assert same is (name == "context")


def test_a_module_that_returns_a_kernels_result_can_be_saved():
    class Kernel(nnx.Module):
        def __call__(self, x):
            return _make_flash(named=False)(x, jax.lax.stop_gradient(x))

    class Block(nnx.Module):
        def __init__(self):
            self.proj, self.kernel = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), Kernel()

        def __call__(self, x):
            return x + self.proj(self.kernel(self.proj(x)))

    x = inputs()
    counts = [_count_sines(rt.apply(One(Block()), {"block": rt.Remat(save=save)}), x) for save in ((), ("kernel",))]
    assert counts == [2 * KERNEL_PRODUCTS, KERNEL_PRODUCTS]


def test_names_in_a_rule_are_saved_inside_a_scan():
    x = inputs()
    counts = [_count_sines(_apply(_make_flash, save, scanned=3), x) for save in ((), ("@context",))]
    assert counts == [2 * KERNEL_PRODUCTS, KERNEL_PRODUCTS]


def test_names_in_a_rule_are_listed_and_written_to_toml():
    model = One(Attention(_make_flash(), nnx.Rngs(0)))
    row = rt.explain(model, {"block": "nothing_saveable"}, names=True, args=(inputs(),)).regions[0]
    reach = {value.label: value.reachable for value in row.values}
    assert reach["@context"] is True
    rules = rt.Rules({"block": rt.Remat(save=("@context",))})
    assert rt.Rules.from_toml(rules.to_toml()) == rules


def test_a_rule_without_any_gradient_is_left_alone():
    model = _apply(_make_flash, ("@context",))
    x = inputs()
    np.testing.assert_array_equal(
        jax.jit(lambda x: loss(model, x))(x), jax.jit(lambda x: loss(One(Attention(_make_flash(), nnx.Rngs(0))), x))(x)
    )


def test_names_in_a_rule_are_saved_under_remat3():
    x = inputs()
    with jax.enable_x64(False):
        jax.config.update("jax_remat3", True)
        try:
            model = _apply(_make_flash, ("@context",))
            assert_exact(loss, One(Attention(_make_flash(), nnx.Rngs(0))), model, x)
        finally:
            jax.config.update("jax_remat3", False)

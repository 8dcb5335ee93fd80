# SPDX-License-Identifier: Apache-2.0
"""Names of `offload=` that put nothing into host memory are found, and only those."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.analysis.offloads import find_idle_offloads
from tests.remattools.exactness import assert_exact

WIDTH, LAYERS = 8, 4


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return checkpoint_name(self.down(jnp.sin(self.up(x))) + x, "residual")


class Stack(nnx.Module):
    """Layers in a scan, whose carry is the input of each."""

    def __init__(self):
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Layer(rngs)))
        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Row(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Layer(nnx.Rngs(0)) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _loss(model, x):
    return jnp.mean(model(x) ** 2)


X = jnp.linspace(-1, 1, 16 * WIDTH).reshape(16, WIDTH)
CARRY = X.size * 4


def _count_host_bytes(model):
    return rt.residuals(_loss, model, X).host_bytes


@pytest.mark.parametrize(
    ("offload", "idle", "values"),
    [
        pytest.param(("up",), [], 1, id="read-by-the-backward-pass"),
        pytest.param((".:input",), [], 1, id="input"),
        pytest.param((".:input", "up"), [], 2, id="both"),
        pytest.param(("@residual",), ["@residual"], 0, id="what-the-region-returns"),
        pytest.param(("up", "@residual"), ["@residual"], 1, id="one-of-two"),
    ],
)
@pytest.mark.parametrize(("make", "path"), [(Stack, "layers"), (Row, "layers.*")])
def test_names_without_effect_are_found(make, path, offload, idle, values):
    model = rt.apply(make(), {path: rt.Remat(offload=offload)})
    before = nnx.graphdef(model)
    host_bytes = _count_host_bytes(model)
    assert host_bytes == values * LAYERS * CARRY
    found = find_idle_offloads(model, host_bytes, lambda: _count_host_bytes(model))
    assert [each.name for each in found] == idle
    assert all(each.has_others is (values > 0) for each in found)
    assert nnx.graphdef(model) == before


def test_an_offloaded_input_is_not_saved_on_the_device_too():
    model = Stack()
    device = []
    for action in ("nothing_saveable", rt.Remat(save=(".:input",)), rt.Remat(offload=(".:input",))):
        with rt.applied(model, {"layers": action}):
            device.append(rt.residuals(_loss, model, X).computed_bytes)
    assert device[0] == device[1] == device[2] + LAYERS * CARRY


@pytest.mark.parametrize(("make", "path"), [(Stack, "layers"), (Row, "layers.*")])
def test_offloaded_inputs_change_no_gradient(make, path):
    assert_exact(_loss, make(), rt.apply(make(), {path: rt.Remat(offload=(".:input",))}), X)


def test_groups_are_asked_too():
    model = rt.apply(Row(), {"layers.*": rt.Remat(offload=("up", "@residual"), group=2)})
    found = find_idle_offloads(model, _count_host_bytes(model), lambda: _count_host_bytes(model))
    assert "up" not in [each.name for each in found]


def test_arguments_that_are_one_array_stay_one():
    class Attention(nnx.Module):
        def __call__(self, query, key):
            return query * 2 if query is key else query * 3

    class Outer(nnx.Module):
        def __init__(self):
            self.attention = Attention()

        def __call__(self, x):
            return self.attention(x, x)

    model = rt.apply(Outer(), {".": rt.Remat(save=("attention:input",))})
    gradient = jax.grad(lambda x: model(x).sum())(X)
    assert (gradient == 2).all()

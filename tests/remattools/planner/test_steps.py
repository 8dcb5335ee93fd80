# SPDX-License-Identifier: Apache-2.0
"""Whole train steps: the peak counts optimizer state and gradients, and the step computes what it did."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.memory import compute_live_bytes
from remattools.planner.model.outline import Outline, build_outline
from remattools.planner.model.time import get_rates

from ..exactness import assert_same_values
from ..models import MLP, Tower, inputs, loss
from .test_loops import Scanned

WIDTH, SHAPE = 16, (16, 32, 16)


def tower() -> Tower:
    return Tower(4, WIDTH, block=MLP)


def adamw(model: Any) -> nnx.Optimizer[Any]:
    return nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)


def abstract(make: Callable[[], Any]) -> tuple[Any, Any, Any]:
    model = nnx.eval_shape(make)
    optimizer = nnx.eval_shape(lambda: adamw(make()))
    return model, optimizer, jax.ShapeDtypeStruct(SHAPE, jnp.float32)


def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, grads)
    return value


jitted = nnx.jit(step)


def with_aux(model: Any, optimizer: Any, x: jax.Array) -> Any:
    def both(model: Any, x: jax.Array) -> Any:
        out = model(x)
        return jnp.sum(out**2), out.mean()

    (value, aux), grads = nnx.value_and_grad(both, has_aux=True)(model, x)
    optimizer.update(model, grads)
    return value, aux


def clipped(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss)(model, x)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, 1.0 / norm)
    optimizer.update(model, jax.tree.map(lambda leaf: leaf * scale, grads))
    return value


def averaged(model: Any, optimizer: Any, x: jax.Array) -> Any:
    before = nnx.state(model, nnx.Param)
    value = step(model, optimizer, x)
    return value, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before, nnx.state(model, nnx.Param))


def two_losses(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    first, one = nnx.value_and_grad(loss)(model, x)
    second, two = nnx.value_and_grad(lambda model, x: jnp.sum(jnp.abs(model(x))))(model, x[:4])
    optimizer.update(model, jax.tree.map(jnp.add, one, two))
    return first + second


def evaluated(model: Any, optimizer: Any, x: jax.Array) -> Any:
    """A forward pass that nothing is differentiated through, after the update."""
    value = jitted(model, optimizer, x)
    return value, loss(model, x)


def functional(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params: Any) -> jax.Array:
        return loss(nnx.merge(graphdef, params, rest, copy=True), x)

    value, grads = jax.value_and_grad(of_params)(params)
    optimizer.update(model, grads)
    return value


def accumulated(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    """Gradients of four parts, one after the other."""

    def body(total: Any, model: Any, part: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = nnx.value_and_grad(loss)(model, part)
        return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    parts = x.reshape(4, -1, *x.shape[1:])
    scan = nnx.scan(body, in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
    total, values = scan(zeros, model, parts)
    optimizer.update(model, total)
    return values.sum()


def counted(model: Any, optimizer: Any, x: jax.Array) -> None:
    """Gradients accumulated by a loop with an unknown trip count."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def body(index: Any, total: Any) -> Any:
        grads = jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest, copy=True), x[index]))(params)
        return jax.tree.map(jnp.add, total, grads)

    trip_count = jnp.argmax(x[:, 0, 0])
    optimizer.update(model, jax.lax.fori_loop(0, trip_count, body, jax.tree.map(jnp.zeros_like, params)))


def repeated(model: Any, optimizer: Any, x: jax.Array) -> None:
    """Several steps in a scan."""

    def body(carry: Any, part: jax.Array) -> tuple[Any, jax.Array]:
        return carry, step(*carry, part)

    parts = x.reshape(4, -1, *x.shape[1:])
    nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))((model, optimizer), parts)


def only_biases(model: Any, optimizer: Any, x: jax.Array) -> Any:
    """The rest of the model is frozen."""
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("bias"))))(model, x)


STEPS = [step, jitted, with_aux, clipped, averaged, evaluated, functional, only_biases]


def outlined(fn: Any, make: Callable[[], Any] = tower) -> Outline:
    model, optimizer, x = abstract(make)
    return build_outline(fn, model, (optimizer, x), get_rates("cpu"), differentiate=False)


def count_copies_and_iterations(shape: Outline) -> list[tuple[int, int]]:
    return [(call.copies, call.iterations) for call in shape.calls]


@pytest.mark.parametrize("fn", STEPS, ids=lambda fn: getattr(fn, "__name__", "jitted"))
def test_each_block_is_seen_once_with_its_backward_pass(fn: Any) -> None:
    shape = outlined(fn)
    assert [path for path, _ in shape.visits] == [("layers", index) for index in range(4)]
    assert count_copies_and_iterations(shape) == [(1, 1)] * 4
    assert [call.backward for call in shape.calls] == sorted((c.backward for c in shape.calls), reverse=True)


def test_blocks_inside_loops_of_a_step() -> None:
    assert count_copies_and_iterations(outlined(accumulated)) == [(1, 4)] * 4
    assert count_copies_and_iterations(outlined(repeated)) == [(1, 4)] * 4
    assert count_copies_and_iterations(outlined(counted)) == [(1, 1)] * 4
    assert count_copies_and_iterations(outlined(accumulated, Scanned)) == [(6, 24)]
    assert count_copies_and_iterations(outlined(step, Scanned)) == [(6, 6)]
    assert len(outlined(two_losses).visits) == 8


def test_the_peak_of_a_step_includes_gradients() -> None:
    def at_the_end(shape: Outline) -> int:
        return compute_live_bytes(shape.around, shape.around.forward)[shape.calls[0].backward]

    model, _, x = abstract(tower)
    of_loss = build_outline(loss, model, (x,), get_rates("cpu"))
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert at_the_end(outlined(step)) >= at_the_end(of_loss) + 0.7 * parameters


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("measured")


def assert_same_step(fn: Any, make: Callable[[], Any], rules: rt.Rules) -> None:
    """Both runs return and leave behind the same."""
    results = []
    for chosen in (None, rules):
        model = make()
        if chosen is not None:
            rt.apply(model, chosen)
        optimizer = adamw(model)
        out = nnx.jit(lambda *args: fn(*args))(model, optimizer, inputs(*SHAPE))
        results.append([jax.tree.leaves(out), nnx.to_pure_dict(nnx.state(model)), jax.tree.leaves(optimizer)])
    assert_same_values(results[1], results[0])


@pytest.mark.parametrize(
    ("fn", "make"),
    [
        pytest.param(jitted, tower, id="adamw"),
        pytest.param(two_losses, tower, id="two losses"),
        pytest.param(accumulated, Scanned, id="accumulated over a scanned tower"),
    ],
)
def test_a_step_is_planned_at_half_of_its_memory(fn: Any, make: Callable[[], Any], directory: pathlib.Path) -> None:
    args = abstract(make)
    options: Any = {"differentiate": False, "target": "cpu", "cache": directory}
    plain = rt.measure(fn, *args, **options)
    plan = rt.plan(fn, *args, budget=0.5, of="temp", max_compiles=5, **options)
    assert plan.measured.temp_bytes <= 0.5 * plain.temp_bytes
    assert len(plan.rules) <= 2
    model, *rest = abstract(make)
    rt.apply(model, rt.Rules.from_toml(plan.to_toml()))
    measured = rt.measure(fn, model, *rest, target="cpu", differentiate=False)
    assert measured.temp_bytes == plan.measured.temp_bytes
    assert measured.total_bytes == plan.measured.total_bytes
    assert_same_step(fn, make, plan.rules)


def test_a_step_peaks_higher_than_its_gradient(directory: pathlib.Path) -> None:
    model, optimizer, x = abstract(tower)
    whole = rt.frontier(jitted, model, optimizer, x, differentiate=False, target="cpu", cache=directory, max_compiles=3)
    gradient = rt.measure(loss, model, x, differentiate=True, target="cpu", cache=directory)
    moments = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.size > 1)
    assert whole.plain_bytes >= gradient.total_bytes + moments
    assert whole.least_bytes < whole.plain_bytes


def test_a_step_of_scanned_layers_is_planned_for_a_tpu(directory: pathlib.Path, tpu: str) -> None:
    model, optimizer, _ = abstract(lambda: Scanned(4))
    # Small values are in a TPU's on-chip memory and do not count as temporaries.
    args = (model, optimizer, jax.ShapeDtypeStruct((512, 256, WIDTH), jnp.float32))
    options: Any = {"differentiate": False, "target": tpu, "cache": directory}
    plan = rt.plan(jitted, *args, budget=0.7, of="temp", max_compiles=2, **options)
    assert len(plan.rules)  # control
    assert plan.measured.temp_bytes <= 0.7 * rt.measure(jitted, *args, **options).temp_bytes
    with rt.applied(model, plan.rules):
        assert rt.measure(jitted, *args, **(options | {"cache": None})).temp_bytes == plan.measured.temp_bytes
    assert plan.measured.estimated_cycles is not None


@pytest.mark.parametrize(
    ("fn", "differentiate", "what"),
    [
        pytest.param(
            lambda model, optimizer, x: loss(model, x), False, "no block of the model has a backward", id="loss"
        ),
        pytest.param(lambda model, optimizer, x: x.sum(), False, "no block of the model runs", id="no model"),
        pytest.param(step, True, "differentiated twice", id="step as a loss"),
    ],
)
def test_a_function_that_is_not_a_step_is_refused(fn: Any, differentiate: bool, what: str) -> None:
    model, optimizer, x = abstract(tower)
    with pytest.raises(rt.MeasureError, match=what) as caught:
        rt.plan(fn, model, optimizer, x, budget=0.5, target="cpu", differentiate=differentiate)
    assert caught.value.fix

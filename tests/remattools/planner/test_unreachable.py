# SPDX-License-Identifier: Apache-2.0
"""The error of a budget that nothing meets: the whole table, what no rule reaches, and fixes that work when pasted."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.budget import compute_budget_bytes
from remattools.planner.unreachable import format_budget

from ..models import MLP, Tower, loss

X = jax.ShapeDtypeStruct((16, 64, 32), jnp.float32)


def _build() -> Any:
    return Tower(4, 32, block=MLP)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("measured")


def _fail(fn: Any, *args: Any, budget: Any, **options: Any) -> rt.BudgetError:
    with pytest.raises(rt.BudgetError) as caught:
        rt.plan(fn, *args, budget=budget, target="cpu", **({"max_compiles": 2} | options))
    return caught.value


def test_the_table_has_everything_that_was_compiled(directory: pathlib.Path) -> None:
    lines: list[str] = []
    error = _fail(loss, nnx.eval_shape(_build), X, budget=1000, of="temp", progress=lines.append)
    assert len(re.findall(r"save nothing", error.why)) == len(lines) - 1
    assert "layers.*: save nothing, 2 in a region" in error.why
    assert "plain" in error.why


def test_what_no_rule_reaches_is_apart_from_the_blocks(directory: pathlib.Path) -> None:
    error = _fail(loss, nnx.eval_shape(_build), X, budget=1000, cache=directory)
    outside, inside = error.why.split("and of the blocks")
    assert "arguments: parameters, batch" in outside
    assert "results: gradients" in outside
    assert "head" in outside
    assert "layers." in inside
    assert "layers." not in outside.split("no rule can reach")[1]
    temporaries = _fail(loss, nnx.eval_shape(_build), X, budget=1000, of="temp", cache=directory)
    assert "arguments: parameters" not in temporaries.why  # control


def test_the_suggested_budget_is_met(directory: pathlib.Path) -> None:
    model = nnx.eval_shape(_build)
    error = _fail(loss, model, X, budget=1000, cache=directory)
    budget = re.match(r'budget="([^"]+)"', error.fix)
    assert budget is not None
    found = rt.plan(loss, model, X, budget=budget[1], target="cpu", cache=directory, max_compiles=2)
    assert found.measured.total_bytes <= found.budget_bytes
    assert f"the minimum reached is {found.measured.total_bytes} bytes" in error.what


def test_fewer_rows_are_suggested_in_proportion(directory: pathlib.Path) -> None:
    model = nnx.eval_shape(_build)
    least = _fail(loss, model, X, budget=1000, of="temp", cache=directory)
    minimum = int(re.findall(r"is (\d+) bytes", least.what)[0])
    error = _fail(loss, model, X, budget=int(0.6 * minimum), of="temp", cache=directory)
    rows = re.findall(r"about (\d+) instead of 16", error.fix)
    assert rows == ["9"]
    fewer = jax.ShapeDtypeStruct((int(rows[0]), *X.shape[1:]), X.dtype)
    assert rt.plan(loss, model, fewer, budget=int(0.65 * minimum), of="temp", target="cpu").rules
    assert "instead of" not in least.fix.split("or ")[0]
    assert "even" not in error.fix


class Noisy(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(jnp.sin(self.up(x)))


class Keyed(nnx.Module):
    def __init__(self, implementation: str) -> None:
        rngs = nnx.Rngs(jax.random.key(0, impl=implementation))
        self.layers = nnx.List([Noisy(32, rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("implementation", "is_suggested"), [("threefry2x32", True), ("rbg", False)])
def test_other_keys_are_suggested_where_random_bits_are_drawn(implementation: str, is_suggested: bool) -> None:
    model = nnx.eval_shape(lambda: Keyed(implementation))
    error = _fail(loss, model, X, budget=1000, of="temp")
    assert ('"jax_default_prng_impl", "rbg"' in error.fix) is is_suggested


def test_masks_are_suggested_and_the_notes_are_in_the_reason() -> None:
    curve = rt.frontier(loss, nnx.eval_shape(lambda: Keyed("threefry2x32")), X, of="temp", target="cpu", max_compiles=2)
    curve = dataclasses.replace(curve, notes=("bits are drawn again",), points=curve.points[:1])
    with pytest.raises(rt.BudgetError) as caught:
        curve.plan(1000)
    assert "bits are drawn again" in caught.value.why
    assert 'rules.add_policy("dropout_masks_saveable")' in caught.value.fix
    kept = dataclasses.replace(curve.points[0], rules=rt.Rules({"layers.*": "dropout_masks_saveable"}))
    with pytest.raises(rt.BudgetError) as caught:
        dataclasses.replace(curve, points=(*curve.points, kept)).plan(1000)
    assert "add_policy" not in caught.value.fix  # control: the planner saved them already


def _step(model: Any, optimizer: Any, x: Any) -> Any:
    value, gradients = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, gradients)
    return value


@pytest.mark.parametrize(("donated", "is_suggested"), [((), True), ((0, 1), False)], ids=["kept", "donated"])
def test_donation_is_suggested_where_arguments_are_kept(donated: tuple[int, ...], is_suggested: bool) -> None:
    def build() -> Any:
        model = Tower(2, 64, block=MLP)
        return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    model, optimizer = nnx.eval_shape(build)
    step = nnx.jit(_step, donate_argnums=donated)
    x = jax.ShapeDtypeStruct((4, 8, 64), jnp.float32)
    error = _fail(step, model, optimizer, x, budget=1000, differentiate=False)
    assert ("donate_argnums=(0, 1)" in error.fix) is is_suggested
    assert "more devices or a smaller model" in error.fix


def test_a_time_limit_says_what_was_not_compiled(directory: pathlib.Path) -> None:
    error = _fail(loss, nnx.eval_shape(_build), X, budget=1000, of="temp", time_limit_s=0.0)
    assert "saving nothing on layers.* was not compiled yet" in error.why
    assert "time_limit_s" in error.fix


@pytest.mark.parametrize("count", [1, 700, 1024, 10**6 + 1, 2**30, 21_874_532_123, 2**40 + 1])
def test_a_budget_to_paste_is_never_below_the_bytes(count: int) -> None:
    meant = compute_budget_bytes(format_budget(count), target=rt.find_target("cpu"), plain_bytes=1)
    assert count <= meant <= 1.11 * count


class _Rematerialised(nnx.Module):
    """Blocks that the model's own code rematerialises, or not."""

    def __init__(self, has_remat: bool) -> None:
        self.layers = nnx.List([MLP(32, nnx.Rngs(i)) for i in range(3)])
        self.has_remat = has_remat

    def __call__(self, x: jax.Array) -> jax.Array:
        def run_layers(x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = x + layer(x)
            return x

        return (jax.checkpoint(run_layers) if self.has_remat else run_layers)(x)


@pytest.mark.parametrize("has_remat", [True, False], ids=["remat", "control"])
def test_the_models_own_checkpoint_is_named(has_remat: bool) -> None:
    error = _fail(loss, nnx.eval_shape(lambda: _Rematerialised(has_remat)), X, budget=1000, of="temp")
    assert ("model's own jax.checkpoint of run_layers at" in error.why) is has_remat
    assert ("rematerialisation switched off" in error.fix) is has_remat

# SPDX-License-Identifier: Apache-2.0
"""Layers that a scan runs: one choice for all of them, whose values are saved once per iteration."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.memory import build_timetable
from remattools.planner.model.outline import Outline, build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.assignments import Assignment
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from ..exactness import assert_exact
from ..models import MLP, Block, inputs, loss

WIDTH = 16


def stacked(block: Any, length: int) -> Any:
    """Layers in one module."""
    return nnx.split_rngs(splits=length)(nnx.vmap(lambda rngs: block(WIDTH, rngs)))(nnx.Rngs(0))


def run(x: jax.Array, layers: Any) -> jax.Array:
    return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)


class Scanned(nnx.Module):
    def __init__(self, length: int = 6, block: Any = MLP) -> None:
        self.stack = stacked(block, length)
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(run(x, self.stack))


class OverStates(Scanned):
    """`jax.lax.scan` over states."""

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, states = nnx.split(self.stack)
        return self.head(jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, states)[0])


class Rematerialised(Scanned):
    """The user's own remat in the scan: nothing is stacked but its inputs, whatever the rules say."""

    def __call__(self, x: jax.Array) -> jax.Array:
        body = nnx.remat(lambda x, layer: layer(x))
        return self.head(nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack))


class EncoderDecoder(nnx.Module):
    def __init__(self) -> None:
        self.encoder, self.decoder = Scanned(3), Scanned(2, Block)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(x))


class Pair(nnx.Module):
    """Two kinds of layers, which the body of the scan calls itself."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = MLP(width, rngs), Block(width, rngs)


class Pairs(nnx.Module):
    def __init__(self) -> None:
        self.pairs = stacked(Pair, 4)

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, pair: Pair) -> jax.Array:
            return pair.second(pair.first(x))

        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.pairs)


class Stage(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: MLP(width, rngs)))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return run(x, self.layers)


class Stages(nnx.Module):
    """A scan of scans."""

    def __init__(self) -> None:
        self.stages = stacked(Stage, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return run(x, self.stages)


class Group(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Block(width, rngs), MLP(width, rngs), MLP(width, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Groups(nnx.Module):
    """A list in a scan."""

    def __init__(self) -> None:
        self.groups = stacked(Group, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return run(x, self.groups)


class Lists(nnx.Module):
    """Scans in a list."""

    def __init__(self) -> None:
        self.stages = nnx.List([Stage(WIDTH, nnx.Rngs(index)) for index in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in self.stages:
            x = stage(x)
        return x


class Normed(nnx.Module):
    """State that changes, and random numbers."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(self.drop(jnp.sin(jnp.cos(self.norm(self.up(x))))))


class Listed(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([MLP(WIDTH, nnx.Rngs(index)) for index in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Ensemble(Listed):
    """Blocks under `vmap`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jax.vmap(layer)(x)
        return x


class Branches(Listed):
    """A layer may be left out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.cond(x.sum() > 0, lambda layer, x: layer(x), lambda _, x: x, layer, x)
        return x


def outlined(make: Any, fn: Any = loss) -> Outline:
    return build_outline(
        fn, nnx.eval_shape(make), (jax.ShapeDtypeStruct((4, 6, WIDTH), jnp.float32),), get_rates("cpu")
    )


@pytest.mark.parametrize(
    ("make", "found"),
    [
        pytest.param(Scanned, {"stack": (6, 6)}, id="scan"),
        pytest.param(OverStates, {"stack": (6, 6)}, id="over states"),
        pytest.param(Rematerialised, {"stack": (0, 6)}, id="remat in a scan"),
        pytest.param(EncoderDecoder, {"encoder.stack": (3, 3), "decoder.stack": (2, 2)}, id="two scans"),
        pytest.param(Pairs, {"pairs.first": (4, 4), "pairs.second": (4, 4)}, id="two kinds"),
        pytest.param(Stages, {"stages.layers": (6, 6)}, id="scan of scans"),
        pytest.param(Groups, {f"groups.layers.{index}": (2, 2) for index in range(3)}, id="list in a scan"),
        pytest.param(Lists, {f"stages.{index}.layers": (3, 3) for index in range(2)}, id="scans in a list"),
        pytest.param(lambda: Scanned(3, Normed), {"stack": (3, 3)}, id="state and random numbers"),
        pytest.param(lambda: nnx.RNN(nnx.LSTMCell(WIDTH, 8, rngs=nnx.Rngs(0))), {"cell": (6, 6)}, id="steps in time"),
        pytest.param(Branches, {f"layers.{index}": (1, 1) for index in range(3)}, id="branches"),
        pytest.param(Ensemble, {f"layers.{index}": (1, 1) for index in range(3)}, id="vmap"),
    ],
)
def test_blocks_in_loops_are_found_with_how_often_they_run(make: Any, found: dict[str, tuple[int, int]]) -> None:
    shape = outlined(make)
    seen = {
        ".".join(map(str, path)): (call.copies, call.iterations)
        for (path, _), call in zip(shape.visits, shape.calls, strict=True)
    }
    assert seen == found


def test_rules_of_blocks_in_loops_are_few() -> None:
    def written(make: Any, split: int) -> list[str]:
        space = Space(outlined(make))
        rules = write_rules(space, Assignment(0, len(space.levels) - 1, split))
        rt.apply(nnx.eval_shape(make), rules)  # every rule matches
        return [pattern.text for pattern, _ in rules]

    assert written(Lists, 2) == ["stages.*.layers"]
    assert written(Lists, 1) == ["stages.[0].layers"]
    assert written(Groups, 1) == ["groups.layers.[0]"]
    assert written(EncoderDecoder, 2) == ["encoder.stack", "decoder.stack"]


def test_stacked_values_count_once_per_iteration() -> None:
    def kept_bytes(length: int) -> float:
        shape = outlined(lambda: Scanned(length))
        timetable = build_timetable(shape.around, shape.calls)
        (plain,) = (problem.plain_choice for problem in shape.problems)
        return float(timetable.saved_copies.max() * plain.saved_bytes)

    assert kept_bytes(8) == 2 * kept_bytes(4) > 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("measured")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        pytest.param(Scanned, "stack", id="scan"),
        pytest.param(Stages, "stages.layers", id="scan of scans"),
        pytest.param(lambda: Scanned(6, Normed), "stack", id="state and random numbers"),
    ],
)
def test_a_scanned_tower_is_planned_at_half_its_memory(make: Any, pattern: str, directory: pathlib.Path) -> None:
    model, x = nnx.eval_shape(make), jax.ShapeDtypeStruct((16, 32, WIDTH), jnp.float32)
    plan = rt.plan(loss, model, x, budget=0.5, of="temp", target="cpu", cache=directory, max_compiles=5)
    plain = rt.measure(loss, model, x, differentiate=True, target="cpu", cache=directory)
    assert plan.measured.temp_bytes <= 0.5 * plain.temp_bytes
    assert [text.text for text, _ in plan.rules] == [pattern]
    again = rt.apply(nnx.eval_shape(make), rt.Rules.from_toml(plan.to_toml()))
    measured = rt.measure(loss, again, x, differentiate=True, target="cpu")
    assert measured.temp_bytes == plan.measured.temp_bytes
    assert measured.total_bytes == plan.measured.total_bytes
    real = make()
    assert_exact(loss, real, rt.apply(nnx.clone(real), plan.rules), inputs(4, 6, WIDTH))


def test_blocks_that_are_differentiated_otherwise_are_refused() -> None:
    def derived(model: Any, x: jax.Array) -> jax.Array:
        slope = jax.grad(lambda x: jnp.sum(model(x)))(x)
        return jnp.sum(slope**2)

    with pytest.raises(rt.MeasureError, match="differentiated twice"):
        outlined(Listed, derived)
    with pytest.raises(rt.MeasureError, match="differentiated twice, or in forward mode"):
        outlined(Listed, lambda model, x: jnp.sum(jax.jvp(model, (x,), (x,))[1]))


class Deep(nnx.Module):
    """Layers whose inputs, one for each iteration, are most of what a loop saves without names."""

    def __init__(self, length: int) -> None:
        self.stack = stacked(MLP, length)

    def __call__(self, x: jax.Array) -> jax.Array:
        return run(x, self.stack)


def test_regions_inside_regions_are_found_where_inputs_are_the_peak(tmp_path: pathlib.Path) -> None:
    x = jax.ShapeDtypeStruct((2048, WIDTH), jnp.float32)
    model = nnx.eval_shape(lambda: Deep(64))
    with rt.applied(model, {"stack": "nothing_saveable"}):
        single = rt.measure(loss, model, x, differentiate=True, target="cpu", cache=tmp_path).temp_bytes
    found = rt.plan(loss, model, x, budget=int(0.6 * single), of="temp", target="cpu", max_compiles=4, cache=tmp_path)
    ((pattern, action),) = found.rules
    assert pattern.text == "stack"
    assert action == rt.Remat(group=8, nested=True)
    assert "8 in a region of regions" in str(found)
    curve = rt.frontier(loss, model, x, of="temp", target="cpu", max_compiles=3, cache=tmp_path)
    assert any(point.rules == found.rules for point in curve.points)


@pytest.mark.parametrize(
    ("length", "size"), [(64, 8), (48, 6), (28, 4), (61, 8), (96, 8), (6, None)], ids=lambda value: str(value)
)
def test_nested_groups_have_a_size_that_divides_the_loop(length: int, size: int | None) -> None:
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    model = nnx.eval_shape(lambda: Deep(length))
    space = Space(build_outline(loss, model, (x,), get_rates("cpu")))
    nested = [assignment for assignment in space.assignments if assignment.nested]
    assert {assignment.group for assignment in nested} == ({size} if size else set())
    for assignment in nested:
        number = space.assignments.index(assignment)
        single = space.assignments.index(Assignment(assignment.first, assignment.first, 0))
        assert space.bytes[number] < space.bytes[single]
        assert space.cycles[number] > space.cycles[single]

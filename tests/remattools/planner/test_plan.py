# SPDX-License-Identifier: Apache-2.0
"""Plans stay within their budgets as the compiler counts, and change memory only."""

import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.plan import _describe_subject

from ..exactness import assert_exact
from ..models import MLP, Block, Tower, inputs, loss

# The smallest model with something to choose: its compiles decide how long this file takes.
DEPTH, WIDTH, BATCH = 4, 32, (4, 64, 32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One cache for all plans of this file: equal programs are compiled once."""
    return tmp_path_factory.mktemp("measured")


def _abstract() -> tuple[Any, Any]:
    return nnx.eval_shape(lambda: Tower(DEPTH, WIDTH, block=MLP)), jax.ShapeDtypeStruct(BATCH, jnp.float32)


def _bounds(directory: pathlib.Path) -> tuple[int, int]:
    model, x = _abstract()
    nothing = {"layers.*": "nothing_saveable"}
    found = rt.compare(
        loss, model, x, candidates={"plain": None, "full": nothing}, target="cpu", differentiate=True, cache=directory
    )
    return found["full"].temp_bytes, found["plain"].temp_bytes


def test_plans_are_within_budget_and_the_best_compiled(directory: pathlib.Path) -> None:
    least, most = _bounds(directory)
    assert least < 0.6 * most  # control: there is something to plan
    model, x = _abstract()
    cycles = []
    for budget in np.linspace(least, most, 4):
        found = rt.plan(loss, model, x, budget=int(budget), of="temp", target="cpu", cache=directory, max_compiles=4)
        assert found.measured.temp_bytes <= budget
        own = next(point for point in found.points if point.rules == found.rules)
        assert not any(p.bytes <= budget and p.cycles < own.cycles for p in found.points)
        cycles.append(own.cycles)
    assert cycles[-1] < cycles[0]
    assert all(later <= 1.05 * earlier for earlier, later in itertools.pairwise(cycles))


def test_the_rule_file_reproduces_the_measurement(directory: pathlib.Path) -> None:
    model, x = _abstract()
    found = rt.plan(loss, model, x, budget=0.6, of="temp", target="cpu", cache=directory)
    text = found.to_toml()
    assert "# target cpu" in text
    rules = rt.Rules.from_toml(text)
    assert rules == found.rules
    again = rt.apply(nnx.eval_shape(lambda: Tower(DEPTH, WIDTH, block=MLP)), rules)
    measured = rt.measure(loss, again, x, target="cpu", differentiate=True)
    assert measured.temp_bytes == found.measured.temp_bytes


def test_gradients_under_a_plan_are_exact(directory: pathlib.Path) -> None:
    abstract, shape = _abstract()
    found = rt.plan(loss, abstract, shape, budget=0.6, of="temp", target="cpu", cache=directory)
    assert len(found.rules)  # control: the plan does something
    plain = Tower(DEPTH, WIDTH, block=MLP)
    assert_exact(loss, plain, rt.apply(nnx.clone(plain), found.rules), inputs(*BATCH))


def test_the_model_is_left_as_it_was(directory: pathlib.Path) -> None:
    model, x = _abstract()
    rt.apply(model, {"layers.*": "dots_saveable"})
    before = [row.action for row in rt.explain(model).rows]
    rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", cache=directory)
    assert [row.action for row in rt.explain(model).rows] == before


def test_an_impossible_budget_says_what_is_possible(directory: pathlib.Path) -> None:
    model, x = _abstract()
    with pytest.raises(rt.BudgetError) as caught:
        rt.plan(loss, model, x, budget=1000, of="temp", target="cpu", cache=directory)
    least, _ = _bounds(directory)
    assert str(least) in str(caught.value) or "the minimum reached is" in str(caught.value)
    fix = caught.value.fix.split('"')[1]
    found = rt.plan(loss, model, x, budget=fix, of="temp", target="cpu", cache=directory)
    assert found.measured.temp_bytes <= found.budget_bytes


def test_the_least_memory_within_a_time(directory: pathlib.Path) -> None:
    model, x = _abstract()
    free = rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", cache=directory)
    fastest = min(point.cycles for point in free.points)
    found = rt.plan(loss, model, x, max_cycles=1.15 * fastest, of="temp", target="cpu", cache=directory)
    assert found.measured.temp_bytes < free.measured.temp_bytes
    with pytest.raises(rt.BudgetError, match="the fastest takes"):
        rt.plan(loss, model, x, max_cycles=1.0, of="temp", target="cpu", cache=directory, max_compiles=2)


def test_an_interrupt_returns_the_best_so_far(directory: pathlib.Path) -> None:
    model, x = _abstract()
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    _, most = _bounds(directory)
    found = rt.plan(loss, model, x, budget=most // 2, of="temp", target="cpu", progress=interrupt)
    assert len(found.points) == 2
    assert found.measured.temp_bytes <= most // 2


def test_a_budget_of_the_devices_memory(tpu: str, directory: pathlib.Path) -> None:
    width = 2048
    model = nnx.eval_shape(lambda: Tower(16, width, block=MLP))
    options: Any = {"target": tpu, "cache": directory}
    x = jax.ShapeDtypeStruct((131_072, width), jnp.float32)
    assert not rt.measure(loss, model, x, differentiate=True, **options).fits  # control: there is something to plan
    found = rt.plan(loss, model, x, budget="fit", max_compiles=4, **options)
    assert found.measured.fits
    assert found.measured.total_bytes <= 0.95 * 16 * 2**30  # a v5e has 16 GiB; a margin is left
    with rt.applied(model, found.rules):
        again = rt.measure(loss, model, x, differentiate=True, target=tpu)
    assert again.total_bytes == found.measured.total_bytes


def test_a_time_limit_ends_the_search(directory: pathlib.Path) -> None:
    model, x = _abstract()
    found = rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", time_limit_s=0.0)
    assert len(found.points) == 1
    with pytest.raises(rt.BudgetError) as caught:
        rt.plan(loss, model, x, budget=0.5, of="temp", target="cpu", time_limit_s=0.0)
    assert "time_limit_s" in caught.value.fix
    assert "max_compiles" not in caught.value.fix


def test_a_cache_that_cannot_be_written_costs_no_plan(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    model, x = _abstract()
    with pytest.warns(rt.CacheWarning, match="not cached"):
        found = rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", max_compiles=2, cache=tmp_path / "file")
    assert found.points


def test_complex_values_are_planned(directory: pathlib.Path) -> None:
    """JAX refuses to save them by name, so their real and imaginary parts are saved."""
    model, x = nnx.eval_shape(lambda: Tower(3, 16, block=_Spectral)), jax.ShapeDtypeStruct((128, 16), jnp.float32)
    found = rt.plan(loss, model, x, budget=0.8, of="temp", target="cpu", cache=directory)
    assert found.measured.temp_bytes <= found.budget_bytes < found.points[0].bytes
    assert any(action.save for point in found.points for _, action in point.rules)


class _Spectral(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.mix = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.mix(x)
        return x + jnp.real(jnp.fft.ifft(jnp.tanh(jnp.fft.fft(y)) * jnp.exp(1j * y)))


def test_the_heading_counts_the_arrays_of_large_arguments() -> None:
    model, x = _abstract()
    optimizer = {f"moment_{number}": x for number in range(9)}
    assert _describe_subject(model, (optimizer, x)) == f"Tower, batch dict of 9 arrays, float32{list(x.shape)}"


@pytest.mark.parametrize(
    ("options", "error", "fix"),
    [
        pytest.param({}, rt.BudgetError, "budget=", id="none"),
        pytest.param({"budget": "12 parsecs"}, rt.BudgetError, "fit", id="unit"),
        pytest.param({"budget": -1}, rt.BudgetError, "12GiB", id="negative"),
        pytest.param({"budget": True}, rt.BudgetError, "12GiB", id="bool"),
        pytest.param({"budget": "0.5"}, rt.BudgetError, "budget=0.5", id="a share as text"),
        pytest.param({"budget": "50%"}, rt.BudgetError, "budget=0.5", id="percent"),
        pytest.param({"budget": 1.5}, rt.BudgetError, "budget=0.5", id="more than the plain model"),
        pytest.param({"budget": "fit"}, rt.BudgetError, "12GiB", id="fit"),
        pytest.param({"budget": 0.5, "of": "both"}, rt.BudgetError, "temp", id="of"),
        pytest.param({"budget": 0.5, "max_compiles": 1}, rt.BudgetError, "8", id="compiles"),
        pytest.param({"budget": 10**400}, rt.BudgetError, "12GiB", id="no machine's bytes"),
        pytest.param({"budget": "9" * 400 + "GB"}, rt.BudgetError, "12GiB", id="no machine's GB"),
        pytest.param({"max_cycles": "3"}, rt.BudgetError, "max_cycles=250e6", id="cycles as text"),
        pytest.param({"max_cycles": -4.0}, rt.BudgetError, "max_cycles=250e6", id="cycles below zero"),
        pytest.param({"max_cycles": float("nan")}, rt.BudgetError, "max_cycles=250e6", id="cycles nan"),
        pytest.param({"max_cycles": True}, rt.BudgetError, "max_cycles=250e6", id="cycles bool"),
        pytest.param({"budget": 0.5, "time_limit_s": "3"}, rt.BudgetError, "time_limit_s=", id="seconds as text"),
        pytest.param({"budget": 0.5, "time_limit_s": -1}, rt.BudgetError, "time_limit_s=", id="seconds below zero"),
        pytest.param({"budget": 0.5, "differentiate": False}, rt.MeasureError, "differentiate=True", id="no step"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    options: dict[str, Any], error: type[rt.RematError], fix: str, directory: pathlib.Path
) -> None:
    model, x = _abstract()
    with pytest.raises(error) as caught:
        rt.plan(loss, model, x, target="cpu", cache=directory, **options)
    assert fix in caught.value.fix


def test_a_model_without_blocks_in_the_loss_is_refused() -> None:
    model, x = _abstract()
    with pytest.raises(rt.MeasureError, match="no block"):
        rt.plan(lambda m, x: jnp.sum(m.head(x) ** 2), model, x, budget=0.5, target="cpu")


class _Named(nnx.Module):
    """Blocks in a dict, and called by name."""

    def __init__(self) -> None:
        self.blocks = nnx.Dict({f"block_{i}": Block(8, nnx.Rngs(i)) for i in range(3)})

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = self.blocks[f"block_{i}"](x)
        return x


def test_blocks_in_a_dict_are_planned(directory: pathlib.Path) -> None:
    model, x = nnx.eval_shape(_Named), inputs(32, 16)
    plan = rt.plan(loss, model, x, budget=0.5, of="temp", target="cpu", max_compiles=6, cache=directory)
    assert plan.measured.temp_bytes <= 0.5 * rt.measure(loss, model, x, differentiate=True, target="cpu").temp_bytes
    again = rt.measure(loss, rt.apply(model, plan.rules), x, differentiate=True, target="cpu")
    assert again.temp_bytes == plan.measured.temp_bytes

# SPDX-License-Identifier: Apache-2.0
"""What random bits cost is read from the compiled program, and their cause from the traced one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.analysis import compare as comparing
from remattools.analysis import findings
from remattools.analysis.random_cost import (
    count_random_bytes,
    describe_cost,
    describe_cures,
    find_redrawn_in_call,
    may_be_costly,
)
from remattools.compiler.hlo.live_buffers import LiveBuffer
from remattools.compiler.out_of_memory import OutOfMemory
from tests.remattools.models import Tower, inputs, loss

MASKS = "dropout_masks_saveable"


class Dropped(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up, self.drop = nnx.Linear(width, width, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(jnp.sin(self.up(x)))


def build(implementation: str = "threefry2x32") -> Tower:
    with jax.default_prng_impl(implementation):
        return Tower(3, 8, block=Dropped)


def _make_row(operation: str, shape: str, count: int) -> LiveBuffer:
    return LiveBuffer(path="layers.0.drop", operation=operation, phase="forward", shape=shape, bytes=count)


# Rows at the peak of the dropout case's program for a v5e, in MiB.
ROWS = (
    _make_row("_bernoulli/_uniform", "u32[8,8,1024,1024]", 2816),
    _make_row("_bernoulli/_uniform/max", "f32[8,8,1024,1024]", 256),
    _make_row("sub", "f32[8,8,1024,1024]", 256),
    _make_row("_bernoulli/lt", "pred[8,8,1024,1024]", 192),
)


def _make_measurement(live: tuple[LiveBuffer, ...] = ROWS, **values: Any) -> rt.Measurement:
    fields = {"argument_bytes": 0, "output_bytes": 0, "alias_bytes": 0, "peak_bytes": 0, "temp_bytes": 3600}
    return rt.Measurement(**{"target": "tpu:v5e:2x2", **fields, "live": live, **values})


def test_drawn_bits_count_but_saved_masks_and_activations_do_not() -> None:
    assert count_random_bytes(_make_measurement()) == 2816 + 256
    assert count_random_bytes(_make_measurement(ROWS[2:])) == 0


@pytest.mark.parametrize(
    ("measurement", "costly"),
    [
        pytest.param(_make_measurement(), True, id="costly"),
        pytest.param(_make_measurement(ROWS[2:]), False, id="masks-saved"),
        pytest.param(_make_measurement(temp_bytes=10**6), False, id="a-small-part"),
        pytest.param(_make_measurement(target="cpu"), False, id="cpu"),
        pytest.param(_make_measurement(refusal="no"), False, id="refused"),
        pytest.param(
            _make_measurement((), out_of_memory=OutOfMemory(needed_bytes=9, limit_bytes=1, message="")), True, id="oom"
        ),
    ],
)
def test_a_cost_is_one_on_a_tpu_and_a_large_part_of_the_peak(measurement: rt.Measurement, costly: bool) -> None:
    assert may_be_costly(measurement) is costly
    redrawn = find_redrawn_in_call(
        loss, (rt.apply(build(), {"layers.*": "nothing_saveable"}), inputs()), differentiate=True
    )
    assert bool(describe_cost(measurement, redrawn)) is costly
    assert describe_cost(measurement, ()) == ""


def _step(model: Any, x: Any) -> Any:
    return nnx.value_and_grad(loss)(model, x)[0]


@pytest.mark.parametrize("differentiate", [True, False], ids=["loss", "step"])
@pytest.mark.parametrize(
    ("policy", "implementation", "count"),
    [
        pytest.param("nothing_saveable", "threefry2x32", 3, id="again"),
        pytest.param(f"nothing_saveable | {MASKS}", "threefry2x32", 0, id="masks"),
        pytest.param("nothing_saveable", "rbg", 0, id="rbg"),
        pytest.param(None, "threefry2x32", 0, id="plain"),
    ],
)
def test_bits_drawn_again_are_found(policy: str | None, implementation: str, count: int, differentiate: bool) -> None:
    model = build(implementation)
    if policy is not None:
        rt.apply(model, {"layers.*": policy})
    fn = loss if differentiate else nnx.jit(lambda model, x: nnx.grad(loss)(model, x))
    found = find_redrawn_in_call(fn, (model, inputs()), differentiate=differentiate)
    assert sum(row.count for row in found) == count
    if found:
        (row,) = found
        assert (row.path, row.shape, row.bytes) == ("layers.[0:3].drop", "u32[4,6,8]", 4 * 6 * 8 * 4)


def test_the_cures_can_be_pasted() -> None:
    assert 'jax.config.update("jax_default_prng_impl", "rbg")' in describe_cures()
    keys = nnx.Rngs(jax.random.key(0, impl="rbg")).dropout()
    assert "rbg" in str(keys.dtype)
    rules = rt.Rules({"layers.*": "nothing_saveable"}).add_policy(MASKS)
    assert find_redrawn_in_call(loss, (rt.apply(build(), rules), inputs()), differentiate=True) == ()


def _fake_measure(fn: Any, model: Any, *_: Any, **__: Any) -> rt.Measurement:
    """Measure as a TPU's compiler would: bits that are drawn again take 30 times their size."""
    redrawn = find_redrawn_in_call(loss, (model, inputs()), differentiate=True)
    return _make_measurement(temp_bytes=8200) if redrawn else _make_measurement(ROWS[2:], temp_bytes=1300)


@pytest.mark.parametrize(
    ("policy", "is_named"),
    [
        pytest.param("nothing_saveable", True, id="again"),
        pytest.param("save_only_these_names('a')", True, id="other-policy"),
        pytest.param(f"nothing_saveable | {MASKS}", False, id="masks"),
    ],
)
def test_check_names_random_bits_with_both_cures(monkeypatch: Any, tpu: str, policy: str, is_named: bool) -> None:
    monkeypatch.setattr(findings, "measure", _fake_measure)
    report = rt.check(loss, build(), inputs(), rules={"layers.*": policy}, target=tpu)
    named = [finding for finding in report.findings if finding.code == "random_bits"]
    assert bool(named) is is_named
    if named:
        assert "layers.[0:3].drop" in named[0].message
        assert MASKS in named[0].message
        assert '"rbg"' in named[0].message
        assert not report.ok


def test_compare_notes_which_candidates_draw_bits_again(monkeypatch: Any, tpu: str) -> None:
    monkeypatch.setattr(comparing, "measure", _fake_measure)
    candidates = {"plain": None, "nothing": "nothing_saveable", "masks": MASKS}
    comparison = rt.compare(loss, build(), inputs(), candidates=candidates, differentiate=True, target=tpu)
    noted = [note for note in comparison.notes if "random bits" in note]
    assert [note.split(":")[0] for note in noted] == ["nothing"]
    assert any(note == describe_cures() for note in comparison.notes)
    monkeypatch.setattr(comparing, "measure", lambda *_, **__: dataclasses.replace(_make_measurement(()), temp_bytes=9))
    quiet = rt.compare(loss, build(), inputs(), candidates=candidates, differentiate=True, target=tpu)
    assert not any("random" in note for note in quiet.notes)  # control

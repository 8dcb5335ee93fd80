# SPDX-License-Identifier: Apache-2.0
"""`compare`: one row per candidate, and the model unchanged afterwards."""

import csv
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.analysis import compare as comparing
from remattools.compiler.out_of_memory import OutOfMemory
from tests.remattools.models import Tower, inputs, loss


@pytest.fixture(scope="module")
def comparison():
    model, x = nnx.eval_shape(lambda: Tower(depth=4)), inputs(32, 16)
    before = nnx.graphdef(model)
    calls = []
    result = rt.compare(
        loss,
        model,
        x,
        candidates={
            "plain": None,
            "full": "nothing_saveable",
            "dots": rt.Remat(policy="dots_saveable"),
            "half": {"layers.[::2]": "nothing_saveable"},
            "control": rt.policies.everything_saveable,
        },
        differentiate=True,
        target="cpu",
        progress=lambda *step: calls.append(step),
    )
    assert nnx.graphdef(model) == before
    assert calls[1] == ("full", 1, 5)
    return result


def test_rows_are_measurements_under_the_rules(comparison):
    model, x = nnx.eval_shape(lambda: Tower(depth=4)), inputs(32, 16)
    with rt.applied(model, {"layers.*": "dots_saveable"}):
        alone = rt.measure(loss, model, x, differentiate=True, target="cpu")
    assert comparison["dots"].temp_bytes == alone.temp_bytes
    assert [row.name for row in comparison.rows] == ["plain", "full", "dots", "half", "control"]


def test_ratios_are_relative_to_the_first_row(comparison):
    ratios = {row.name: (row.memory_ratio, row.time_ratio) for row in comparison.rows}
    assert ratios["plain"] == (1, 1)
    assert ratios["full"][0] < ratios["half"][0] < 1 < ratios["half"][1] < ratios["full"][1]
    assert comparison.cost == "flops"  # the CPU's compiler estimates no cycles


def test_the_frontier_leaves_out_dominated_candidates(comparison):
    frontier = {row.name for row in comparison.rows if row.frontier}
    assert {"full", "half"} <= frontier
    points = {row.name: (row.memory_ratio, row.time_ratio) for row in comparison.rows}
    for name in points.keys() - frontier:
        assert any(all(a <= b for a, b in zip(points[other], points[name])) for other in frontier)


def test_every_format_has_all_rows(comparison):
    data = json.loads(comparison.to_json())
    assert data["rows"][1]["measurement"]["temp_bytes"] == comparison["full"].temp_bytes
    lines = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [int(line["temp_bytes"]) for line in lines] == [row.measurement.temp_bytes for row in comparison.rows]
    assert comparison.to_markdown().count("\n") == 7
    assert all(row.name in str(comparison) for row in comparison.rows)
    assert data["notes"] == ["full, dots, control apply to layers.*."]
    assert "note: full, dots, control apply to layers.*." in str(comparison)


def test_a_peak_without_temporaries_is_not_a_column(comparison):
    """The CPU compiler's peak leaves temporaries out, so it would be smaller than `temp` in the next column."""
    measured = comparison.rows[0].measurement
    assert measured.peak_bytes < measured.temp_bytes < measured.total_bytes
    assert str(comparison).split()[4] == "total"
    assert "without temporaries" in str(measured)
    # With large arguments it exceeds `temp`, and still leaves the temporaries out.
    assert not dataclasses.replace(measured, peak_bytes=measured.total_bytes).temporaries_in_peak
    counted = dataclasses.replace(measured, target="gpu", peak_bytes=measured.total_bytes)
    rows = tuple(dataclasses.replace(row, measurement=counted) for row in comparison.rows)
    assert str(dataclasses.replace(comparison, rows=rows)).split()[4] == "peak"
    assert "without temporaries" not in str(counted)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_written(comparison, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"comparison.{ending}"
    comparison.plot(path)
    assert path.stat().st_size > 1000


def test_step_times_are_compared_with_run():
    result = rt.compare(
        loss,
        Tower(),
        inputs(),
        candidates={"a": None, "b": "nothing_saveable"},
        differentiate=True,
        run=True,
        target="cpu",
    )
    assert result.cost == "step_s"
    assert "ms" in str(result)


def test_rule_files_and_closed_over_models(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(rt.Rules({"layers.*": "nothing_saveable"}).to_toml())
    model, x = nnx.eval_shape(Tower), inputs()
    result = rt.compare(
        lambda x: loss(model, x), x, candidates={"plain": None, "file": str(path)}, differentiate=True, target="cpu"
    )
    assert result["file"].temp_bytes < result["plain"].temp_bytes


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        pytest.param(
            lambda: rt.compare(loss, Tower(), inputs(), candidates={}), "candidates={", id="without candidates"
        ),
        pytest.param(
            lambda: rt.compare(jnp.sum, jnp.ones(3), candidates={"a": "nothing_saveable"}),
            "pass the model",
            id="without a model",
        ),
        pytest.param(
            lambda: rt.compare(
                loss, nnx.Linear(8, 8, rngs=nnx.Rngs(0)), inputs(), candidates={"a": "nothing_saveable"}
            ),
            "path of a module",
            id="without a sequence",
        ),
    ],
)
def test_calls_that_cannot_be_compared_raise_with_a_fix(call, fix):
    with pytest.raises(rt.MeasureError) as caught:
        call()
    assert fix in caught.value.fix


def test_candidates_need_names():
    with pytest.raises(rt.MeasureError, match="have no names") as caught:
        rt.compare(loss, Tower(), inputs(), candidates=["nothing_saveable"], target="cpu")
    assert '"plain": None' in caught.value.fix


def test_an_unmatched_candidate_raises_before_the_first_compile():
    calls = []
    with pytest.raises(rt.UnmatchedRuleError):
        rt.compare(
            loss,
            nnx.eval_shape(Tower),
            inputs(),
            candidates={"plain": None, "typo": {"layer.*": "nothing_saveable"}},
            progress=lambda *step: calls.append(step),
        )
    assert calls == []


def test_rules_without_a_gradient_are_noted():
    def collect_notes(fn, **options):
        candidates = {"plain": None, "full": {"layers.*": "nothing_saveable"}}
        model = nnx.eval_shape(lambda: Tower(depth=1))
        return rt.compare(fn, model, inputs(), candidates=candidates, target="cpu", **options).notes

    assert "differentiate=True" in collect_notes(loss)[0]
    assert collect_notes(loss, differentiate=True) == ()
    assert collect_notes(nnx.grad(loss)) == ()
    assert collect_notes(nnx.jit(nnx.grad(loss))) == ()


def test_on_chip_temporaries_make_the_peak_the_measure_of_memory(tpu):
    model, x = nnx.eval_shape(lambda: Tower(depth=2, width=128)), inputs(8, 128, 128)
    result = rt.compare(
        loss, model, x, candidates={"plain": None, "full": "nothing_saveable"}, differentiate=True, target=tpu
    )
    assert result["plain"].temp_bytes == 0  # so that a ratio of temporaries says nothing
    assert result.memory == "peak_bytes"
    assert result.rows[1].memory_ratio == result["full"].peak_bytes / result["plain"].peak_bytes < 1
    assert str(result).split()[1] == "peak"


def test_a_plot_without_fitting_candidates_is_empty(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    reason = OutOfMemory(needed_bytes=None, limit_bytes=None, message="no")
    rows = tuple(
        dataclasses.replace(
            row, frontier=False, measurement=dataclasses.replace(row.measurement, out_of_memory=reason, flops=None)
        )
        for row in comparison.rows
    )
    dataclasses.replace(comparison, rows=rows).plot(tmp_path / "none.svg")
    assert (tmp_path / "none.svg").stat().st_size > 1000


def test_names_may_be_numbers_and_have_brackets():
    model = nnx.eval_shape(lambda: Tower(depth=1))
    result = rt.compare(loss, model, inputs(), candidates={1: None, "[bold]x[/]": None}, target="cpu")
    assert [row.name for row in result.rows] == ["1", "[bold]x[/]"]
    assert "[bold]x[/]" in str(result)


def test_names_with_commas_and_quotes_survive_csv(comparison):
    rows = (dataclasses.replace(comparison.rows[0], name='a,"b"\nc'),)
    (line,) = csv.DictReader(io.StringIO(dataclasses.replace(comparison, rows=rows).to_csv()))
    assert line["name"] == 'a,"b"\nc'


def test_a_refused_candidate_does_not_lose_the_others(monkeypatch):
    def measure_or_fail(*args, **options):
        if measure_or_fail.calls in measure_or_fail.refused:
            measure_or_fail.calls += 1
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such layout\nmore")
        measure_or_fail.calls += 1
        return rt.measure(*args, **options)

    def run_compare(*refused):
        measure_or_fail.calls, measure_or_fail.refused = 0, refused
        model = nnx.eval_shape(lambda: Tower(depth=1))
        candidates = {"plain": None, "full": {"layers.*": "nothing_saveable"}}
        return rt.compare(loss, model, inputs(), candidates=candidates, differentiate=True, target="cpu")

    monkeypatch.setattr(comparing, "measure", measure_or_fail)
    result = run_compare(1)
    assert [row.measurement.fits for row in result.rows] == [True, False]
    assert result.rows[1].memory_ratio is None
    assert not result.rows[1].frontier
    assert "full does not compile: UNIMPLEMENTED: no such layout" in str(result)
    assert "more" in result["full"].refusal
    json.loads(result.to_json())
    assert all(row.measurement.fits for row in run_compare().rows)  # control
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such layout"):
        run_compare(0, 1)


def test_repr_names_the_candidates(comparison):
    assert repr(comparison) == "Comparison(plain, full, dots, half, control; cost='flops', memory='temp_bytes')"

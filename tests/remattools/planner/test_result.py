# SPDX-License-Identifier: Apache-2.0
"""Tables, frontiers and rule files of compiled points."""

import dataclasses
import pathlib
from importlib.metadata import version

import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.compiler.out_of_memory import OutOfMemory
from remattools.planner.result import Plan, Point, Prediction, describe_early_end, find_frontier, format_points


@pytest.fixture(scope="module")
def measured() -> rt.Measurement:
    return rt.measure(jnp.sin, jnp.ones(3), target="cpu")


def make_point(measured: rt.Measurement, size: int, cycles: float, rules: dict[str, object] | None = None) -> Point:
    return Point(
        rules=rt.Rules(rules or {}),
        predicted=Prediction(bytes=size, cycles=cycles),
        measured=measured,
        bytes=size,
        cycles=cycles,
    )


def test_a_frontier_has_no_point_that_another_beats(measured: rt.Measurement) -> None:
    small, worse, fast = (make_point(measured, *pair) for pair in ((10, 5.0), (20, 6.0), (30, 1.0)))
    assert find_frontier([fast, worse, small]) == (small, fast)


def test_an_out_of_memory_point_is_listed_off_the_frontier(measured: rt.Measurement) -> None:
    full = OutOfMemory(needed_bytes=2**40, limit_bytes=2**30, message="full")
    failed = make_point(dataclasses.replace(measured, out_of_memory=full), 1, 1.0)
    assert find_frontier([failed]) == ()
    assert "OOM" in format_points([failed], "peak", None)
    assert "OOM" not in format_points([make_point(measured, 1, 1.0)], "peak", None)  # control


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (rt.Remat(), "layers.*: save nothing"),
        (rt.Remat(save=("a",)), "layers.*: save 1 name"),
        (rt.Remat(save=("a", "b"), group=2), "layers.*: save 2 names, 2 in a region"),
        (rt.Remat(offload=("a",)), "layers.*: offload 1 name"),
    ],
)
def test_a_table_says_what_rules_do(measured: rt.Measurement, action: rt.Remat, text: str) -> None:
    assert format_points([make_point(measured, 1, 1.0, {"layers.*": action})], "temp", None).endswith(text)


def test_a_rule_file_says_where_it_comes_from(measured: rt.Measurement) -> None:
    point = make_point(measured, 10, 5.0, {"layers.*": rt.Remat(save=("a",))})
    plan = Plan(
        rules=point.rules,
        predicted=point.predicted,
        measured=measured,
        points=(point,),
        budget_bytes=2**20,
        of="temp",
        time_by="model",
        subject="Tower",
        ended="time_limit",
    )
    text = plan.to_toml()
    assert "# made by remattools.plan for Tower\n# target cpu, budget 1.0 MiB of temp" in text
    assert "its time limit" in text
    assert f"# compiled with remattools {version('nnx-checkpointing')}, jax {version('jax')}, flax" in text
    assert "libtpu" not in text
    assert f"# measured: temp {measured.temp_bytes} B, total {measured.total_bytes} B" in text
    assert f"# the plain model: temp {measured.temp_bytes} B" in text
    assert rt.Rules.from_toml(text) == plan.rules
    assert "# target cpu, the minimum temp" in dataclasses.replace(plan, budget_bytes=None).to_toml()


def test_a_plan_is_written_as_a_rule_file(measured: rt.Measurement, tmp_path: pathlib.Path) -> None:
    point = make_point(measured, 10, 5.0, {"layers.*": rt.Remat(save=("a",))})
    plan = Plan(
        rules=point.rules,
        predicted=None,
        measured=dataclasses.replace(measured, target="tpu:v5e:2x2"),
        points=(point,),
        budget_bytes=1,
        of="temp",
        time_by="model",
        subject="Tower",
    )
    plan.write(tmp_path / "rules.toml")
    assert rt.Rules.load(tmp_path / "rules.toml") == plan.rules


def test_a_plain_point_has_no_prediction(measured: rt.Measurement) -> None:
    point = dataclasses.replace(make_point(measured, 2**20, 1e6), predicted=None)
    assert format_points([point], "temp", None).splitlines()[1].split() == [
        "*",
        "1.0",
        "MiB",
        "1",
        "M",
        "-",
        "-",
        "plain",
    ]
    assert point.as_dict()["predicted"] is None


def test_only_an_early_end_is_remarked_on() -> None:
    assert describe_early_end("converged") == describe_early_end("max_compiles") == ""
    assert "Ctrl-C" in describe_early_end("interrupted")


def test_a_table_marks_the_plan_and_the_frontier(measured: rt.Measurement) -> None:
    chosen = make_point(measured, 2**20, 5e6, {"layers.*": rt.Remat()})
    fast, beaten = make_point(measured, 2**21, 1e6), make_point(measured, 2**22, 6e6, {"head": rt.Remat(group=2)})
    assert format_points([beaten, fast, chosen], "temp", chosen.rules).splitlines() == [
        "       temp  cycles  predicted       rules",
        "->  1.0 MiB     5 M    1.0 MiB  5 M  layers.*: save nothing",
        " *  2.0 MiB     1 M    2.0 MiB  1 M  plain",
        "    4.0 MiB     6 M    4.0 MiB  6 M  head: save nothing, 2 in a region",
    ]
    assert "->" not in format_points([beaten, fast, chosen], "temp", None)  # control

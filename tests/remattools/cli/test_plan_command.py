# SPDX-License-Identifier: Apache-2.0
"""`remattools plan`: rules in a file that `measure` takes, points as JSON, failures with exit code 2."""

import contextlib
import ctypes
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import scipy

import remattools as rt
from remattools.cli import parser
from remattools.cli.main import main
from remattools.planner.search.exploration import Exploration

FACTORIES = """
import optax
from flax import nnx
from tests.remattools.models import MLP, Tower, inputs, loss

def training():
    return loss, (nnx.eval_shape(lambda: Tower(4, 32, block=MLP)), inputs(4, 64, 32))

def step(model, optimizer, x):
    value, grads = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, grads)
    return value

def stepping():
    _, (model, x) = training()
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(Tower(4, 32, block=MLP), optax.adamw(1e-3), wrt=nnx.Param))
    return nnx.jit(step), (model, optimizer, x)
"""


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a command on one of the factories, for the CPU, and returns its exit code."""
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "plan_factories.py"
    path.write_text(FACTORIES)
    return lambda command, factory, *options: main(
        [command, f"{path}:{factory}", "--target", "cpu", *map(str, options)]
    )


def find_chosen_point(output: str) -> dict[str, Any]:
    point: dict[str, Any] = next(point for point in json.loads(output)["points"] if point["chosen"])
    return point


def test_planned_rules_measure_as_planned(
    run: Callable[..., int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    assert run("plan", "training", "--budget", "0.7", "--of", "temp", "-o", rules, "--json") == parser.EXIT_OK
    output = capsys.readouterr().out
    chosen = find_chosen_point(output)
    assert chosen["bytes"] <= json.loads(output)["budget_bytes"]
    assert len(rt.Rules.load(rules))
    assert run("measure", "training", "--rules", rules, "--json") == parser.EXIT_OK
    assert json.loads(capsys.readouterr().out)["temp_bytes"] == chosen["bytes"]


def test_an_unreachable_budget_exits_with_failure(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "training", "--budget", "1000", "--of", "temp") == parser.EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fix:" in captured.err


def test_as_is_plans_a_whole_step(
    run: Callable[..., int], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    limits = ["--budget", "0.7", "--of", "temp", "--max-compiles", "4"]
    assert run("plan", "stepping", *limits, "-o", rules, "--json", "--as-is") == parser.EXIT_OK
    chosen = find_chosen_point(capsys.readouterr().out)
    assert run("measure", "stepping", "--rules", rules, "--json", "--as-is") == parser.EXIT_OK
    assert json.loads(capsys.readouterr().out)["temp_bytes"] == chosen["bytes"]
    assert run("plan", "stepping", *limits) == parser.EXIT_FAILED  # control: a step is not a loss
    assert "differentiate=False" in capsys.readouterr().err


def test_an_interrupt_before_a_plan_has_its_exit_code(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exploration, "compile_assignment", interrupt)
    assert run("plan", "training", "--budget", "0.3", "--of", "temp") == parser.EXIT_INTERRUPTED
    assert "before any compiled" in capsys.readouterr().err


def test_only_the_json_is_on_stdout_whatever_a_solver_prints(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    solve, libc = scipy.optimize.milp, ctypes.CDLL(None)

    def print_and_solve(*args: Any, **options: Any) -> Any:
        libc.puts(b"a line of the solver")  # as HiGHS does now and then, and libraries under JAX may do
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", print_and_solve)
    monkeypatch.setattr("remattools.planner.model.block_ilp.redirect_native_stdout", contextlib.nullcontext)
    assert run("plan", "training", "--budget", "0.7", "--json", "--max-compiles", 2) == parser.EXIT_OK
    libc.fflush(None)
    captured = capfd.readouterr()
    assert json.loads(captured.out)["points"]
    assert "a line of the solver" in captured.err  # control: it was printed


def test_a_piped_plan_logs_what_is_compiled(run: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "training", "--budget", "0.7", "--json", "--max-compiles", 2) == parser.EXIT_OK
    lines = capfd.readouterr().err.splitlines()
    assert "remattools: compile 1: the plain model (at most 1 more)" in lines
    assert any("compile 2: layers" in line and "the last took" in line for line in lines)

# SPDX-License-Identifier: Apache-2.0
"""`remattools plan`: rules in a file that `measure` takes, figures in JSON, refusals with exit code 2."""

import json
import pathlib

import pytest

import remattools as rt
from remattools.cli import parser
from remattools.cli.main import main
from remattools.planner.search.exploration import Exploration

FACTORY = """
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


def test_a_plan_is_written_and_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "subject.py").write_text(FACTORY)
    subject, out = f"{tmp_path / 'subject.py'}:training", tmp_path / "rules.toml"
    common = ["--target", "cpu", "--json"]
    assert main(["plan", subject, "--budget", "0.7", "--of", "temp", "-o", str(out), *common]) == parser.EXIT_OK
    said = json.loads(capsys.readouterr().out)
    chosen = next(point for point in said["points"] if point["chosen"])
    assert chosen["bytes"] <= said["budget_bytes"]
    assert len(rt.Rules.load(out))
    assert main(["measure", subject, "--rules", str(out), *common]) == parser.EXIT_OK
    assert json.loads(capsys.readouterr().out)["temp_bytes"] == chosen["bytes"]
    assert main(["plan", subject, "--budget", "1000", "--of", "temp", "--target", "cpu"]) == parser.EXIT_FAILED
    assert "the least is" in capsys.readouterr().err


def test_a_whole_step_is_planned_as_it_is(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "stepping.py").write_text(FACTORY)
    subject, out = f"{tmp_path / 'stepping.py'}:stepping", tmp_path / "rules.toml"
    common = ["--target", "cpu", "--as-is"]
    limits = ["--budget", "0.7", "--of", "temp", "--max-compiles", "4"]
    assert main(["plan", subject, *limits, "-o", str(out), "--json", *common]) == parser.EXIT_OK
    chosen = next(point for point in json.loads(capsys.readouterr().out)["points"] if point["chosen"])
    assert main(["measure", subject, "--rules", str(out), "--json", *common]) == parser.EXIT_OK
    assert json.loads(capsys.readouterr().out)["temp_bytes"] == chosen["bytes"]
    assert main(["plan", subject, *limits, "--target", "cpu"]) == parser.EXIT_FAILED  # control: a step is no loss
    assert "differentiate=False" in capsys.readouterr().err


def test_an_interrupt_without_a_plan_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "subject.py").write_text(FACTORY)
    compiles: list[int] = []

    def interrupted(self: Exploration, number: int) -> None:
        compiles.append(number)
        if len(compiles) == 2:
            raise KeyboardInterrupt
        compile_(self, number)

    compile_ = Exploration.compile_assignment
    monkeypatch.setattr(Exploration, "compile_assignment", interrupted)
    subject = f"{tmp_path / 'subject.py'}:training"
    assert main(["plan", subject, "--budget", "0.3", "--of", "temp", "--target", "cpu"]) == parser.EXIT_INTERRUPTED
    assert "before any compiled rules kept the budget" in capsys.readouterr().err

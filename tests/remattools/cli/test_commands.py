# SPDX-License-Identifier: Apache-2.0
"""Every command on a factory: its JSON, its exit code and its errors."""

import json
import os
import subprocess
import sys

import pytest

from remattools.cli import parser
from remattools.cli.main import main

FACTORIES = """
import jax, jax.numpy as jnp
from flax import nnx
from tests.remattools.models import Tower, inputs, loss

def training():
    return loss, (nnx.eval_shape(lambda: Tower(depth=4)), inputs(16, 16))

def lone_model():
    return nnx.eval_shape(Tower), (inputs(),)

def bare():
    return nnx.eval_shape(Tower)

def huge():
    def deep(weights, x):
        for _ in range(4):
            x = jnp.sin(jnp.cos(x @ weights) @ weights)
        return jnp.mean(x**2)

    return deep, (jax.ShapeDtypeStruct((512, 512), jnp.float32), jax.ShapeDtypeStruct((2**21, 512), jnp.float32))

def broken():
    raise RuntimeError("no weights here")

def wrong():
    return 3

number = 5

def leaves():
    raise SystemExit(0)

def three():
    return loss, nnx.eval_shape(Tower), inputs()

def talkative():
    print("building")

    def print_and_run(model, x):
        print("tracing")
        return loss(model, x)

    return print_and_run, (nnx.eval_shape(Tower), inputs())

def untraceable():
    def failing(model, x):
        raise ZeroDivisionError("in the model")

    return failing, (nnx.eval_shape(Tower), inputs())

def step():
    def train(model, x):
        value, gradients = nnx.value_and_grad(loss)(model, x)
        nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), gradients))
        return value

    return train, (nnx.eval_shape(Tower), inputs())
"""
RULES = """
[[remat.rule]]
pattern = "layers.*"
policy = "nothing_saveable"
"""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "full.toml").write_text(RULES)
    (tmp_path / "typo.toml").write_text(RULES.replace("layers", "layer"))
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.fixture
def run(directory, capsys):
    def call(command, *options, factory="training"):
        code = main([command, f"{directory / 'factories.py'}:{factory}", *map(str, options)])
        return code, capsys.readouterr()

    return call


def test_explain_shows_the_action_of_each_module(run, directory):
    code, out = run("explain", "--rules", directory / "full.toml", "--json")
    actions = {row["path"]: row["action"] for row in json.loads(out.out)}
    assert code == parser.EXIT_OK
    assert actions["layers.0"] == "nothing_saveable"
    assert actions["head"] is None
    code, out = run("explain", "--rules", "nothing_saveable", "--names", factory="lone_model")
    assert "attention.qkv" in out.out
    code, out = run("explain", "--rules", "nothing_saveable", "--names", factory="training")  # a loss
    assert "attention.qkv" in out.out


def test_residuals_shrink_under_rules(run, directory):
    _, plain = run("residuals", "--json")
    code, ruled = run("residuals", "--json", "--rules", directory / "full.toml")
    assert code == parser.EXIT_OK
    assert json.loads(ruled.out)["computed_bytes"] < json.loads(plain.out)["computed_bytes"] / 2
    assert "layers.[0:4]" in run("residuals")[1].out
    assert "layers.[0:3]" in run("residuals", factory="lone_model")[1].out


def test_measure_takes_rules_and_as_is(run, directory):
    _, plain = run("measure", "--target", "cpu", "--json")
    code, ruled = run("measure", "--target", "cpu", "--json", "--rules", directory / "full.toml")
    _, forward = run("measure", "--target", "cpu", "--json", "--as-is")
    temp = [json.loads(out.out)["temp_bytes"] for out in (plain, ruled, forward)]
    assert code == parser.EXIT_OK
    assert temp[1] < temp[0]
    assert temp[2] < temp[0]
    assert "temp" in run("measure", "--target", "cpu", "--no-cache")[1].out


def test_compare_writes_rows_and_csv(run, directory):
    code, out = run(
        "compare", "--target", "cpu", "--rules", directory / "full.toml", "--rules", "dots=dots_saveable",
        "--csv", directory / "out.csv", "--json",
    )  # fmt: skip
    rows = json.loads(out.out)["rows"]
    assert code == parser.EXIT_OK
    assert [row["name"] for row in rows] == ["none", "full", "dots"]
    assert rows[1]["memory_ratio"] < 1
    assert (directory / "out.csv").read_text().count("\n") == 4


def test_check_exits_with_its_verdict(run, directory):
    code, out = run("check", "--target", "cpu", "--rules", directory / "full.toml")
    assert code == parser.EXIT_OK, out.out
    code, out = run("check", "--target", "cpu", "--rules", "everything_saveable", "--json")
    assert code == parser.EXIT_NO
    assert json.loads(out.out)["findings"]


def test_timeline_prints_and_plots(run, directory):
    pytest.importorskip("matplotlib")
    code, out = run("timeline", "--plot", directory / "t.svg")
    assert code == parser.EXIT_OK
    assert "peak" in out.out
    assert (directory / "t.svg").exists()
    assert json.loads(run("timeline", "--json")[1].out)["peak_bytes"] > 0


def test_a_model_without_inputs_can_be_explained(run):
    code, out = run("explain", "--rules", "nothing_saveable", factory="bare")
    assert code == parser.EXIT_OK
    assert "layers.[0:3]" in out.out


def test_running_out_of_memory_exits_with_no(run, tpu):
    code, out = run("measure", "--target", tpu, factory="huge")
    assert code == parser.EXIT_NO
    assert "OUT OF MEMORY" in out.out


@pytest.mark.parametrize(
    ("command", "factory", "options", "expected"),
    [
        pytest.param("measure", "broken", (), "no weights here", id="factory raises"),
        pytest.param("measure", "wrong", (), "returned int", id="factory returns nonsense"),
        pytest.param("measure", "leaves", (), "SystemExit", id="factory exits"),
        pytest.param("measure", "three", (), "return fn, (model, batch)", id="not a pair"),
        pytest.param("measure", "bare", (), "return model, (x,)", id="model without inputs"),
        pytest.param("explain", "bare", ("--names",), "return model, (x,)", id="names of a model without inputs"),
        pytest.param("residuals", "untraceable", (), "ZeroDivisionError: in the model", id="function raises"),
        pytest.param("measure", "step", ("--target", "cpu"), "--as-is", id="a step, not a loss"),
        pytest.param("timeline", "training", ("--plot", "a.jpg"), ".svg", id="not a figure"),
        pytest.param("compare", "training", ("--csv", "missing/directory/a.csv"), "mkdir -p", id="missing directory"),
        pytest.param(
            "compare", "training", ("--rules", "a/x.toml", "--rules", "b/x.toml"), "second candidate", id="same names"
        ),
        pytest.param("measure", "trainin", (), "did you mean 'training'", id="unknown factory"),
        pytest.param("measure", "number", (), "has no function", id="not a function"),
        pytest.param("measure", "training", ("--target", "abacus"), "unknown target", id="unknown target"),
        pytest.param("measure", "training", ("--run",), "abstract", id="nothing to run"),
        pytest.param("residuals", "training", ("--rules", "nope.toml"), "nope.toml", id="missing rule file"),
        pytest.param("check", "huge", ("--rules", "nothing_saveable"), "pass the model", id="without a model"),
    ],
)
def test_failures_are_reported_on_stderr(run, command, factory, options, expected):
    code, out = run(command, *options, factory=factory)
    assert code == parser.EXIT_FAILED
    assert expected in out.err
    assert out.out == ""


def test_rules_that_match_nothing_are_an_error(run, directory):
    code, out = run("compare", "--target", "cpu", "--rules", directory / "typo.toml")
    assert code == parser.EXIT_FAILED
    assert "layers" in out.err


@pytest.mark.parametrize("factory", ["factories", "no.such.module:f", "missing.py:f", ":f"])
def test_missing_modules_raise_with_a_fix(factory, directory, capsys):
    assert main(["measure", factory]) == parser.EXIT_FAILED
    assert "fix:" in capsys.readouterr().err


def test_modules_are_found_from_the_working_directory(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    assert main(["residuals", "factories:lone_model"]) == parser.EXIT_OK
    assert "layers" in capsys.readouterr().out


def test_output_of_user_code_goes_to_stderr(run):
    code, out = run("residuals", "--json", factory="talkative")
    assert code == parser.EXIT_OK
    assert json.loads(out.out)["computed_bytes"] > 0
    assert "building" in out.err
    assert "tracing" in out.err


def test_as_is_measures_a_whole_step(run):
    assert run("measure", "--target", "cpu", "--as-is", factory="step")[0] == parser.EXIT_OK


def test_the_answer_is_printed_before_files_are_written(run, tmp_path):
    taken = tmp_path / "taken.csv"
    taken.mkdir()
    code, out = run("compare", "--target", "cpu", "--rules", "nothing_saveable", "--csv", taken)
    assert code == parser.EXIT_FAILED
    assert "nothing_saveable" in out.out
    assert "taken.csv" in out.err


def test_a_closed_pipe_is_not_an_error(directory):
    command = f"{sys.executable} -m remattools explain {directory / 'factories.py'}:training --json | head -c 1"
    # bash's PIPESTATUS has the exit code of the first command.
    process = subprocess.run(
        ["bash", "-c", command + '; exit "${PIPESTATUS[0]}"'],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (parser.EXIT_OK, "[", "")

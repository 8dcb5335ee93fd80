# SPDX-License-Identifier: Apache-2.0
"""`remattools plan`: rules in a file that `measure` takes, figures in JSON, refusals with exit code 2."""

import json
import pathlib

import pytest

import remattools as rt
from remattools import cli

FACTORY = """
from flax import nnx
from tests.remattools.models import MLP, Tower, inputs, loss

def training():
    return loss, (nnx.eval_shape(lambda: Tower(4, 32, block=MLP)), inputs(4, 64, 32))
"""


def test_a_plan_is_written_and_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "subject.py").write_text(FACTORY)
    subject, out = f"{tmp_path / 'subject.py'}:training", tmp_path / "rules.toml"
    common = ["--target", "cpu", "--json"]
    assert cli.main(["plan", subject, "--budget", "0.7", "--of", "temp", "-o", str(out), *common]) == cli.OK
    said = json.loads(capsys.readouterr().out)
    chosen = next(point for point in said["points"] if point["chosen"])
    assert chosen["bytes"] <= said["budget_bytes"]
    assert len(rt.Rules.load(out))
    assert cli.main(["measure", subject, "--rules", str(out), *common]) == cli.OK
    assert json.loads(capsys.readouterr().out)["temp_bytes"] == chosen["bytes"]
    assert cli.main(["plan", subject, "--budget", "1000", "--of", "temp", "--target", "cpu"]) == cli.CANNOT
    assert "the least is" in capsys.readouterr().err

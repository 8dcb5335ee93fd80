# SPDX-License-Identifier: Apache-2.0
"""The entry point: fast help, and commands loaded only when they run."""

import os
import runpy
import subprocess
import sys

import pytest

from remattools.cli import parser
from remattools.cli.main import main


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remattools", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("remattools", run_name="__main__")
    assert caught.value.code == 0
    assert "residuals" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "--bogus"]])
def test_help_and_bad_usage_import_neither_jax_nor_flax(arguments):
    code = f"""
import sys
from remattools.cli.main import main
try:
    main({arguments})
except SystemExit as error:
    print(error.code, sorted({{"jax", "flax", "numpy", "rich"}} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = parser.EXIT_FAILED if "--bogus" in arguments else parser.EXIT_OK
    assert process.stdout.splitlines()[-1] == f"{expected} []"


def test_a_command_runs_after_the_help_was_answered(tmp_path):
    (tmp_path / "factories.py").write_text("def factory(): raise RuntimeError('no weights')")
    process = subprocess.run(
        [sys.executable, "-m", "remattools", "explain", f"{tmp_path / 'factories.py'}:factory"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.returncode == parser.EXIT_FAILED
    assert "no weights" in process.stderr


def test_main_returns_the_exit_code(tmp_path, capsys):
    assert main(["explain", f"{tmp_path / 'missing.py'}:factory"]) == parser.EXIT_FAILED
    assert "fix:" in capsys.readouterr().err

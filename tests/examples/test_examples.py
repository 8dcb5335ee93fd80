# SPDX-License-Identifier: Apache-2.0
"""Every example runs from the command line in an empty directory and does what its first line says.

`make demo` runs `demo.py`, which trains with `train_charlm.py`; tests/wild runs the examples that need other packages.
"""

import pathlib
import re
import subprocess
import sys

import pytest

import remattools as rt

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
ELSEWHERE = {"demo.py", "train_charlm.py", "charlm_data.py", "charlm_model.py", "rules_on_tunix.py"}


def run(name, directory, *args):
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_decorate_your_model(tmp_path):
    sizes_mb = [float(text) for text in re.findall(r"([\d.]+) MB", run("decorate_your_model.py", tmp_path))]
    plain, block, second, names = sizes_mb
    assert block < names < second < plain


def test_plan_for_a_chip(tmp_path):
    output = run("plan_for_a_chip.py", tmp_path, "--target", "cpu", "--budget", "0.6", "--out", tmp_path / "rules.toml")
    assert rt.Rules.load(tmp_path / "rules.toml").to_toml() in (tmp_path / "rules.toml").read_text()
    assert "rules written to" in output
    assert "target cpu" in output


def test_trainer_with_a_spec(tmp_path):
    assert "restored: None, trained to 60" in run("trainer_with_a_spec.py", tmp_path, "--steps", "60")
    assert "restored: 60, trained to 70" in run("trainer_with_a_spec.py", tmp_path, "--steps", "70")


def test_kill_and_resume(tmp_path):
    output = run("kill_and_resume.py", tmp_path)
    assert output.count("exit status -9") == 2
    assert output.rstrip().endswith("resumed bit for bit: yes")
    resumed_from = [int(step) for step in re.findall(r"restored: (\d+)", output)]
    assert 3 <= resumed_from[0] <= 21 < resumed_from[1] <= 42


def test_change_the_architecture(tmp_path):
    output = run("change_the_architecture.py", tmp_path)
    assert "without surgery:" in output
    assert "padded" in output
    assert "restored 40, trained to 80" in output


def test_two_processes(tmp_path):
    output = run("two_processes.py", tmp_path)
    assert output.count("of 2: restored None, trained to 12") == 2
    assert output.count("holds (8, 8) of (16, 8)") == 2
    assert "process 0 of 1: restored 12, trained to 20" in output


def test_every_example_is_run_somewhere():
    here = pathlib.Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE
    assert names
    assert [name for name in sorted(names) if f'run("{name}"' not in here] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_is_for(path):
    assert path.read_text().split('"""')[1].strip()

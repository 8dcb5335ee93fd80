# SPDX-License-Identifier: Apache-2.0
"""Commands that read a run start without JAX: what each of them imports, in a process of its own."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "format-1"
HEAVY = {"jax", "jaxlib", "flax", "orbax", "optax", "tensorstore", "scipy", "fsspec"}
_PROGRAM = """
import sys
from ckpttools.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("loaded:", *sys.modules)
"""


def loaded_by(*arguments: object) -> set[str]:
    """Return the top-level packages that a command has imported."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.rpartition("loaded: ")[2].split()}


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "run")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["ls", "RUN"], id="ls"),
        pytest.param(["show", "RUN"], id="show"),
        pytest.param(["prune", "RUN", "--latest", "2", "--dry-run"], id="prune"),
        pytest.param(["pin", "RUN", "2"], id="pin"),
        pytest.param(["record", "RUN", "2", "val=0.5"], id="record"),
        pytest.param(["repair", "RUN", "--dry-run"], id="repair"),
    ],
)
def test_a_command_that_reads_no_arrays_imports_no_jax(run, arguments):
    assert loaded_by(*(run if each == "RUN" else each for each in arguments)) & HEAVY == set()


def test_help_imports_no_dependency_at_all():
    assert loaded_by("--help") & {"numpy", "rich", "xxhash"} == set()


def test_a_command_that_reads_arrays_imports_jax(run):
    """Control."""
    assert {"jax", "orbax"} <= loaded_by("verify", run)
    assert {"jax", "orbax"} <= loaded_by("diff", run / "1", run / "2")

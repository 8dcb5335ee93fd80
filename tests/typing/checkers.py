# SPDX-License-Identifier: Apache-2.0
"""Run pyright and mypy over a small user program, and say on which lines each reports an error.

A program in `programs/` uses `typing.assert_type`. A line on which an error is deliberate ends with
`# error`: both checkers must report exactly these lines, and none in a program without such comments.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = pathlib.Path(__file__).parent / "programs"
ERROR_COMMENT = "# error"


def run_pyright(program: pathlib.Path) -> dict[int, str]:
    """Return pyright's errors in `program` by line number."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(program)]
    report = json.loads(_run(command))
    return {
        finding["range"]["start"]["line"] + 1: finding["message"]
        for finding in report["generalDiagnostics"]
        if finding["severity"] == "error"
    }


def run_mypy(program: pathlib.Path) -> dict[int, str]:
    """Return the errors that strict mypy finds in `program` by line number."""
    command = [sys.executable, "-m", "mypy", "--output", "json", "--no-color-output", str(program)]
    findings = [json.loads(line) for line in _run(command).splitlines() if line.startswith("{")]
    return {
        finding["line"]: finding["message"]
        for finding in findings
        # mypy also checks what the program imports; the packages have their own run.
        if finding["severity"] == "error" and (ROOT / finding["file"]).resolve() == program.resolve()
    }


CHECKERS: dict[str, Callable[[pathlib.Path], dict[int, str]]] = {"pyright": run_pyright, "mypy": run_mypy}


def find_expected_errors(program: pathlib.Path) -> set[int]:
    """Return the line numbers of `program` that end with `# error`."""
    lines = program.read_text().splitlines()
    return {number for number, line in enumerate(lines, start=1) if line.endswith(ERROR_COMMENT)}


def check_program(checker: str, name: str) -> None:
    """Assert that a checker reports exactly the expected errors in `programs/<name>.py`."""
    program = PROGRAMS / f"{name}.py"
    errors = CHECKERS[checker](program)
    assert errors.keys() == find_expected_errors(program), errors


def _run(command: list[str]) -> str:
    # The checkers exit with 1 where they report errors, and with 2 or more where they could not run.
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout

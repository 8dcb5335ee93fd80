# SPDX-License-Identifier: Apache-2.0
"""Install a built wheel or sdist into an environment of its own, outside the checkout, and use it there.

    python tests/packaging/check.py DISTRIBUTION...

No test of pytest's: the suite runs in a checkout, whose files would hide what a distribution lacks.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = [
    f"{package}/{name}"
    for package in ("remattools", "ckpttools")
    for name in ("py.typed", "__init__.py", "__init__.pyi")
]
FOREIGN = ("tests", "benchmarks", "docs", "examples", "shared")


def names_in(path: pathlib.Path) -> list[str]:
    """Files of a distribution, relative to its root."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def check_contents(path: pathlib.Path) -> None:
    """All that git tracks in both packages is in the distribution, and a wheel holds nothing else."""
    names = names_in(path)
    tracked = subprocess.run(
        ["git", "ls-files", "remattools", "ckpttools"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    missing = sorted({*tracked, *NEEDED} - set(names))
    assert not missing, f"{path.name} lacks {missing}"
    if path.suffix == ".whl":
        strangers = [name for name in names if name.split("/")[0] in FOREIGN]
        assert not strangers, f"{path.name} would install {strangers[:5]}"


def check_installed(path: pathlib.Path, uv: str) -> str:
    """Install into a fresh environment and run `use.py` there, away from the checkout; its closing line."""
    with tempfile.TemporaryDirectory(prefix="nnx-checkpointing-") as scratch:
        here = pathlib.Path(scratch)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        python = here / "venv" / "bin" / "python"

        def run(*command: str | pathlib.Path) -> str:
            done = subprocess.run(command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True)
            assert done.returncode == 0, f"{path.name}: {' '.join(map(str, command))} ended with {done.returncode}"
            return done.stdout

        run(uv, "venv", "--quiet", "--python", sys.executable, "venv")
        run(uv, "pip", "install", "--quiet", "--python", python, "-c", ROOT / "constraints.txt", path)
        shutil.copy(pathlib.Path(__file__).with_name("use.py"), here / "use.py")
        for command in ("remattools", "ckpttools"):
            assert "usage" in run(python.with_name(command), "--help").lower()
        return run(python, "-I", "use.py").strip().splitlines()[-1]


def main() -> None:
    paths = [pathlib.Path(name).absolute() for name in sys.argv[1:]]
    assert {path.suffix for path in paths} == {".whl", ".gz"}, f"one wheel and one sdist are wanted, not {paths}"
    uv = str(pathlib.Path(sys.executable).with_name("uv"))
    for path in paths:
        check_contents(path)
        print(f"{path.name}: {check_installed(path, uv)}", flush=True)


if __name__ == "__main__":
    main()

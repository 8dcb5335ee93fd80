# SPDX-License-Identifier: Apache-2.0
"""Both packages offer what their stubs list, import it on first use, and show nothing else."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import ckpttools
import remattools
from remattools.lazy_imports import parse_stub

PACKAGES = [pytest.param(package, id=package.__name__) for package in (remattools, ckpttools)]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_the_same_as_the_stub(package):
    stub = pathlib.Path(package.__file__).with_suffix(".pyi").read_text()
    assert package.__all__ == sorted(parse_stub(package.__name__, stub))
    assert dir(package) == package.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_can_be_imported_and_no_submodule_hides_it(package):
    directory = pathlib.Path(package.__file__).parent
    rooms = {path.stem for path in directory.iterdir() if path.is_dir() or path.suffix == ".py"}
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name not in rooms or getattr(package, name) is importlib.import_module(f"{package.__name__}.{name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_suggests_the_closest(package):
    name = package.__all__[-1]
    with pytest.raises(AttributeError, match=f"Did you mean .*{name}"):
        getattr(package, f"{name}s")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_no_jax_until_a_name_is_used(package):
    name = "apply" if package is remattools else "open"
    code = (
        f"import sys, {package.__name__} as package; before = 'jax' in sys.modules; package.{name}; "
        "print(before, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_submodule_can_be_imported_under_its_full_name():
    import remattools.analysis.compare as module

    assert module.compare is remattools.compare

# SPDX-License-Identifier: Apache-2.0
"""Both packages offer what their stubs list, import it on first use, and show nothing else."""

import ast
import importlib
import pathlib
import pickle
import pkgutil
import subprocess
import sys
import types

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
def test_jax_is_imported_on_the_first_use_only(package):
    name = "apply" if package is remattools else "open"
    code = (
        f"import sys, {package.__name__} as package; before = 'jax' in sys.modules; package.{name}; "
        "print(before, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_submodule_is_where_its_full_name_says(package):
    names = [name for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    assert len(names) > 30
    for name in (name for name in names if not name.endswith("__main__")):
        module = importlib.import_module(name)
        parent, _, last = name.rpartition(".")
        assert getattr(sys.modules[parent], last) is module


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_a_literal(package):
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    values = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert [ast.literal_eval(value) for value in values] == [package.__all__]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_star_import_brings_every_name(package):
    names = {}
    exec(f"from {package.__name__} import *", names)
    assert names.keys() - {"__builtins__"} == set(package.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_classes_and_functions_are_pickled_by_name(package):
    values = [getattr(package, name) for name in package.__all__]
    named = [value for value in values if isinstance(value, type | types.FunctionType)]
    assert len(named) > 20
    assert pickle.loads(pickle.dumps(named)) == named

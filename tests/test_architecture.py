# SPDX-License-Identifier: Apache-2.0
"""The direction of the imports, and who may import what."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Bottom up: a file may import from its own room and from rooms above it in its list.
ROOMS = {
    "remattools": ["errors", "compat", "rules", "transform", "measure", "plan", "cli", "__main__", "__init__"],
    "ckpttools": ["errors", "spec", "state", "store", "", "cli", "__main__", "__init__"],
}
BETWEEN_PACKAGES = {"remattools.errors", "remattools.rules.paths"}
FILES = [path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))]


def room_of(parts: tuple[str, ...]) -> int:
    """Place of a module in its package's list; files between the rooms share the unnamed one."""
    rooms = ROOMS[parts[0]]
    name = parts[1] if len(parts) > 1 else "__init__"
    return rooms.index(name) if name in rooms else rooms.index("")


def imports(path: pathlib.Path) -> list[tuple[tuple[str, ...], str]]:
    """Absolute module names that a file imports, anywhere in it."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")), alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            found += [((*module, alias.name), ".".join(module)) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_rooms_import_upward_only(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    for target, module in imports(path):
        if target[0] not in ROOMS:
            continue
        if target[0] != here[0]:
            assert here[0] == "ckpttools", f"{here[0]} must not import {module}"
            assert any(module == name or ".".join(target).startswith(name) for name in BETWEEN_PACKAGES), module
        else:
            assert room_of(target) <= room_of(here), f"{'.'.join(here)} imports {'.'.join(target)}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_private_jax_and_orbax_have_one_door_each(path):
    here = str(path.relative_to(ROOT))
    modules = {module for _, module in imports(path)}
    if here != "remattools/compat.py":
        assert not any(module.startswith("jax._src") for module in modules)
    if here != "ckpttools/store/orbax.py":
        assert not any(module.split(".")[0] == "orbax" for module in modules)


@pytest.mark.parametrize("package", ROOMS)
def test_importing_a_package_imports_no_extra(package):
    # The solver is no extra, but takes a second.
    extras = ["matplotlib", "libtpu", "fsspec", "safetensors", "boto3", "scipy.optimize"]
    # What JAX, flax and Orbax bring in by themselves is not ours.
    code = f"""
import sys, jax, flax.nnx, optax, orbax.checkpoint
before = set(sys.modules)
import {package}
print(sorted((set(sys.modules) - before) & set({extras})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ROOMS)
def test_what_is_public_is_documented(package):
    module = __import__(package)
    names = [name for name in vars(module) if not name.startswith("_")]
    public = [name for name in names if hasattr(getattr(module, name), "__module__")]
    assert public
    for name in public:
        value = getattr(module, name)
        assert getattr(value, "__doc__", None), f"{package}.{name} has no docstring"

# SPDX-License-Identifier: Apache-2.0
"""The direction of the imports, and who may import what."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Bottom up: a file may import from its own room and from rooms above it in its list.
ROOMS = {
    "remattools": [
        "lazy_imports",
        "errors",
        "compat",
        "text",
        "toml",
        "terminal",
        "jaxpr",
        "rules",
        "transform",
        "tracing",
        "compiler",
        "analysis",
        "planner",
        "cli",
        "__main__",
        "__init__",
    ],
    "ckpttools": [
        "errors",
        "text",
        "threads",
        "spec",
        "tree",
        "store",
        "surgery",
        "processes",
        "restore",
        "save",
        "mirror",
        "sources",
        "session",
        "tools",
        "integrations",
        "functional",
        "cli",
        "__main__",
        "__init__",
    ],
}
BETWEEN_PACKAGES = {
    "remattools.errors",
    "remattools.rules.paths",
    "remattools.text",
    "remattools.toml",
    "remattools.lazy_imports",
}
FILES = [
    path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py*")) if path.suffix in (".py", ".pyi")
]
# Modules that need no test at their mirrored path, by their file's name, with the reason.
WITHOUT_TEST = {
    "__init__.py": "lists names and holds no behaviour; tests/typing and the tests of public names read them",
    "__main__.py": "only calls `cli.main`; tests of the commands start `python -m` in a process",
}
# The only imports inside functions: extras, which importing the package must not import.
EXTRAS = {"matplotlib", "fsspec"}
# Imports at run time: the user's `module:function` on the command line, and the commands after `--help` was answered.
BY_NAME = {
    "remattools/cli/subject.py",
    "remattools/cli/main.py",
    "ckpttools/cli/main.py",
    "ckpttools/cli/dispatch.py",
    "remattools/lazy_imports.py",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: Absolute name of the module that the statement names.
        target: Absolute name of what is imported, which may be a module too.
        delayed: Whether it stands inside a function, a class or a condition.
        line: Its line.
    """

    module: str
    target: str
    delayed: bool
    line: int


def parts_of(path: pathlib.Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def room_of(name: str) -> int:
    """Place of a module's room in its package's list."""
    package, _, rest = name.partition(".")
    return ROOMS[package].index(rest.partition(".")[0] or "__init__")


def imports(here: tuple[str, ...], tree: ast.Module) -> list[Import]:
    """What a file imports, anywhere in it and by any means that can be read off its source."""
    at_top, found = {id(node) for node in tree.body}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, alias.name, id(node) not in at_top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level] if node.level else ())
            module = ".".join(filter(None, (base, node.module)))
            found += [
                Import(module, f"{module}.{alias.name}", id(node) not in at_top, node.lineno) for alias in node.names
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # `import_module("orbax.checkpoint")`, `sys.modules["jax._src.core"]`
            if re.fullmatch(r"(jax\._src|orbax\.checkpoint)(\.\w+)*", node.value):
                found.append(Import(node.value, node.value, True, node.lineno))
        elif isinstance(node, ast.Attribute) and node.attr == "_src":
            found.append(Import(f"{ast.unparse(node.value)}._src", f"{ast.unparse(node)}", True, node.lineno))
    return found


def offences(path: pathlib.Path, source: str) -> list[str]:
    """Everything in a file that the architecture forbids; `source` is its text, or what it might be."""
    here, tree, name = parts_of(path), ast.parse(source), str(path.relative_to(ROOT))
    found = []
    for each in imports(here, tree):
        package = each.target.partition(".")[0]
        place = f"{name}:{each.line} {each.target}"
        if package in ROOMS and package != here[0]:
            between = any(f"{each.target}.".startswith(f"{door}.") for door in BETWEEN_PACKAGES)
            if here[0] != "ckpttools" or not between:
                found.append(f"{place}: another package")
        elif package in ROOMS and room_of(each.target) > room_of(".".join(here)):
            found.append(f"{place}: a room below")
        if each.delayed and package not in EXTRAS and not (package == "jax" and "_src" in each.target):
            found.append(f"{place}: not at the top of the file")
        if re.match(r"jax\._src\b|.*\._src$", each.target) and name != "remattools/compat.py":
            found.append(f"{place}: private JAX")
        if package == "orbax" and name != "ckpttools/store/orbax.py":
            found.append(f"{place}: Orbax")
        if each.target.endswith(".*"):
            found.append(f"{place}: every name at once")
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    called |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called |= {each.target.rpartition(".")[2] for each in imports(here, tree)}
    if name not in BY_NAME:
        found += [f"{name}: {word}" for word in ("import_module", "__import__", "TYPE_CHECKING") if word in called]
    return found


STUBS = sorted(path for package in ROOMS for path in (ROOT / package).rglob("*.pyi"))


@pytest.mark.parametrize("path", [*FILES, *STUBS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_architecture_holds(path):
    assert offences(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        pytest.param("remattools/rules/paths.py", "from ..planner import frontier", id="a room below"),
        pytest.param("remattools/rules/paths.py", "import remattools.planner.model.block_ilp", id="by its full name"),
        pytest.param("remattools/rules/paths.py", "import remattools", id="the whole package"),
        pytest.param("remattools/rules/paths.py", "from .. import planner", id="a room as a name"),
        pytest.param(
            "remattools/rules/paths.py", "def f():\n    from ..planner import frontier", id="inside a function"
        ),
        pytest.param(
            "remattools/planner/model/block_ilp.py",
            "def f():\n    from . import graph",
            id="inside a function, allowed room",
        ),
        pytest.param(
            "remattools/planner/model/block_ilp.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import graph",
            id="for types only",
        ),
        pytest.param(
            "remattools/planner/model/block_ilp.py",
            "import typing\nif typing.TYPE_CHECKING:\n    pass",
            id="typing's flag",
        ),
        pytest.param(
            "remattools/planner/model/block_ilp.py",
            "try:\n    from . import graph\nexcept ImportError:\n    pass",
            id="tried",
        ),
        pytest.param(
            "remattools/rules/paths.py",
            "import importlib\nimportlib.import_module('remattools.planner')",
            id="importlib",
        ),
        pytest.param(
            "remattools/rules/paths.py",
            "from importlib import import_module as f\nf('.' + 'plan')",
            id="by another name",
        ),
        pytest.param("remattools/rules/paths.py", "__import__('remattools' + '.planner')", id="the built-in"),
        pytest.param("remattools/cli/commands.py", "import ckpttools", id="remattools imports ckpttools"),
        pytest.param(
            "ckpttools/session/session.py", "from remattools.rules import policies", id="another part of remattools"
        ),
        pytest.param(
            "ckpttools/session/session.py", "from remattools.rules import paths_of", id="a name that begins alike"
        ),
        pytest.param("ckpttools/session/session.py", "import remattools", id="remattools as a whole"),
        pytest.param("ckpttools/session/session.py", "from remattools import Rules", id="a public name of remattools"),
        pytest.param("ckpttools/spec/spec.py", "from .. import session", id="spec imports session"),
        pytest.param("ckpttools/tree/__init__.pyi", "from ..store import orbax as orbax", id="a stub"),
        pytest.param("ckpttools/session/session.py", "import orbax.checkpoint as ocp", id="Orbax"),
        pytest.param(
            "ckpttools/session/session.py", "import sys\nx = sys.modules['orbax.checkpoint']", id="Orbax in sys.modules"
        ),
        pytest.param("remattools/cli/commands.py", "from jax._src import core", id="private JAX"),
        pytest.param("remattools/cli/commands.py", "from jax import _src", id="private JAX as a name"),
        pytest.param("remattools/cli/commands.py", "import jax\nx = jax._src.core", id="private JAX as an attribute"),
        pytest.param("remattools/cli/commands.py", "from ..analysis.compare import *", id="every name at once"),
    ],
)
def test_a_way_around_it_is_found(file, source):
    """Control."""
    assert offences(ROOT / file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("remattools/planner/model/block_ilp.py", "from ...rules import paths\nfrom . import graph"),
        (
            "ckpttools/session/session.py",
            "from remattools.rules.paths import Pattern\nfrom remattools.errors import ExplainedError",
        ),
        ("ckpttools/mirror/remote_store.py", "def f():\n    import fsspec"),
        ("ckpttools/store/orbax.py", "import orbax.checkpoint as ocp"),
        ("remattools/compat.py", "from jax._src import core"),
    ],
)
def test_what_is_allowed_is_no_offence(file, source):
    """Control."""
    assert offences(ROOT / file, source) == []


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or nothing."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        circle = next(filter(None, (walk(each, [*trail, name]) for each in sorted(graph[name]))), [])
        done.add(name)
        return circle

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def test_no_modules_import_one_another_in_a_circle():
    """Within a room, too: files that need each other are one file, or lack a third one."""
    graph: dict[str, set[str]] = {".".join(parts_of(path)).removesuffix(".__init__"): set() for path in FILES}
    assert {path.suffix for path in FILES} == {".py", ".pyi"}, "what a package imports on first use counts, too"
    for path in FILES:
        here = parts_of(path)
        found = imports(here, ast.parse(path.read_text()))
        wanted = {each.target if each.target in graph else each.module for each in found}
        graph[".".join(here).removesuffix(".__init__")] |= wanted & graph.keys()
    assert sum(map(len, graph.values())) > len(FILES), "control: imports are found"
    assert cycle(graph) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"], "control"


@pytest.mark.parametrize("package", ROOMS)
def test_using_a_package_imports_no_extra(package):
    # The solver is no extra, but takes a second.
    extras = ["matplotlib", "libtpu", "fsspec", "safetensors", "boto3", "scipy.optimize"]
    # What JAX, flax and Orbax bring in by themselves is not ours.
    code = f"""
import sys, jax, flax.nnx, optax, orbax.checkpoint
before = set(sys.modules)
from {package} import *
print(sorted((set(sys.modules) - before) & set({extras})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ROOMS)
def test_what_is_public_is_documented(package):
    module = __import__(package)
    public = [name for name in module.__all__ if hasattr(getattr(module, name), "__module__")]
    assert public
    for name in public:
        value = getattr(module, name)
        assert getattr(value, "__doc__", None), f"{package}.{name} has no docstring"


def list_without_test(root: pathlib.Path, package: str) -> list[str]:
    """Modules of a package without a test function in the file at the path that mirrors theirs."""
    found = []
    for path in sorted((root / package).rglob("*.py")):
        module = path.relative_to(root)
        mirrored = root / "tests" / module.with_name(f"test_{module.name}")
        tree = ast.parse(mirrored.read_text()) if mirrored.is_file() else ast.Module([], [])
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if module.name not in WITHOUT_TEST and not any(name.startswith("test_") for name in names):
            found.append(str(module))
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_each_module_has_a_test_at_its_mirrored_path(package):
    assert list_without_test(ROOT, package) == []


def test_a_module_without_a_test_is_found(tmp_path):
    """Control."""
    sources = {
        "package/__init__.py": "",
        "package/room/tested.py": "",
        "package/room/forgotten.py": "",
        "package/room/emptied.py": "",
        "tests/package/room/test_tested.py": "def test_it():\n    pass",
        # In another room, so it tests another module; and a helper, but not a test.
        "tests/package/test_forgotten.py": "def test_it():\n    pass",
        "tests/package/room/test_emptied.py": "def helper():\n    pass",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert list_without_test(tmp_path, "package") == ["package/room/emptied.py", "package/room/forgotten.py"]

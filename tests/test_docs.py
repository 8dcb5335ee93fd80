# SPDX-License-Identifier: Apache-2.0
"""README, docs and docstrings are correct: every block runs or parses, and every shown output is compared."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import ckpttools
import remattools
from remattools.errors import ExplainedError
from tests.pages import PAGES, ROOT, PageError, blocks_of, check_page, missing_names

WITH_CODE = [page for page in PAGES if blocks_of(page.read_text())]
MODULES = [
    name
    for package in (remattools, ckpttools)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not name.endswith("__main__")
]


def identifier(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=identifier)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if parsed := check_page(page):
        pytest.skip(f"libtpu is not installed: {', '.join(parsed)} were only parsed")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("```python\nassert 1 == 2\n```\n", id="a block that fails"),
        pytest.param("1. a list\n\n    ```python\n    assert 1 == 2\n    ```\n", id="an indented block that fails"),
        pytest.param("```python\nprint('a 1')\n```\n\n```text\na 2\n```\n", id="an output that is not printed"),
        pytest.param(
            "```python\nprint('a 1')\n```\n\n```measured\nb 2\n```\n", id="a measured output with other words"
        ),
        pytest.param(
            "```python\nprint('a 1')\n```\n\n```measured\na 1\na 1\n```\n", id="a measured output with another row"
        ),
        pytest.param("Prose\n\n```text\na 2\n```\n", id="an output without a block"),
        pytest.param("```python\nprint(1)\n```\nand\n```text\n1\n```\n", id="an output after prose"),
        pytest.param("```console\n$ ckpttools ls .\nstep 1\n```\n", id="a command that prints something else"),
        pytest.param("```console\n$ remattools measure train.py:factory --targets tpu:v5e\n```\n", id="a TPU option"),
        pytest.param("```python\nrt.measure(f, target='tpu:v5e'\n```\n", id="a block for a TPU that does not parse"),
        pytest.param("```\nremattools plan a.py:f\n```\n", id="no language"),
        pytest.param("```rust\nfn main() {}\n```\n", id="an unknown language"),
        pytest.param("```python title='x'\n1\n```\n", id="a language with options"),
        pytest.param("~~~python\nassert 1 == 2\n~~~\n", id="another kind of fence"),
        pytest.param("```toml\n[remats]\n```\n", id="a table without a reader"),
        pytest.param("```sh\nmake tea\n```\n", id="a missing make target"),
        pytest.param("```sh\nckpttools ls runs --all\n```\n", id="a missing option"),
        pytest.param("```sh\ncurl example.org\n```\n", id="a foreign command"),
    ],
)
def test_a_wrong_page_fails(text, tmp_path, monkeypatch):
    """Control: every one of these must be detected."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((PageError, AssertionError)):
        check_page(tmp_path / "page.md", text)


def test_a_correct_page_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "```python\nprint('saved 2026-01-01 10:00:00', 1)\n```\n\n```text\nsaved 2025-12-12 00:00:01   1\n```\n"
        "```python\nprint('temp 5.64 MiB 0.315 G 2')\n```\n\n```measured\ntemp  1.2 KiB  3 M  1,000\n```\n"
        "```console\n$ ckpttools ls .\nno steps\n```\n```sh\nmake test   # the tests\n```\n"
        '```toml\n[remat.rules]\n"layers.*" = false\n```\n'
    )
    check_page(tmp_path / "page.md", text)


FILE_PAGE = """```python
# answer.py
import jax


def factory():
    return (lambda x: jax.numpy.sin(x).sum()), (jax.numpy.ones(3),)
```
```console
$ remattools residuals answer.py:factory
```

```measured
bytes  module  name  shape       saved
 99 B  .       cos   float32[9]  for the gradient of .:mul
99 B computed and saved; 7 B are arguments
```
"""


def test_commands_find_the_files_of_a_page_and_their_output_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_page(tmp_path / "page.md", FILE_PAGE) == []
    with pytest.raises(PageError):
        check_page(tmp_path / "page.md", FILE_PAGE.replace("arguments", "parameters"))
    with pytest.raises(PageError, match="does not show"):
        check_page(tmp_path / "page.md", FILE_PAGE.partition("```measured")[0])


def test_blocks_for_a_tpu_are_parsed_where_libtpu_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.pages.importlib.util.find_spec", lambda name: None)
    text = "```python\nnowhere('tpu:v5e')\n```\n\n```measured\n1\n```\n```python\nprint(1)\n```\n```text\n1\n```\n"
    assert check_page(tmp_path / "page.md", text) == ["page.md:2"]
    with pytest.raises(PageError):
        check_page(tmp_path / "page.md", text.replace("text\n1", "text\n2"))


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_name_on_a_page_exists(page):
    assert missing_names(page.read_text()) == []


@pytest.mark.parametrize(
    "code", ["ct.opens", "rt.compare(fn, runs=True)", "Storage(async_=True)", "tests/test_nothing.py"]
)
def test_a_missing_name_is_found(code):
    """Control."""
    assert missing_names(f"| `{code}` |")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, report=True)
    assert result.failed == 0
    # A section without a prompt would never run.
    shown = len(re.findall(r"^ *Examples?:\n +>>> ", inspect.getsource(module), re.MULTILINE))
    assert len(re.findall(r"^ *Examples?:$", inspect.getsource(module), re.MULTILINE)) == shown


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_the_reference_lists_the_public_surface(package):
    public = set(package.__all__)
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    listed = {
        entry.rpartition(".")[2]
        for page in pages
        for entry in re.findall(rf"^::: ({package.__name__}\.\S+)", page, re.M)
    }
    assert public
    assert listed == public


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_every_error_has_a_cause_and_a_fix(package):
    page = (ROOT / "docs" / "errors.md").read_text()
    public = {name: getattr(package, name) for name in package.__all__}
    kinds = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds
    assert {name for name in kinds if f"| `{name}` |" not in page} == set()


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_every_error_is_public(package):
    """Users can catch by name every error that they can meet."""
    errors = importlib.import_module(f"{package.__name__}.errors")
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert kinds - set(package.__all__) <= {"ExplainedError"}


def find_errors_without_a_part(source, kinds):
    """List the calls that create an error of `kinds` without what, why or fix."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            if any(each.arg is None for each in node.keywords):  # `**parts`, shared by several raises
                continue
            parts = {**dict(zip(("what", "why", "fix"), node.args)), **{each.arg: each.value for each in node.keywords}}
            given = {name for name, value in parts.items() if not (isinstance(value, ast.Constant) and not value.value)}
            if lacking := {"what", "why", "fix"} - given - kinds[node.func.id]:
                found.append((node.lineno, node.func.id, sorted(lacking)))
    return found


def find_error_kinds(package):
    """Return the error classes of a package, each with the parts that have a default."""
    errors = importlib.import_module(f"{package.__name__}.errors")
    kinds = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ExplainedError)
    }
    return {
        name: {part for part in ("why", "fix") if getattr(kind, f"default_{part}", "")} for name, kind in kinds.items()
    }


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_every_error_says_what_why_and_how_to_fix_it(package):
    kinds = find_error_kinds(package)
    assert "ExplainedError" in kinds
    files = sorted(pathlib.Path(package.__file__).parent.rglob("*.py"))
    lacking = [(path.name, *each) for path in files for each in find_errors_without_a_part(path.read_text(), kinds)]
    assert lacking == []


def test_an_error_without_a_part_is_found():
    """Control."""
    kinds = find_error_kinds(ckpttools)
    assert find_errors_without_a_part('SpecError(what="a", fix="c")', kinds) == [(1, "SpecError", ["why"])]
    assert find_errors_without_a_part('SpecError("a", "", "c")', kinds) == [(1, "SpecError", ["why"])]
    assert find_errors_without_a_part('SpecError("a", "b", "c"); CorruptStepError(what="a")', kinds) == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if f": {page}" not in navigation] == []


def test_the_readme_has_code():
    assert ROOT / "README.md" in WITH_CODE


def test_the_architecture_names_every_room_and_only_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for package in ("remattools", "ckpttools"):
        section = page.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
        named = {
            name.rstrip("/")
            for row in re.findall(r"^\| (`.*?) \| [^-]", section, re.MULTILINE)
            for name in re.findall(r"`(\w+/?)`", row)
        }
        entries = (ROOT / package).iterdir()
        rooms = {each.stem for each in entries if each.is_dir() or each.suffix == ".py"}
        assert named == {room for room in rooms if not room.startswith("__")}
    files = re.findall(r"`((?:remattools|ckpttools)/[\w/]+\.py)`", page)
    assert len(files) > 10
    assert [file for file in files if not (ROOT / file).is_file()] == []

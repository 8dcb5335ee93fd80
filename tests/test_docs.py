# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README and docs runs; blocks of one page share their names, as a reader would have them."""

import pathlib
import re

import pytest

import ckpttools
import remattools

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(page.relative_to(ROOT)) for page in WITH_CODE])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback names the line of the page.
        padding = "\n" * text.count("\n", 0, found.start(1))
        exec(compile(padding + found[1], str(page), "exec"), names)


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_the_reference_lists_all_that_is_public(package):
    """What `import x as x` in a package's `__init__` exports, which is its public surface."""
    source = pathlib.Path(package.__file__).read_text()
    public = set(re.findall(r"^from \.\S+ import (\w+) as \1$", source, re.MULTILINE))
    page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text()
    listed = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert public
    assert listed == public


@pytest.mark.parametrize("package", [remattools, ckpttools], ids=lambda package: package.__name__)
def test_every_error_has_its_cause_and_remedy(package):
    page = (ROOT / "docs" / "errors.md").read_text()
    kinds = {name for name, value in vars(package).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds
    assert {name for name in kinds if f"| `{name}` |" not in page} == set()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if f": {page}" not in navigation] == []


def test_the_readme_has_code():
    assert ROOT / "README.md" in WITH_CODE

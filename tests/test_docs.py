# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README and docs runs; blocks of one page share their names, as a reader would have them."""

import pathlib
import re

import pytest

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


def test_the_readme_has_code():
    assert ROOT / "README.md" in WITH_CODE

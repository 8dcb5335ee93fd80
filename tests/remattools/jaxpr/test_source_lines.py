# SPDX-License-Identifier: Apache-2.0
"""The user's line behind an equation."""

import jax
import jax.numpy as jnp

from remattools.jaxpr.source_lines import abbreviate_path, find_source_line, is_library


def _compute(x):
    return jax.nn.softmax(x)


def test_the_innermost_line_outside_of_libraries_is_named():
    jaxpr = jax.make_jaxpr(lambda x: _compute(x))(jnp.ones(3)).jaxpr
    number = _compute.__code__.co_firstlineno + 1
    assert find_source_line(jaxpr.eqns[0]).endswith(f"test_source_lines.py:{number}")
    assert find_source_line(jaxpr.eqns[0], with_function=True).startswith("_compute at ")


def test_files_of_libraries_are_known():
    assert is_library(jax.__file__)
    assert not is_library(__file__)


def test_paths_outside_of_the_current_directory_stay_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert abbreviate_path(str(tmp_path / "a.py")) == "a.py"
    assert abbreviate_path("/elsewhere/a.py") == "/elsewhere/a.py"

# SPDX-License-Identifier: Apache-2.0
"""Rules that were compiled earlier are found again, but only with their measurements."""

import pathlib

import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.compiler.cache import Cache
from remattools.planner.search.history import RuleHistory

from ...models import Tower
from ..spaces import space_of

RULES = rt.Rules({"layers.*": "nothing_saveable"})


def make_history(directory: pathlib.Path, target: str = "cpu") -> RuleHistory:
    _, space = space_of(lambda: Tower(1), (4, 6, 8))
    return RuleHistory(Cache(directory), space.outline, target)


def test_saved_rules_are_loaded_with_their_measurements(tmp_path: pathlib.Path) -> None:
    measured = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    make_history(tmp_path).save([RULES])
    assert make_history(tmp_path).load_measurements(lambda *_: measured) == [(RULES, measured)]
    assert make_history(tmp_path, "gpu").load_measurements(lambda *_: measured) == []  # control: another target


def test_rules_without_a_measurement_are_not_compiled(tmp_path: pathlib.Path) -> None:
    make_history(tmp_path).save([RULES])

    def measure_rules(_: rt.Rules, cache: Cache) -> rt.Measurement:
        return rt.measure(jnp.sin, jnp.ones(3), target="cpu", cache=cache)

    assert make_history(tmp_path).load_measurements(measure_rules) == []


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 100_000, '["not TOML ["]'])
def test_a_damaged_file_is_ignored(tmp_path: pathlib.Path, text: str) -> None:
    history = make_history(tmp_path)
    (tmp_path / history.name).write_text(text)
    assert history.load_measurements(lambda *_: pytest.fail("measured")) == []


def test_without_a_cache_nothing_is_stored() -> None:
    _, space = space_of(lambda: Tower(1), (4, 6, 8))
    history = RuleHistory(None, space.outline, "cpu")
    history.save([RULES])
    assert history.load_measurements(lambda *_: pytest.fail("measured")) == []

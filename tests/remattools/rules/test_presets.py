# SPDX-License-Identifier: Apache-2.0
"""Presets as values; tests/wild applies each to the architecture that it is for."""

import pathlib

import pytest

import remattools as rt


def test_every_file_is_a_preset_with_its_figures():
    folder = pathlib.Path(rt.__file__).parent / "rules" / "presets"
    assert rt.Rules.presets() == tuple(sorted(path.stem for path in folder.iterdir()))
    assert "llama3" in rt.Rules.presets()
    for name in rt.Rules.presets():
        assert len(rt.Rules.preset(name)) >= 1
        assert "# measured: " in (folder / f"{name}.toml").read_text(), name


def test_a_preset_is_layered_under_rules_of_ones_own():
    rules = rt.Rules.preset("llama3") | {"layers.[-1]": False}
    assert len(rules) == len(rt.Rules.preset("llama3")) + 1


@pytest.mark.parametrize("name", ["lama3", "", "../../../etc/passwd", "llama3.toml"])
def test_an_unknown_preset_names_those_that_there_are(name):
    with pytest.raises(rt.RuleError, match="does not exist") as caught:
        rt.Rules.preset(name)
    assert "'llama3'" in caught.value.fix

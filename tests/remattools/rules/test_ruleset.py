# SPDX-License-Identifier: Apache-2.0
"""Rules as a value, and presets; tests/wild applies each preset to the architecture that it is for."""

import pathlib

import pytest
from hypothesis import given

import remattools as rt
from tests.remattools.rules.test_rule_file import rules


def test_every_file_is_a_preset_with_its_measurements():
    directory = pathlib.Path(rt.__file__).parent / "rules" / "presets"
    assert rt.Rules.presets() == tuple(sorted(path.stem for path in directory.iterdir()))
    assert "llama3" in rt.Rules.presets()
    for name in rt.Rules.presets():
        assert len(rt.Rules.preset(name)) >= 1
        assert "# measured: " in (directory / f"{name}.toml").read_text(), name


def test_rules_of_the_user_override_a_preset():
    layered = rt.Rules.preset("llama3") | {"layers.[-1]": False}
    assert len(layered) == len(rt.Rules.preset("llama3")) + 1


@pytest.mark.parametrize("name", ["lama3", "", "../../../etc/passwd", "llama3.toml"])
def test_an_unknown_preset_names_the_existing_ones(name):
    with pytest.raises(rt.RuleError, match="does not exist") as caught:
        rt.Rules.preset(name)
    assert "'llama3'" in caught.value.fix


@given(rules, rules)
def test_layering_concatenates(a, b):
    assert tuple(a | b) == (*a, *b)
    assert len(a | b) == len(a) + len(b)


def test_rules_are_built_from_every_form(tmp_path):
    expected = rt.Rules({"a": "dots_saveable", "b": False})
    file = tmp_path / "rules.toml"
    file.write_text(expected.to_toml())
    for form in (expected, {"a": "dots_saveable", "b": False}, [("a", "dots_saveable"), ["b", False]], file, str(file)):
        assert rt.Rules.coerce(form) == expected
    assert rt.Rules.coerce({"b": False, "a": "dots_saveable"}) != expected  # control: the order counts


@pytest.mark.parametrize(
    "make",
    [
        lambda: rt.Rules({"a": True}),
        lambda: rt.Rules({"a": None}),
        lambda: rt.Rules.coerce("dots_saveable"),
        lambda: rt.Rules.coerce(3),
        lambda: rt.Rules.coerce(["a"]),
        lambda: rt.Rules.coerce(rt.Remat()),
    ],
)
def test_what_is_not_a_set_of_rules_raises(make):
    with pytest.raises(rt.RuleError) as caught:
        make()
    assert caught.value.why
    assert caught.value.fix


def test_a_policy_is_added_to_every_action_and_to_nothing_else():
    rules = rt.Rules(
        {
            "a": "nothing_saveable",
            "b": rt.Remat(save=("q",), every_n=2),
            "c": False,
            "d": "dots_saveable",
        }
    )
    masks = "dropout_masks_saveable"
    added = rules.add_policy(masks)
    assert added == rt.Rules(
        {
            "a": masks,
            "b": rt.Remat(masks, save=("q",), every_n=2),
            "c": False,
            "d": f"dots_saveable | {masks}",
        }
    )
    assert added.add_policy(masks) == added
    assert len(rt.Rules().add_policy(masks)) == 0
    with pytest.raises(rt.PolicyError, match="dropout_masks_saveable"):
        rules.add_policy("dropout_mask_saveable")

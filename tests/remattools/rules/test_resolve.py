# SPDX-License-Identifier: Apache-2.0
"""Which rule governs a module; no model is needed to decide that."""

import pytest

import remattools as rt
from remattools.rules.paths import parse_path
from remattools.rules.resolve import ModuleNode, find_sequence_index, format_closest, resolve

CONTAINER = frozenset[str]()


def nodes(*paths, methods=frozenset({"__call__"})):
    return [ModuleNode(paths=(parse_path(path),), class_names=("Block",), methods=methods) for path in paths]


LAYERS = [*nodes("layers", methods=CONTAINER), *nodes(*(f"layers.{i}" for i in range(5)), "head")]


def winners(rules, modules=LAYERS):
    return [decision.rule for decision in resolve(rt.Rules(rules), modules)]


def test_the_last_rule_that_selects_a_module_wins():
    rules = {"layers.*": "nothing_saveable", "layers.1": "dots_saveable", "layers.[-1]": False}
    assert winners(rules) == [None, 0, 1, 0, 0, 2, None]
    decisions = resolve(rt.Rules(rules), LAYERS)
    assert decisions[2].action == rt.Remat("dots_saveable")
    assert decisions[2].shadowed == (0,)
    assert (decisions[5].action, decisions[6].action) == (False, None)


def test_a_module_that_every_n_skips_keeps_the_earlier_rule():
    assert winners([("layers.*", "dots_saveable"), ("layers.*", rt.Remat(every_n=2))])[1:] == [1, 0, 1, 0, 1, None]
    assert winners({"layers.*": rt.Remat(every_n=2, offset=1)})[1:] == [None, 0, None, 0, None, None]


def test_every_n_counts_numbered_siblings_naturally():
    assert winners({"block*": rt.Remat(every_n=2)}, nodes("block10", "block2", "block1")) == [0, None, 0]


def test_every_n_outside_a_sequence_raises():
    with pytest.raises(rt.RuleError) as caught:
        winners({"head": rt.Remat(every_n=2)})
    assert "head is not in a sequence" in caught.value.what
    assert caught.value.fix


def test_a_module_matches_by_any_of_its_paths():
    shared = [ModuleNode(paths=(("first",), ("second",)))]
    (decision,) = resolve(rt.Rules({"second": "dots_saveable"}), shared)
    assert decision.path == ("second",)


@pytest.mark.parametrize(
    ("rule", "modules", "fix"),
    [
        pytest.param("layers.*.atn", nodes("layers.0.attn"), "the closest paths are layers.0.attn", id="misspelt"),
        pytest.param("layers.*", nodes("tower.layers.0"), '"**.layers.*" matches tower.layers.0', id="deeper"),
        pytest.param("layers", LAYERS, 'its children: "layers.*"', id="container"),
        pytest.param("coder", nodes("coder", methods=frozenset({"encode"})), "methods=('encode',)", id="method"),
    ],
)
def test_a_rule_that_selects_nothing_raises_with_a_hint(rule, modules, fix):
    rules = rt.Rules({rule: "nothing_saveable"})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        resolve(rules, modules)
    assert fix in caught.value.fix
    with pytest.warns(rt.UnmatchedRuleWarning, match="matches"):
        decisions = resolve(rules, modules, strict=False)
    assert {decision.rule for decision in decisions} == {None}


def test_all_rules_that_select_nothing_are_in_one_error():
    modules = nodes("blocks.0.attention", "blocks.0.mlp")
    rules = rt.Rules({"layers.*": "nothing_saveable", "mlp": "nothing_saveable", "atention": "nothing_saveable"})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        resolve(rules, modules)
    assert "2 rules match nothing in this model: 'layers.*', 'atention'" in caught.value.what
    assert "'atention': the closest paths are blocks.0.attention" in caught.value.fix
    assert "'layers.*': " in caught.value.fix
    with pytest.warns(rt.UnmatchedRuleWarning) as warned:
        decisions = resolve(rules, modules, strict=False)
    assert len(warned) == 2
    assert [decision.rule for decision in decisions] == [None, 1]  # control: the rule that matches is in force


def test_closest_paths_are_a_sentence_or_nothing():
    paths = [("layers", 0, "attn"), ("head",)]
    assert "layers.0.attn" in format_closest("layers.*.atn", paths)
    assert format_closest("layers.*.atn", []) == ""


@pytest.mark.parametrize(
    ("path", "index"), [("layers.3.attn", 3), ("block10", 1), ("block2", 0), ("head", None), ("single7", None)]
)
def test_the_index_in_the_innermost_sequence(path, index):
    paths = [parse_path(other) for other in ("layers.3.attn", "block2", "block10", "head", "single7")]
    assert find_sequence_index(parse_path(path), paths) == index

# SPDX-License-Identifier: Apache-2.0
"""`explain` says what is in force, why, and what to know before relying on it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.models import Tower, inputs


def test_rows_name_winner_and_shadowed_rules():
    rules = {"layers.*": "nothing_saveable", "layers.[:1]": "dots_saveable", "layers.2": False}
    rows = {row.path: row for row in rt.explain(Tower(), rules).rows}
    assert rows["layers.0"].rule == "layers.[:1]"
    assert rows["layers.0"].shadowed == ("layers.*",)
    assert rows["layers.1"].rule == "layers.*"
    assert rows["layers.2"].action is None
    assert rows["layers.2"].rule == "layers.2"
    assert rows["head"].rule == ""


def test_explaining_changes_nothing():
    model = Tower()
    before = nnx.graphdef(model)
    rt.explain(model, {"layers.*": "nothing_saveable"}, names=True, args=(inputs(),))
    assert nnx.graphdef(model) == before


def test_equal_layers_are_one_line_of_the_table():
    text = str(rt.explain(Tower(depth=12), {"layers.*": "nothing_saveable", "layers.[::3]": "dots_saveable"}))
    assert "layers.[0:10:3]" in text
    assert text.count("dots_saveable") == 1


def test_numbered_siblings_are_one_line_whose_path_is_a_pattern():
    model = nnx.Dict({f"dec_{i}": nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for i in range(3)})
    text = str(rt.explain(model, {"dec_*": "nothing_saveable"}))
    assert "dec_{0,1,2}" in text
    assert "dec_1" not in text
    ruled = [row.path for row in rt.explain(model, {"dec_{0,1,2}": "dots_saveable"}).rows if row.action]
    assert ruled == ["dec_0", "dec_1", "dec_2"]


def test_what_is_in_force_shows_no_empty_columns_of_rules():
    model = rt.apply(Tower(), {"layers.*": "nothing_saveable"})
    assert "shadowed" not in str(rt.explain(model))
    assert "shadowed" in str(rt.explain(model, {"layers.*": "nothing_saveable"}))


def test_equal_notes_are_one_line_for_all_their_modules():
    text = str(rt.explain(Tower(depth=4), {"layers.*": "nothing_saveable", "layers.*.mlp": "nothing_saveable"}))
    notes = [line for line in text.splitlines() if "inside the region" in line]
    assert len(notes) == 1, text
    assert notes[0].startswith("layers.[0:4].mlp: ")


def test_a_pattern_of_lists_is_extended_as_it_was_written():
    model = nnx.Dict(down=nnx.List([nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))]) for _ in range(2)]))
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        rt.explain(model, {"down.*": "nothing_saveable"})
    assert '"down.*.*"' in caught.value.fix


def test_shared_traces_are_counted():
    rows = {row.path: row for row in rt.explain(Tower(depth=4), {"layers.*": "nothing_saveable"}).rows}
    assert rows["layers.0"].shares == 4
    assert rows["head"].shares == 0


def test_aliases_are_shown():
    class Shared(Tower):
        def __init__(self):
            super().__init__(depth=2)
            self.first = self.layers[0]

    rows = {row.path: row for row in rt.explain(Shared()).rows}
    assert {"first", "layers.0"} <= {path for row in rows.values() if row.aliases for path in (row.path, *row.aliases)}
    assert not rows["head"].aliases


def test_nested_regions_are_warned_of():
    rows = {r.path: r for r in rt.explain(Tower(), {"layers.0": "nothing_saveable", "attention": "dots_saveable"}).rows}
    assert "inside the region layers.0" in rows["layers.0.attention"].warnings[0]
    assert not rows["layers.1.attention"].warnings


def test_callbacks_and_random_operations_are_warned_of():
    class Noisy(nnx.Module):
        def __init__(self, width, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            jax.debug.print("mean {}", x.mean())
            return self.dropout(jnp.sin(x))

    rows = rt.explain(Tower(block=Noisy), {"layers.*": "nothing_saveable"}, args=(inputs(),)).regions
    assert any("back to Python" in warning for warning in rows[0].warnings)
    assert any("recomputed from the same key" in warning for warning in rows[0].warnings)
    rows = rt.explain(Tower(block=Noisy), {"layers.*": "dropout_masks_saveable"}, args=(inputs(),)).regions
    assert any("masks dropout:lt" in warning for warning in rows[0].warnings)
    assert not any("recomputed from the same key" in warning for warning in rows[0].warnings)


class Stacked(nnx.Module):
    """Layers stacked for a scan, as in large models."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = stack(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return jnp.sin(block(x))

        return run(self.blocks, x)


class Stages(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stages = nnx.List([Stacked(rngs), Stacked(rngs)])
        self.position = nnx.Embed(6, 8, rngs=rngs)
        self.unused = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.position(jnp.arange(6))
        for stage in self.stages:
            x = stage(x)
        return x


def warnings_of(pattern, action, path):
    rows = rt.explain(Stages(), {pattern: action}, args=(inputs(),)).rows
    return " ".join(next(row for row in rows if row.path == path).warnings)


def test_every_n_over_stacked_layers_is_warned_of():
    assert "every_n=2 takes all" in warnings_of("stages.*.blocks", rt.Remat(every_n=2), "stages.0.blocks")
    assert "every_n" not in warnings_of("stages.*", rt.Remat(every_n=2), "stages.0")
    assert "every_n" not in warnings_of("stages.*.blocks", rt.Remat(), "stages.0.blocks")


def test_rules_without_an_activation_to_free_are_warned_of():
    assert "nothing but what it returns" in warnings_of("position", rt.Remat(), "position")
    assert "not called" in warnings_of("unused", rt.Remat(), "unused")
    assert "no activation" not in warnings_of("stages.*", rt.Remat(), "stages.0")
    # A rule that frees something somewhere is not bothered about its other modules.
    assert "no activation" not in warnings_of("{stages.*,position}", rt.Remat(), "position")


def test_names_need_arguments():
    with pytest.raises(rt.RuleError) as caught:
        rt.explain(Tower(), {"layers.*": "nothing_saveable"}, names=True)
    assert "args" in caught.value.fix


def test_abstract_models_and_inputs():
    model = nnx.eval_shape(lambda: Tower())
    spec = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)
    row = rt.explain(model, {"layers.*": "nothing_saveable"}, names=True, args=(spec,)).regions[0]
    assert any(value.label == "mlp.up" for value in row.values)

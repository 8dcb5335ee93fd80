# SPDX-License-Identifier: Apache-2.0
"""Applying rules changes memory and nothing else."""

import copy
import pickle

import cloudpickle
import jax
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.exactness import assert_exact, assert_same_values, gradients, temp_bytes
from tests.remattools.models import Block, Tower, inputs, loss


@pytest.mark.parametrize(
    ("policy", "saves_memory"),
    [
        pytest.param("nothing_saveable", True, id="nothing"),
        pytest.param("dots_saveable", True, id="dots"),
        # Control: a region that saves everything must not look like a saving.
        pytest.param("everything_saveable", False, id="control"),
    ],
)
def test_apply_keeps_gradients_and_cuts_the_compilers_temporaries(policy, saves_memory):
    plain, x = Tower(depth=6), inputs(batch=32, seq=16)
    ruled = rt.apply(nnx.clone(plain), {"layers.*": policy})
    assert_exact(loss, plain, ruled, x)
    assert (temp_bytes(loss, ruled, x) < 0.9 * temp_bytes(loss, plain, x)) is saves_memory


def test_jitted_results_equal_handwritten_checkpoint_bit_for_bit():
    x = inputs()

    class Handwritten(Tower):
        def __call__(self, x):
            for layer in self.layers:
                graphdef, state = nnx.split(layer)
                x = jax.checkpoint(lambda s, x, g=graphdef: nnx.merge(g, s)(x))(state, x)
            return self.head(x)

    ours = gradients(loss, rt.apply(Tower(), {"layers.*": "nothing_saveable"}), x)
    by_hand = gradients(loss, Handwritten(), x)
    jax.tree.map(np.testing.assert_array_equal, ours, by_hand)


def test_the_compiled_program_is_that_of_handwritten_checkpoint():
    x = inputs()
    policy = jax.checkpoint_policies.dots_saveable

    class Handwritten(Tower):
        def __call__(self, x):
            for layer in self.layers:
                graphdef, state = nnx.split(layer)
                x = jax.checkpoint(lambda s, x, g=graphdef: nnx.merge(g, s)(x), policy=policy)(state, x)
            return self.head(x)

    ruled = rt.apply(Tower(), {"layers.*": "dots_saveable"})
    assert temp_bytes(loss, ruled, x) == temp_bytes(loss, Handwritten(), x)


def test_equal_blocks_are_traced_once():
    traced = []

    class Counting(Block):
        def __call__(self, x):
            traced.append(1)
            return super().__call__(x)

    ruled = rt.apply(Tower(depth=5, block=Counting), {"layers.*": "nothing_saveable"})
    gradients(loss, ruled, inputs())
    assert len(traced) == 1
    traced.clear()
    gradients(loss, rt.revert(ruled), inputs())  # control: plain blocks are traced each
    assert len(traced) == 5


def test_state_tree_class_and_graph_survive():
    plain = Tower()
    ruled = rt.apply(nnx.clone(plain), {"layers.*": "nothing_saveable"})
    assert jax.tree.structure(nnx.state(ruled)) == jax.tree.structure(nnx.state(plain))
    block = ruled.layers[0]
    assert isinstance(block, Block)
    assert type(block) is not Block
    assert (type(block).__name__, type(block).__qualname__, type(block).__module__) == (
        Block.__name__,
        Block.__qualname__,
        Block.__module__,
    )
    nnx.update(ruled, nnx.state(plain))
    nnx.update(plain, nnx.state(ruled))


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(nnx.clone, id="clone"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle"),
        pytest.param(lambda m: cloudpickle.loads(cloudpickle.dumps(m)), id="cloudpickle"),
        pytest.param(lambda m: nnx.merge(*nnx.split(m)), id="split-merge"),
        pytest.param(lambda m: nnx.merge(pickle.loads(pickle.dumps(nnx.graphdef(m))), nnx.state(m)), id="graphdef"),
    ],
)
def test_copies_run_under_the_same_rules(duplicate):
    ruled = rt.apply(Tower(), {"layers.*": "nothing_saveable"})
    again = duplicate(ruled)
    assert type(again.layers[0]) is type(ruled.layers[0])
    assert nnx.graphdef(again) == nnx.graphdef(ruled)
    assert str(rt.explain(again)) == str(rt.explain(ruled))
    assert_exact(loss, Tower(), again, inputs())


def test_revert_restores_exactly():
    model = Tower()
    before = nnx.graphdef(model)
    rt.apply(model, {"layers.*": "nothing_saveable"})
    assert nnx.graphdef(model) != before
    rt.revert(model)
    assert nnx.graphdef(model) == before
    assert type(model.layers[0]) is Block


def test_applied_ends_with_its_block_also_after_an_error():
    model = rt.apply(Tower(), {"layers.0": "dots_saveable"})
    before = nnx.graphdef(model)

    def fail():
        with rt.applied(model, {"layers.*": "nothing_saveable"}) as inside:
            assert inside is model
            assert nnx.graphdef(model) != before
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert nnx.graphdef(model) == before


def test_applying_twice_is_applying_once():
    rules = {"layers.*": "nothing_saveable", "attention": rt.Remat(save=("qkv",))}
    once, twice = rt.apply(Tower(), rules), rt.apply(rt.apply(Tower(), rules), rules)
    assert nnx.graphdef(once) == nnx.graphdef(twice)


def test_two_models_of_one_class_do_not_influence_each_other():
    x = inputs(batch=32, seq=16)
    first = rt.apply(Tower(depth=6), {"layers.*": "nothing_saveable"})
    alone = temp_bytes(loss, first, x)
    rt.apply(Tower(depth=6, seed=1), {"layers.*": "everything_saveable"})
    assert temp_bytes(loss, first, x) == alone
    assert type(Tower().layers[0]) is Block


def test_the_last_rule_wins_and_false_excludes():
    model = rt.apply(Tower(), {"layers.*": "nothing_saveable", "layers.1": "dots_saveable", "layers.[-1]": False})
    actions = [rt.explain(model).rows[i].action for i in _rows(model, "layers.0", "layers.1", "layers.2")]
    assert actions == [rt.Remat(policy="nothing_saveable"), rt.Remat(policy="dots_saveable"), None]


def _rows(model, *paths):
    known = [row.path for row in rt.explain(model).rows]
    return [known.index(path) for path in paths]


def test_a_rule_that_matches_nothing_names_the_closest_paths():
    model = Tower()
    before = nnx.graphdef(model)
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        rt.apply(model, {"layers.*": "nothing_saveable", "layers.*.atention": "nothing_saveable"})
    assert "attention" in caught.value.fix
    assert nnx.graphdef(model) == before
    with pytest.warns(rt.UnmatchedRuleWarning, match="atention"):
        rt.apply(model, {"layers.*.atention": "nothing_saveable"}, strict=False)


def test_a_rule_for_a_container_raises_and_names_its_children():
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        rt.apply(Tower(), {"layers": "nothing_saveable"})
    assert "layers.*" in caught.value.fix


def test_a_missing_method_lists_the_existing_ones():
    class Coder(nnx.Module):
        def __init__(self):
            self.proj = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def encode(self, x):
            return jax.numpy.sin(self.proj(x))

    class Model(nnx.Module):
        def __init__(self):
            self.coder = Coder()

        def __call__(self, x):
            return self.coder.encode(x)

    with pytest.raises(rt.UnmatchedRuleError) as caught:
        rt.apply(Model(), {"coder": "nothing_saveable"})
    assert "encode" in caught.value.fix
    x = inputs(batch=2)
    assert_exact(loss, Model(), rt.apply(Model(), {"coder": rt.Remat(methods=("encode",))}), x)


def test_generator_and_coroutine_methods_raise():
    class Streaming(nnx.Module):
        def words(self, x):
            yield x

        async def later(self, x):
            return x

        async def stream(self, x):
            yield x

    for method in ("words", "later", "stream"):
        with pytest.raises(rt.RuleError, match="generator or a coroutine"):
            rt.apply(Streaming(), {".": rt.Remat(methods=(method,))})


def test_on_takes_a_single_action():
    model = rt.apply(Tower(), "nothing_saveable", on="layers.*")
    assert len(rt.explain(model).regions) == 3
    with pytest.raises(rt.RuleError):
        rt.apply(model, {"layers.*": "nothing_saveable"}, on="layers.*")


def test_a_module_under_two_paths_matches_by_either():
    class Shared(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([Block(8, rngs) for _ in range(2)])
            self.first = self.layers[0]

        def __call__(self, x):
            return self.first(self.layers[1](self.layers[0](x)))

    for pattern in ("first", "layers.0"):
        ruled = rt.apply(Shared(), {pattern: "nothing_saveable"})
        assert type(ruled.first) is type(ruled.layers[0]) is not Block
        assert ruled.first is ruled.layers[0]
        assert_exact(loss, Shared(), ruled, inputs())


def test_abstract_models_are_ruled_without_arrays():
    abstract = nnx.eval_shape(lambda: Tower(depth=4))
    rt.apply(abstract, {"layers.*": "nothing_saveable"})
    assert len(rt.explain(abstract).regions) == 4


def test_apply_copies_no_array():
    model = Tower()
    before = [id(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    rt.apply(model, {"layers.*": "nothing_saveable"})
    assert [id(leaf) for leaf in jax.tree.leaves(nnx.state(model))] == before
    assert_same_values(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(Tower())))


@pytest.mark.parametrize(
    ("thing", "what"),
    [
        (lambda x: x, "the function <lambda> contains no nnx module"),
        (Tower, "Tower is a class"),
        (nnx.state(Tower()), "this State contains no nnx module"),
        (3, "this int contains no nnx module"),
    ],
)
def test_a_value_without_modules_raises(thing, what):
    with pytest.raises(rt.RuleError) as caught:
        rt.apply(thing, {"layers.*": "nothing_saveable"})
    assert what in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("rules", [["layers.*"], [("layers.*",)], [3]])
def test_a_list_without_pairs_raises(rules):
    with pytest.raises(rt.RuleError, match="is not a set of rules"):
        rt.apply(Tower(), rules)

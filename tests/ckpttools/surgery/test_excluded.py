# SPDX-License-Identifier: Apache-2.0
"""Recomputed variables are neither saved nor restored unless a spec asks for them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree.snapshot import take

SAVE_ALL = {"exclude": ()}


class Counter(nnx.Cache):
    pass


class Net(nnx.Module):
    def __init__(self, size=0, sown=0, value=0.0):
        self.w = nnx.Param(jnp.full(3, value, jnp.float32))
        if size:
            self.cached = nnx.Cache(jnp.full(size, value, jnp.float32))
            self.own = Counter(jnp.full(size, value, jnp.float32))
        if sown:
            self.h = nnx.Intermediate(tuple(jnp.full(2, value, jnp.float32) for _ in range(sown)))


def save(directory, state, **fields):
    with ct.open(ct.CheckpointSpec(directory=directory, **fields)) as ckpt:
        ckpt.save(1, state)


def restore(directory, state, **fields):
    with ct.open(ct.CheckpointSpec(directory=directory, **fields)) as ckpt:
        return ckpt.restore(state)


def names(directory):
    return [leaf.name for leaf in ct.show(directory).leaves]


@pytest.mark.parametrize(
    "form", [lambda model: model, nnx.state, lambda model: nnx.split(model)[1]], ids=["live", "state", "split"]
)
def test_recomputed_variables_are_left_out_and_listed(tmp_path, form):
    save(tmp_path, {"model": form(Net(size=4, sown=2))})
    assert names(tmp_path) == ["model.w"]
    shown = ct.show(tmp_path)
    assert shown.excluded == (("model.cached", "Cache"), ("model.h", "Intermediate"), ("model.own", "Cache"))
    assert "not saved: model.h (Intermediate)" in str(shown)
    save(tmp_path / "all", {"model": form(Net(size=4, sown=2))}, **SAVE_ALL)  # control
    assert len(names(tmp_path / "all")) == 5
    assert ct.show(tmp_path / "all").excluded == ()


@pytest.mark.parametrize("fields", [{}, SAVE_ALL], ids=["left out", "saved by an earlier version"])
@pytest.mark.parametrize(
    "fresh", [Net(), Net(size=7), Net(sown=1), Net(size=4, sown=2)], ids=["none", "size", "sown", "equal"]
)
def test_a_restart_does_not_depend_on_recomputed_variables(tmp_path, fields, fresh):
    save(tmp_path, {"model": Net(size=4, sown=2, value=5.0)}, **fields)
    model = nnx.clone(fresh)
    report = restore(tmp_path, {"model": model})
    assert model.w[...].tolist() == [5.0] * 3
    rest = nnx.Any(nnx.Cache, nnx.Intermediate)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(model, rest), nnx.state(fresh, rest)))
    ignored = {leaf.source for leaf in report.altered if leaf.action == "excluded"}
    assert ignored == ({"model.cached", "model.own", "model.h.0", "model.h.1"} if fields else set())


def test_what_was_asked_for_is_restored_and_required(tmp_path):
    save(tmp_path, {"model": Net(size=4, sown=1, value=5.0)}, **SAVE_ALL)
    for load in (functools.partial(restore, **SAVE_ALL), ct.load):
        model = Net(size=4, sown=1)
        load(tmp_path, {"model": model})
        assert model.cached[...].tolist() == [5.0] * 4
        with pytest.raises(ct.StructureError, match=r"model\.cached"):
            load(tmp_path, {"model": Net(size=7, sown=1)})


def test_rules_apply_to_their_items_only(tmp_path):
    rules = (ct.Exclude(items=("model",)), ct.Exclude(types=(), paths=("server.w",)))
    save(tmp_path, {"model": Net(size=4), "server": Net(size=4, value=5.0)}, exclude=rules)
    assert names(tmp_path) == ["model.w", "server.cached", "server.own"]
    # `ct.load` has no spec: the step names its rules.
    server = Net(size=4, value=1.0)
    ct.load(tmp_path, {"model": Net(size=9), "server": server})
    assert (server.cached[0], server.w[0]) == (5.0, 1.0)


class Source:
    def __init__(self, position):
        self.position = position

    def get_state(self):
        assert self.position is not None, "asked for its state"
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def test_a_pattern_leaves_out_trees_and_stateful_objects(tmp_path):
    rule = ct.Exclude(paths=("data", "params.scratch"))
    state = {"data": Source(None), "params": {"w": jnp.ones(2), "scratch": {"a": object()}}}
    save(tmp_path, state, exclude=rule)
    assert names(tmp_path) == ["params.w"]
    fresh = {"data": Source(3), "params": {"w": jnp.zeros(2), "scratch": {"a": 7, "b": 8}}}
    filled = restore(tmp_path, fresh, exclude=rule).state
    assert (filled["data"].position, filled["params"]["scratch"]) == (3, {"a": 7, "b": 8})
    assert filled["params"]["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ct.StructureError):  # control: without the rule they are state
        restore(tmp_path, fresh)


def test_a_pattern_ignores_what_an_earlier_step_holds(tmp_path):
    save(tmp_path, {"params": {"w": jnp.ones(2), "old": jnp.ones(5)}})
    report = restore(tmp_path, {"params": {"w": jnp.zeros(2)}}, exclude=ct.Exclude(paths=("params.old",)))
    assert [str(leaf) for leaf in report.altered] == ["params.old: excluded, float32[5]"]


def test_an_item_of_recomputed_variables_only_is_warned_of(tmp_path):
    with pytest.warns(ct.CheckpointWarning, match="nothing of the item 'cache' is saved"):
        save(tmp_path, {"cache": nnx.state(Net(size=4), nnx.Cache)})
    save(tmp_path / "all", {"cache": nnx.state(Net(size=4), nnx.Cache)}, **SAVE_ALL)
    assert names(tmp_path / "all") == ["cache.cached", "cache.own"]


def test_a_pytree_without_types_is_saved_as_it_is(tmp_path):
    save(tmp_path, {"model": nnx.to_pure_dict(nnx.state(Net(size=4)))})
    assert names(tmp_path) == ["model.cached", "model.own", "model.w"]


def test_sown_tracers_that_leaked_do_not_reach_a_save(tmp_path):
    model = Net()
    leaked = []
    jax.jit(lambda x: leaked.append(x))(jnp.ones(2))
    model.h = nnx.Intermediate((leaked[0],))
    save(tmp_path, {"model": model})
    assert names(tmp_path) == ["model.w"]


class Cache(nnx.Param):
    """A trained parameter whose class has the name of one of flax's types."""


class Sown(nnx.Param, nnx.Intermediate):
    """A trained parameter that derives from one of flax's types."""


class Named(nnx.Module):
    def __init__(self, value=0.0):
        self.a = Cache(jnp.full(2, value))
        self.b = Sown(jnp.full(2, value))
        self.c = nnx.Cache(jnp.full(2, value))


def test_a_parameter_is_state_whatever_its_class_is_called(tmp_path):
    save(tmp_path, {"model": Named(3.0)})
    assert names(tmp_path) == ["model.a", "model.b"], "control: flax's own cache is left out"
    fresh = Named()
    restore(tmp_path, {"model": fresh})
    assert (fresh.a[0], fresh.b[0], fresh.c[0]) == (3.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [(ct.Exclude(types=("Sown",)), "Sown"), (ct.Exclude(paths=("*.b",)), "*.b")],
    ids=["type", "pattern"],
)
def test_a_parameter_that_a_rule_finds_is_warned_of(tmp_path, rule, reason):
    with pytest.warns(ct.CheckpointWarning, match="model.b of the type nnx.Param: not saved"):
        save(tmp_path, {"model": Named()}, exclude=rule)
    assert ("model.b", reason) in ct.show(tmp_path).excluded
    snapshot = take({"model": Named()}, None, [ct.Exclude(paths=("model.b",))])  # control: named, so no warning
    assert snapshot.excluded_parameters == (("model.b", "model.b"),)


class Tied(nnx.Module):
    def __init__(self, value=0.0, *, is_shared=True):
        self.head = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.head.kernel[...] = jnp.full((2, 2), value)
        self.debug = nnx.Dict(last=self.head if is_shared else nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(1)))


def test_a_variable_with_a_name_outside_the_rule_is_state(tmp_path):
    rule = ct.Exclude(paths=("model.debug",))
    save(tmp_path, {"model": Tied(5.0)}, exclude=rule)
    assert names(tmp_path) == ["model.debug.last.kernel"], "the first of its two names"
    for read in (lambda state: restore(tmp_path, state, exclude=rule), lambda state: ct.load(tmp_path, state)):
        fresh = Tied()
        read({"model": fresh})
        assert fresh.head.kernel[0, 0] == 5.0
    save(tmp_path / "plain", {"model": Tied(5.0, is_shared=False)}, exclude=rule)  # control: not shared
    assert names(tmp_path / "plain") == ["model.head.kernel"]


def test_a_functional_state_gets_a_variable_with_a_name_outside_the_rule(tmp_path):
    """`nnx.split` keeps the first name of a shared variable only; the step knows that it had another one."""
    rule = ct.Exclude(paths=("model.debug",))
    save(tmp_path, {"model": Tied(5.0)}, exclude=rule)
    for read in (lambda state: restore(tmp_path, state, exclude=rule), lambda state: ct.load(tmp_path, state)):
        report = read({"model": nnx.split(Tied())[1]})
        assert report.state["model"]["debug"]["last"]["kernel"][0, 0] == 5.0
        assert not report.altered
    save(tmp_path / "plain", {"model": Tied(5.0, is_shared=False)}, exclude=rule)  # control: not shared, so not state
    state = restore(tmp_path / "plain", {"model": nnx.state(Tied(is_shared=False))}, exclude=rule).state["model"]
    fresh = nnx.state(Tied(is_shared=False))
    assert jnp.array_equal(state["debug"]["last"]["kernel"], fresh["debug"]["last"]["kernel"])
    assert state["head"]["kernel"][0, 0] == 5.0


class Normed(nnx.Module):
    def __init__(self, value=0.0):
        self.w = nnx.Param(jnp.full(2, value))
        self.layer = nnx.Dict(mean=nnx.BatchStat(jnp.full(2, value)), hits=nnx.Cache(jnp.full(2, value)))


FORMS = {
    "live": (lambda model: model, "model.{}"),
    "state": (nnx.state, "model.{}"),
    "state in a dict": (lambda model: {"net": nnx.state(model)}, "model.net.{}"),
    "graph definition and state": (nnx.split, "model.1.{}"),
    "flat state": (lambda model: dict(enumerate(nnx.to_flat_state(nnx.state(model)).leaves)), ""),
    "variables": (lambda model: {"w": model.w, "layer": dict(model.layer)}, "model.{}"),
}


@pytest.mark.parametrize(("form", "name"), FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize(("types", "left_out"), [(("BatchStat",), "layer.mean"), (("Cache",), "layer.hits")], ids=str)
def test_a_type_excludes_variables_in_every_form_of_a_state(tmp_path, form, name, types, left_out):
    rule = ct.Exclude(types=types)
    save(tmp_path, {"model": form(Normed(5.0))}, exclude=rule)
    ((excluded, reason),) = ct.show(tmp_path).excluded
    assert reason == types[0]
    assert not name or excluded == name.format(left_out)
    assert len(names(tmp_path)) == 2, "control: the other two are saved"
    state = restore(tmp_path, {"model": form(Normed(1.0))}, exclude=rule).state
    values = [float(leaf[0]) for leaf in jax.tree.leaves(state)]
    assert sorted(values) == [1.0, 5.0, 5.0]


class Buffered(Source):
    def get_state(self):
        return {"position": self.position, "buffer": [jnp.ones(2)]}


@pytest.mark.parametrize("pattern", ["**.buffer", "data.position", "data.buffer.[0]"])
def test_a_stateful_object_is_restored_whole_despite_a_pattern(tmp_path, pattern):
    rule = ct.Exclude(paths=(pattern,))
    with pytest.warns(ct.CheckpointWarning, match="saved as a whole"):
        save(tmp_path, {"data": Buffered(3), "a": jnp.ones(1)}, exclude=rule)
    fresh = Source(0)
    report = restore(tmp_path, {"data": fresh, "a": jnp.zeros(1)}, exclude=rule)
    assert (report.step, fresh.position) == (1, 3)
    assert ct.verify(tmp_path).ok

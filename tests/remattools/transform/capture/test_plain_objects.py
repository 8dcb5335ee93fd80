"""Plain Python objects in a call: caches, recorders, contexts, outputs, and changes between two traces."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt

from ...exactness import assert_same_values, gradients

ACTIONS = [
    pytest.param("nothing_saveable", id="nothing"),
    pytest.param(rt.Remat(save=("proj",)), id="names"),
    pytest.param(rt.Remat(group=2), id="group"),
]


class Layer(nnx.Module):
    scale = 2.0

    def __init__(self, rngs):
        self.proj = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.proj(x)) * self.scale


def host(call, layer=Layer, depth=3, **attributes):
    """A model whose method is `call(layers, x)`."""

    class Host(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0, dropout=1)
            self.layers = nnx.List([layer(rngs) for _ in range(depth)])
            self.rngs = rngs

        def __call__(self, x):
            return call(self, x)

    model = Host()
    for layer, value in zip(model.layers, attributes.get("each", ()), strict=False):
        layer.extra = value
    return model


def loss(model, x):
    return jnp.mean(model(x) ** 2)


X = jax.random.normal(jax.random.key(0), (3, 4))


def assert_same(make, action, pattern="layers.*"):
    plain, ruled = make(), rt.apply(make(), {pattern: action})
    for _ in range(2):
        assert_same_values(gradients(loss, ruled, X), gradients(loss, plain, X))
        assert_same_values(*(nnx.to_pure_dict(nnx.grad(loss)(model, X)) for model in (ruled, plain)))
    assert_same_values(*(nnx.to_pure_dict(nnx.state(model)) for model in (ruled, plain)))


class Cache:
    def __init__(self):
        self.keys, self.length = None, 0

    def update(self, new):
        self.keys = new if self.keys is None else jnp.concatenate([self.keys, new])
        self.length += 1
        return self.keys


class Slotted:
    __slots__ = ("__length", "keys")

    def __init__(self):
        self.keys, self.__length = None, 0

    update = Cache.update

    @property
    def length(self):
        return self.__length

    @length.setter
    def length(self, value):
        self.__length = value


class Named(collections.OrderedDict):
    """A mapping with attributes, as outputs of models often are; not a pytree."""

    keys_seen = property(lambda self: len(self))

    @property
    def keys_(self):
        return self["keys"]

    def update_(self, new):
        self["keys"] = new if "keys" not in self else self["keys"] + new


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", [Cache, Slotted])
def test_a_cache_object_for_each_block_is_written_to(action, kind):
    class Caching(Layer):
        def __call__(self, x, cache):
            return jnp.tanh(self.proj(x)) + cache.update(x).mean(0)

    def call(model, x):
        caches = [kind() for _ in model.layers]
        for _ in range(2):  # empty at first, then with arrays
            for layer, cache in zip(model.layers, caches, strict=True):
                x = layer(x, cache)
        return x + sum(cache.keys.sum() * cache.length for cache in caches)

    assert_same(lambda: host(call, Caching), action)


@pytest.mark.parametrize("action", ACTIONS)
def test_one_recorder_is_passed_from_block_to_block(action):
    class Recorder(types.SimpleNamespace):
        pass

    class Recording(Layer):
        def __call__(self, x, recorder):
            y = self.proj(x)
            recorder.outputs.append(y)
            recorder.by_name["last"] = y
            recorder.queue.append(y.sum())
            return jnp.tanh(y)

    def call(model, x):
        recorder = Recorder(outputs=[], by_name={}, queue=collections.deque())
        for layer in model.layers:
            x = layer(x, recorder)
        assert len(recorder.outputs) == len(recorder.queue) == 3
        return x + sum(y.sum() for y in recorder.outputs) + recorder.by_name["last"] + recorder.queue[0]

    assert_same(lambda: host(call, Recording), action)


@pytest.mark.parametrize("action", ACTIONS[:2])
def test_a_hook_that_appends_to_a_list_outside(action):
    class Hooked(Layer):
        def __call__(self, x, hook):
            y = jnp.tanh(self.proj(x))
            hook(y)
            return y

    def call(model, x):
        seen = []
        for layer in model.layers:
            x = layer(x, lambda y: seen.append(y))
        assert len(seen) == 3
        return x + sum(y.sum() for y in seen)

    assert_same(lambda: host(call, Hooked), action)


class Holder:
    def __init__(self, items):
        self.items = items


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("write", ["list", "holder", "hook"])
def test_a_list_passed_together_with_its_holder(action, full, write):
    class Writing(Layer):
        def __call__(self, x, items, holder, hook):
            y = jnp.tanh(self.proj(x))
            {"list": items, "holder": holder.items, "hook": hook()}[write].append(y)
            assert items is holder.items is hook()
            assert items[-1] is y
            return y + items[0]

    def call(model, x):
        items = [x] if full else []
        holder = Holder(items)
        for layer in model.layers:
            x = layer(x, items, holder, lambda: items)
        assert holder.items is items
        assert len(items) == 3 + full
        return x + sum(y.sum() for y in items)

    assert_same(lambda: host(call, Writing), action)


@pytest.mark.parametrize("action", ACTIONS)
def test_objects_made_inside_are_each_blocks_own(action):
    class Making(Layer):
        def __call__(self, x):
            items = []
            self.extra = Holder({"n": 0})
            return jnp.tanh(self.proj(x)), items, Holder(items), {1}, lambda: items

    def call(model, x):
        for number, layer in enumerate(model.layers):
            x, items, holder, numbers, hook = layer(x)
            assert items is holder.items is hook()
            assert items == []
            assert numbers == {1}
            assert layer.extra.items == {"n": 0}
            items.append(number)
            numbers.add(2)
            layer.extra.items["n"] = 1
        for layer in model.layers:
            del layer.extra
        return x

    assert_same(lambda: host(call, Making), action)


@pytest.mark.parametrize("action", ACTIONS)
def test_an_output_that_is_not_a_pytree(action):
    @dataclasses.dataclass(frozen=True)
    class Output:
        hidden: jax.Array
        attention: Named
        label: str

    class Returning(Layer):
        def __call__(self, x):
            y = jnp.tanh(self.proj(x))
            named = Named()
            named.update_(y)
            named.update_(x)
            return Output(y, named, "fine")

    def call(model, x):
        for layer in model.layers:
            out = layer(x)
            assert isinstance(out, Output)
            assert out.label == "fine"
            x = out.hidden + out.attention.keys_
        return x

    assert_same(lambda: host(call, Returning), action)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_context_object_with_random_streams_and_a_module(action):
    class Context:
        def __init__(self, rngs, norm):
            self.rngs, self.norm, self.itself = rngs, norm, self

    class Contextual(Layer):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x, context):
            assert context.itself is context
            return self.drop(jnp.tanh(context.norm(self.proj(x))), rngs=context.rngs)

    def make():
        def call(model, x):
            context = Context(model.rngs, model.norm)
            for layer in model.layers:
                x = layer(x, context)
            return x

        model = host(call, Contextual)
        model.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        return model

    assert_same(make, action)


@pytest.mark.parametrize("action", ACTIONS[:2])
def test_a_counter_in_a_config_counts_in_every_equal_block(action):
    class Config:
        def __init__(self):
            self.calls = 0

    class Counting(Layer):
        def __call__(self, x):
            self.extra.calls += 1
            return jnp.tanh(self.proj(x)) * self.extra.calls

    def run(model):
        gradients(loss, model, X)
        return [layer.extra.calls for layer in model.layers]

    def make():
        def call(model, x):
            for layer in model.layers:
                x = layer(x)
            return x

        return host(call, Counting, each=[Config() for _ in range(3)])

    assert run(make()) == run(rt.apply(make(), {"layers.*": action})) == [1, 1, 1]


def test_explaining_a_model_leaves_its_plain_objects_unchanged():
    class Recording(Layer):
        def __call__(self, x):
            self.extra.outputs.append(x)
            self.extra.calls += 1
            return jnp.tanh(self.proj(x))

    def call(model, x):
        for layer in model.layers:
            x = layer(x)
        return x

    model = host(call, Recording, each=[types.SimpleNamespace(outputs=[], calls=0) for _ in range(3)])
    str(rt.explain(model, {"layers.*": "nothing_saveable"}, names=True, args=(X,)))
    assert [(layer.extra.outputs, layer.extra.calls) for layer in model.layers] == [([], 0)] * 3


def sequential(model, x):
    for layer in model.layers:
        x = layer(x)
    return x


def test_what_changes_on_a_class_between_two_traces_is_seen(monkeypatch):
    plain, ruled = host(sequential), rt.apply(host(sequential), {"layers.*": "nothing_saveable"})
    before, _ = gradients(loss, ruled, X)
    monkeypatch.setattr(Layer, "scale", 3.0)
    assert float(gradients(loss, ruled, X)[0]) != float(before)
    assert_same_values(gradients(loss, ruled, X), gradients(loss, plain, X))
    call = nnx.Linear.__call__
    monkeypatch.setattr(nnx.Linear, "__call__", lambda self, x: call(self, x) * 5)
    assert_same_values(gradients(loss, ruled, X), gradients(loss, plain, X))


def test_a_global_that_changes_between_two_traces_is_seen(monkeypatch):
    class Global(Layer):
        def __call__(self, x):
            return super().__call__(x) * FACTOR

    plain, ruled = host(sequential, Global), rt.apply(host(sequential, Global), {"layers.*": "nothing_saveable"})
    gradients(loss, ruled, X)
    monkeypatch.setitem(globals(), "FACTOR", 7.0)
    assert_same_values(gradients(loss, ruled, X), gradients(loss, plain, X))


FACTOR = 1.0


def test_an_object_with_a_finalizer_is_not_copied():
    ended = []

    class Handle:
        def __init__(self):
            self.scale = jnp.ones(())

        def __del__(self):
            ended.append(1)

    class Using(Layer):
        def __call__(self, x):
            return super().__call__(x) * self.extra.scale

    handles = [Handle() for _ in range(3)]
    plain, ruled = (host(sequential, Using, each=handles) for _ in range(2))
    assert_same_values(gradients(loss, rt.apply(ruled, {"layers.*": "nothing_saveable"}), X), gradients(loss, plain, X))
    assert not ended
    np.testing.assert_equal(len(handles), 3)

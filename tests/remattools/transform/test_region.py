# SPDX-License-Identifier: Apache-2.0
"""Every way to call a region gives what the plain call gives."""

import enum
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.exactness import assert_exact, assert_same_values
from tests.remattools.models import inputs
from tests.remattools.transform.hosts import Host, Layer, check_exact, loss


class Mode(enum.Enum):
    SIN = 1
    COS = 2


class Pair(NamedTuple):
    hidden: jax.Array
    note: str


@flax.struct.dataclass
class Cache:
    keys: jax.Array
    index: int = flax.struct.field(pytree_node=False, default=0)


class Static(Layer):
    def __call__(self, x, flag=False, *, mode=Mode.SIN, name="a", scale=None, act=jnp.tanh, times=1, **extra):
        assert isinstance(flag, bool)
        assert isinstance(times, int)
        y = self.proj(x)
        if flag:
            y = act(y)
        if mode is Mode.COS and name == "b":
            y = jnp.cos(y)
        if scale is not None:
            y = y * scale
        for _ in range(times):
            y = jnp.sin(y)
        return y * extra.get("gain", 1.0)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((), {}, id="defaults"),
        pytest.param((True,), {}, id="bool"),
        pytest.param((), {"flag": True}, id="bool-by-keyword"),
        pytest.param((), {"mode": Mode.COS, "name": "b"}, id="enum-and-string"),
        pytest.param((), {"scale": None}, id="none"),
        pytest.param((), {"scale": 0.5}, id="float"),
        pytest.param((), {"times": 3}, id="int"),
        pytest.param((True,), {"act": jax.nn.relu}, id="callable"),
        pytest.param((True,), {"act": lambda y: jnp.sin(2 * y)}, id="lambda"),
        pytest.param((True,), {"act": functools.partial(jnp.clip, min=-1)}, id="partial"),
        pytest.param((), {"gain": 2.0, "unused": [1, {"a": (2,)}]}, id="variadic"),
    ],
)
def test_static_arguments_stay_python(args, kwargs):
    check_exact(Static, lambda m, x: m.layers[1](m.layers[0](x, *args, **kwargs)))


def test_positional_variadic_arguments():
    class Sum(Layer):
        def __call__(self, *xs):
            return self.proj(sum(xs))

    check_exact(Sum, lambda m, x: m.layers[1](m.layers[0](x, x, 2 * x), x))


class Outputs(Layer):
    def __call__(self, x, kind):
        y = jnp.sin(self.proj(x))
        outs = {
            "tuple": (y, {"h": 2 * y}, None, "text", 3, jnp.tanh),
            "named": Pair(y, "note"),
            "dict": {"b": y, "a": [y, None]},
            "struct": Cache(y, 4),
            "none": None,
            "module": nnx.Linear(8, 8, rngs=nnx.Rngs(3)),
        }
        return outs[kind]


@pytest.mark.parametrize("kind", ["tuple", "named", "dict", "struct", "none"])
def test_outputs_of_any_kind(kind):
    seen = []

    def use(m, x):
        out = m.layers[0](x, kind)
        seen.append(jax.tree.map(lambda leaf: leaf if not hasattr(leaf, "dtype") else leaf.shape, out))
        return (out, m.layers[1](x, "tuple")[0])

    check_exact(Outputs, use)
    assert all(str(other) == str(seen[0]) for other in seen)


def test_outputs_keep_their_types():
    kinds = []

    def use(m, x):
        y, d, none, text, number, function = m.layers[0](x, "tuple")
        kinds.append((type(d), none, text, type(number), function))
        assert m.layers[1](x, "struct").index == 4
        assert isinstance(m.layers[1](x, "named"), Pair)
        assert isinstance(m.layers[1](x, "module"), nnx.Linear)
        return y

    check_exact(Outputs, use)
    assert set(kinds) == {(dict, None, "text", int, jnp.tanh)}


def test_dict_caches_are_updated_in_place():
    class Cached(Layer):
        def __call__(self, x, cache, step):
            cache["k"] = cache["k"] * 0.5 + self.proj(x)
            cache["count"] = cache.get("count", 0) + step
            cache.setdefault("new", []).append(x)
            return jnp.sin(cache["k"])

    counts = []

    def use(m, x):
        caches = [{"k": x}, {"k": 2 * x}]
        for layer, cache in zip(m.layers, caches, strict=True):
            x = layer(x, cache, 1)
        counts.append([(cache["count"], list(cache), len(cache["new"])) for cache in caches])
        return x, [cache["k"] for cache in caches]

    check_exact(Cached, use)
    assert all(count == [(1, ["k", "count", "new"], 1)] * 2 for count in counts)


def test_a_returned_argument_is_the_callers_object():
    class Passing(Layer):
        def __call__(self, x, cache, extra):
            cache["x"] = self.proj(x)
            return jnp.sin(cache["x"]), cache, extra, self

    def use(m, x):
        cache, extra = {}, nnx.Dict(a=nnx.Param(jnp.ones(3)))
        y, same, also, me = m.layers[0](x, cache, extra)
        assert same is cache
        assert also is extra
        assert me is m.layers[0]
        return m.layers[1](y, cache, extra)[0]

    check_exact(Passing, use)


def test_nnx_objects_as_arguments_are_updated():
    class WithRngs(Layer):
        def __call__(self, x, rngs, cache):
            cache.value_[...] = cache.value_[...] + 1
            return self.proj(x) * jax.random.bernoulli(rngs.dropout(), 0.5, x.shape)

    class Holder(nnx.Module):
        def __init__(self):
            self.value_ = nnx.Variable(jnp.zeros(3))

    def use(m, x):
        rngs, cache = nnx.Rngs(dropout=5), Holder()
        for layer in m.layers:
            x = layer(x, rngs, cache=cache)
        return x, cache.value_[...], rngs.dropout.count[...]

    check_exact(WithRngs, use)


def test_blocks_without_call():
    class Coder(Layer):
        def encode(self, x):
            return jnp.sin(self.proj(x))

        def decode(self, x):
            return jnp.cos(self.encode(x))

    check_exact(Coder, lambda m, x: m.layers[1].decode(m.layers[0].encode(x)), methods=("encode", "decode"))


def test_layers_of_one_class_may_differ_in_none():
    class Masked(Layer):
        def __call__(self, x, mask=None):
            y = jnp.sin(self.proj(x))
            return y if mask is None else y * mask

    check_exact(Masked, lambda m, x: m.layers[1](m.layers[0](x, None), jnp.ones(8)))


def test_values_passed_from_block_to_block():
    class Handing(Layer):
        def __call__(self, x, kv=None):
            new = (jnp.sin(self.proj(x)), "kind")
            return x + (new[0] if kv is None else kv[0]), kv or new

    def use(m, x):
        x, kv = m.layers[0](x)
        return m.layers[1](x, kv)[0]

    check_exact(Handing, use)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_batch_norm_dropout_and_sow():
    class Noisy(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            y = self.dropout(self.norm(self.proj(x)))
            self.sow(nnx.Intermediate, "hidden", y)
            return jnp.sin(y)

    check_exact(Noisy, lambda m, x: m.layers[1](m.layers[0](x)))


def test_new_variables_and_modules_made_inside_stay():
    class Growing(Layer):
        def __call__(self, x):
            if not hasattr(self, "seen"):
                self.seen = nnx.Variable(jnp.zeros(()))
                self.extra = nnx.Linear(8, 8, rngs=nnx.Rngs(7))
            self.seen[...] = self.seen[...] + jnp.mean(x)
            return jnp.sin(self.extra(self.proj(x)))

    plain, ruled = (Host(Growing, lambda m, x: m.layers[1](m.layers[0](x))) for _ in range(2))
    rt.apply(ruled, {"layers.*": "nothing_saveable"})
    x = inputs(batch=2)
    step = nnx.jit(lambda m, x: m(x))
    assert_same_values(step(ruled, x), step(plain, x))
    assert_same_values(nnx.to_pure_dict(nnx.state(ruled)), nnx.to_pure_dict(nnx.state(plain)))


def test_static_attributes_that_change_in_a_call():
    class Counting(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.calls = 0
            self.log = []

        def __call__(self, x):
            self.calls += 1
            self.log.append(self.calls)
            return jnp.sin(self.proj(x))

    plain, ruled = (Host(Counting, lambda m, x: m.layers[0](m.layers[0](x))) for _ in range(2))
    rt.apply(ruled, {"layers.*": "nothing_saveable"})
    x = inputs(batch=2)
    for model in (plain, ruled):
        nnx.jit(lambda m, x: loss(m, x))(model, x)
    assert (ruled.layers[0].calls, ruled.layers[0].log) == (plain.layers[0].calls, plain.layers[0].log) == (2, [1, 2])


def test_raw_and_complex_arrays_as_attributes():
    class Rotary(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.phases = jnp.exp(1j * jnp.arange(8.0))

        def __call__(self, x, window):
            size = int(window[0])  # a numpy array stays one, so that it can give a shape
            y = jnp.fft.fft(self.proj(x)) * self.phases
            return jnp.real(y).reshape(size, -1)

    check_exact(Rotary, lambda m, x: (m.layers[0](x, np.array([2, 4])), m.layers[1](2 * x, np.array([4, 2]))))


def test_one_rngs_shared_by_all_blocks():
    class Sharing(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.rngs = rngs

        def __call__(self, x):
            return self.proj(x) * jax.random.bernoulli(self.rngs.params(), 0.5, x.shape)

    check_exact(Sharing, lambda m, x: m.layers[1](m.layers[0](x)))


def test_tied_weights_and_modules_shared_between_parents():
    class Tied(nnx.Module):
        def __init__(self, width, rngs):
            self.proj = nnx.Linear(width, width, rngs=rngs)
            self.again = nnx.Linear(width, width, rngs=rngs)
            self.again.kernel = self.proj.kernel

        def __call__(self, x):
            return jnp.sin(self.again(jnp.sin(self.proj(x))))

    def use(m, x):
        m.layers[1].proj = m.layers[0].proj
        return m.layers[1](m.layers[0](x))

    check_exact(Tied, use)


def test_modules_in_plain_containers():
    class Nested(nnx.Module):
        def __init__(self, width, rngs):
            self.parts = nnx.data(
                {"a": [nnx.Linear(width, width, rngs=rngs)], "b": nnx.Linear(width, width, rngs=rngs)}
            )

        def __call__(self, x):
            return jnp.sin(self.parts["b"](self.parts["a"][0](x)))

    check_exact(Nested, lambda m, x: m.layers[1](m.layers[0](x)))
    check_exact(Nested, lambda m, x: m.layers[1](m.layers[0](x)), pattern="layers.*.parts.a.0")


def test_the_root_may_be_a_region():
    plain, ruled = Host(Static, lambda m, x: m.layers[0](x)), Host(Static, lambda m, x: m.layers[0](x))
    rt.apply(ruled, {".": "nothing_saveable"})
    assert_exact(loss, plain, ruled, inputs(batch=2))


def test_regions_inside_regions():
    check_exact(Static, lambda m, x: m.layers[1](m.layers[0](x)), pattern="{layers.*,layers.*.proj}")


def test_eager_calls_see_concrete_values():
    class Looking(Layer):
        def __call__(self, x):
            return self.proj(x) if float(x.sum()) > 0 else -self.proj(x)

    ruled = rt.apply(Host(Looking, lambda m, x: m.layers[0](x)), {"layers.*": "nothing_saveable"})
    x = inputs(batch=2)
    np.testing.assert_array_equal(ruled(x), Host(Looking, lambda m, x: m.layers[0](x))(x))


def test_properties_and_functions_as_attributes():
    class Curried(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.act = functools.partial(jax.nn.leaky_relu, negative_slope=0.3)
            self.after = lambda y, scale=width: jnp.sin(y) / scale

        @property
        def doubled(self):
            return 2 * self.proj.kernel[...]

        def __call__(self, x):
            return self.after(self.act(self.proj(x) @ self.doubled))

    check_exact(Curried, lambda m, x: m.layers[1](m.layers[0](x)))

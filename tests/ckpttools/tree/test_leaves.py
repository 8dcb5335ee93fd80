# SPDX-License-Identifier: Apache-2.0
"""Leaves: each type comes back as it was, and what cannot be stored is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree import leaves as leaf_forms
from tests.ckpttools.behaviour.examples import leaves

from .round_trips import round_trip


def test_every_kind_of_leaf_comes_back(tmp_path):
    values = {
        "typed_key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "bf16": jnp.arange(3, dtype=jnp.bfloat16),
        "f8": jnp.ones(3, jnp.float8_e4m3fn),
        "i4": jnp.ones(4, jnp.int4),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.5),
        "weak": jnp.asarray(2.5),
        "numpy": np.arange(4.0),
        "numpy_scalar": np.float64(0.1),
        "flag": True,
        "int": 2**70,
        "float": 0.1,
        "nan": float("nan"),
        "complex": 1 + 2j,
        "text": "naïve\n",
        "bytes": b"\x00\xff",
        "none": None,
        "by_int": {0: jnp.ones(2), 10: jnp.zeros(2)},
        "pair": (jnp.ones(1), [jnp.zeros(1)]),
    }
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"misc": values})
    blank = jax.tree.map(lambda x: x, values)
    with ct.open(spec) as ckpt:
        restored = ckpt.restore({"misc": blank}).state["misc"]
    nan, restored_nan = values.pop("nan"), restored.pop("nan")
    assert np.isnan(nan)
    assert np.isnan(restored_nan)
    assert leaves({"misc": restored}) == leaves({"misc": values})
    assert jax.tree.structure(restored) == jax.tree.structure(values)
    assert restored["weak"].weak_type
    assert type(restored["numpy_scalar"]) is np.float64


def test_an_empty_string_comes_back_as_one(tmp_path):
    value = {"empty": "", "none": None, "zero": 0, "no": False, "text": "x"}
    template = dict.fromkeys(value, "before")
    assert round_trip(tmp_path, value, template) == value


@pytest.mark.parametrize("dtype", [">f4", ">i8", "<f4", ">c8"])
def test_an_array_of_any_byte_order_is_restored(tmp_path, dtype):
    value = np.arange(5).astype(dtype)
    restored = round_trip(tmp_path, {"a": value}, {"a": np.zeros_like(value)})["a"]
    np.testing.assert_array_equal(restored, value)


def test_keys_without_elements_are_restored(tmp_path):
    for name in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(0, impl=name), 3)[:0]
        one = jax.random.key(7, impl=name)
        restored = round_trip(tmp_path / name, {"none": keys, "one": one}, {"none": keys, "one": one})
        assert restored["none"].shape == (0,)
        assert restored["none"].dtype == keys.dtype
        assert jax.random.key_data(restored["one"]).tolist() == jax.random.key_data(one).tolist()


def test_an_int_of_any_length_is_restored(tmp_path):
    value = {"large": 10**5000, "negative": -(2**60)}
    assert round_trip(tmp_path, value, {"large": 0, "negative": 0}) == value


def test_a_dtype_that_cannot_be_written_is_refused_by_name(tmp_path):
    for value in (jnp.ones(2, jnp.uint4), np.ones(2, np.longdouble)):
        with pytest.raises(ct.LeafError, match=r"item\.a is an array of dtype"):
            round_trip(tmp_path, {"a": value}, {"a": value})
    empty = np.ones((0, 2), jnp.uint4)
    assert round_trip(tmp_path, {"a": empty}, {"a": empty})["a"].shape == (0, 2)


def test_an_abstract_key_of_unknown_dtype_is_refused():
    with pytest.raises(ct.LeafError, match="unknown dtype"):
        leaf_forms._get_key_implementation(jax.ShapeDtypeStruct((), jnp.float32))


@pytest.mark.parametrize("shape", [(), (4,), (2, 0)], ids=["scalar", "vector", "empty"])
def test_weak_types_come_back_as_saved(tmp_path, shape):
    value = {"weak": jnp.full(shape, 0.1), "strong": jnp.full(shape, 0.1, jnp.float32), "int": jnp.full(shape, 7)}
    # The template says nothing of it: a fresh state is weak where a trained one is strong, and the other way round.
    template = {"weak": value["strong"] * 0, "strong": jnp.full(shape, 1.0), "int": jnp.zeros(shape, int)}
    restored = round_trip(tmp_path, value, template)
    assert {name: leaf.weak_type for name, leaf in restored.items()} == {"weak": True, "strong": False, "int": True}
    assert leaves({"item": restored}) == leaves({"item": value})
    shown = {leaf.name: leaf.weak_type for leaf in ct.show(tmp_path).leaves}
    assert shown == {"item.weak": True, "item.strong": False, "item.int": True}


def test_a_weakly_typed_variable_keeps_a_bfloat16_model_in_bfloat16(tmp_path):
    def build():
        return nnx.Dict(scale=nnx.Variable(jnp.full((4,), 0.1)), x=nnx.Variable(jnp.ones(4, jnp.bfloat16)))

    trained, fresh = build(), build()
    round_trip(tmp_path, trained, fresh)
    assert (fresh.scale[...] * fresh.x[...]).dtype == jnp.bfloat16
    assert jnp.array_equal(fresh.scale[...], trained.scale[...])


def test_weak_types_keep_sharding_and_special_values(tmp_path):
    value = jnp.full((3,), 0.0).at[...].set(jnp.array([jnp.nan, -jnp.inf, -0.0]))
    assert value.weak_type
    template = jax.device_put(jnp.zeros(3), jax.devices()[0])
    restored = round_trip(tmp_path, value, template)
    assert restored.weak_type
    assert restored.committed
    assert restored.sharding == template.sharding
    assert np.array_equal(np.asarray(restored).view(np.uint32), np.asarray(value).view(np.uint32))


def test_a_manifest_without_weak_leaves_has_its_old_bytes(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, {"item": {"w": jnp.zeros(3)}})
    text = (tmp_path / "1" / "ckpttools.manifest").read_text()
    assert not {word for word in ("weak_type", "variable", "exclude") if word in text}


def test_a_cast_gives_a_strong_type(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, {"item": {"w": jnp.full(3, 0.5)}})
    template = {"item": {"w": jnp.zeros(3, jnp.bfloat16)}}
    cast = ct.Cast("item.w", "float32", "bfloat16")
    assert not ct.load(tmp_path, template, surgery=[cast]).state["item"]["w"].weak_type


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.grad(lambda w: f(w).sum())], ids=["jit", "grad"])
def test_saving_inside_a_trace_names_the_leaf(tmp_path, transform):
    with ct.open(ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(1))) as ckpt:

        def update(w):
            ckpt.step(1, {"model": {"layers": [w]}})
            return w * 2

        with pytest.raises(ct.LeafError, match=r"model\.layers\.0 is a tracer.*inside a function that JAX traces"):
            transform(update)(jnp.ones(3))
        assert ckpt.all_steps() == ()
        assert isinstance(ckpt.save(1, {"model": {"layers": [jnp.ones(3)]}}), ct.Started)  # control: outside it works


def test_restoring_inside_a_trace_names_the_leaf(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, {"model": {"w": jnp.ones(3)}})
    with pytest.raises(ct.LeafError, match=r"model\.w is a tracer"):
        jax.jit(lambda w: ct.load(tmp_path, {"model": {"w": w}}).state["model"]["w"])(jnp.zeros(3))

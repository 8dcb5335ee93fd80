# SPDX-License-Identifier: Apache-2.0
"""Leaves: each type comes back as it was, and what cannot be stored is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

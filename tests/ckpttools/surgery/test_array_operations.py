# SPDX-License-Identifier: Apache-2.0
"""Casts lose no value, and blocks are cut out or filled in."""

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.surgery import array_operations, resize
from ckpttools.tree.records import Record
from tests.ckpttools.surgery.plans import leaf, nested, plan


def altered(array, operations, template):
    record = Record(path=("w",), kind="array", shape=array.shape, dtype=array.dtype.name)
    shape = resize.compute_shape("m.w", operations, array.shape, template.shape)
    target = Record(path=("w",), kind="array", shape=shape, dtype=template.dtype.name)
    return array_operations.apply("m.w", operations, record, array, target, template)


ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_pad_and_slice_take_and_place_blocks():
    wide = np.full((5, 2), 9, np.float32)
    assert altered(ROWS, [ct.Pad("w")], wide)[:, 0].tolist() == [0, 2, 4, 9, 9]
    assert altered(ROWS, [ct.Pad("w", fill=-1, start=(1,))], wide)[:, 0].tolist() == [-1, 0, 2, 4, -1]
    assert altered(ROWS, [ct.Slice("w")], np.zeros((2, 2), np.float32)).tolist() == [[0, 1], [2, 3]]
    assert altered(ROWS, [ct.Slice("w", start=(1,))], np.zeros((2, 2), np.float32)).tolist() == [[2, 3], [4, 5]]
    both = [ct.Pad("w", fill=7), ct.Slice("w", start=(0, 1))]
    assert altered(ROWS, both, np.zeros((4, 1), np.float32)).tolist() == [[1], [3], [5], [7]]
    assert altered(ROWS, both, ROWS).tolist() == ROWS.tolist()


def test_a_cast_comes_before_the_fill():
    template = np.full((4, 2), 1.5, jnp.bfloat16)
    made = altered(ROWS, [ct.Pad("w"), ct.Cast("w", "float32", "bfloat16")], template)
    assert (made.dtype, made[3, 0]) == (template.dtype, 1.5)


@pytest.mark.parametrize(
    ("values", "to", "text"),
    [
        pytest.param([1.0, 2.5], "int32", r"2.5 at \[1\] would become 2", id="a fraction"),
        pytest.param([1.0, float("nan")], "int32", "nan", id="nan"),
        pytest.param([1e30], "float16", "would become inf", id="too large"),
        pytest.param(np.array([300], np.int32), "int8", "300", id="too wide"),
        pytest.param(np.array([1, 9], np.int32), "int4", r"9 at \[1\] would become -7", id="four bits"),
        pytest.param(np.array([2**24 + 1], np.int32), "float32", "16777217", id="an int that is rounded"),
        pytest.param(np.array([1 + 1j], np.complex64), "float32", "1j", id="an imaginary part"),
    ],
)
def test_a_cast_that_loses_the_value_is_refused(values, to, text):
    array = values if isinstance(values, np.ndarray) else np.array(values, np.float32)
    with pytest.raises(ct.StructureError, match=text):
        altered(array, [ct.Cast("w", array.dtype.name, to)], np.zeros(array.shape, jnp.dtype(to)))
    whole = np.array([1, 2], array.dtype)
    assert altered(whole, [ct.Cast("w", array.dtype.name, to)], np.zeros(2, jnp.dtype(to))).tolist() == [1, 2]


@pytest.mark.parametrize("operation", [ct.Reinit("m.w"), ct.Pad("m.w")], ids=["reinit", "pad"])
def test_an_abstract_state_has_no_values_to_keep(operation):
    def restore():
        made = plan(nested("m.w"), {"m": {"w": leaf(5)}}, [operation])
        made.make_host_items(["m"], {"m": {("w",): np.zeros(2, np.float32)}})

    with pytest.raises(ct.StructureError, match="abstract") as caught:
        restore()
    assert "initialised model" in caught.value.fix


@pytest.mark.parametrize(
    ("fill", "dtype"),
    [(0.5, "int32"), (float("nan"), "int32"), (2**40, "int32"), (1e39, "float32"), (9, "int4"), (2, "bool")],
)
def test_a_fill_that_the_array_cannot_hold_is_refused(fill, dtype):
    record = Record(path=("w",), kind="array", shape=(2,), dtype=dtype)
    target = Record(path=("w",), kind="array", shape=(3,), dtype=dtype)
    with pytest.raises(ct.StructureError, match=f"{dtype} cannot hold") as caught:
        array_operations.apply("m.w", [ct.Pad("m.w", fill=fill)], record, np.ones(2, jnp.dtype(dtype)), target, None)
    assert 'fill="template"' in caught.value.fix

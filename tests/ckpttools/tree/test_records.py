# SPDX-License-Identifier: Apache-2.0
"""Records and plain values as JSON, and what is refused when a manifest is read."""

import math

import jax
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.tree.records import (
    Record,
    count_host_bytes,
    decode_value,
    encode_value,
    format_form,
    get_host_shape,
    read_inline_array,
)


@pytest.mark.parametrize("value", [None, True, "x", "na\u00efve", 2**70, -3, 0.1, 1 + 2j, b"\x00\xff"], ids=repr)
def test_a_plain_value_survives_encoding(value):
    decoded = decode_value(encode_value("item.x", value))
    assert (type(decoded), decoded) == (type(value), value)


def test_nan_survives_encoding():
    assert math.isnan(decode_value(encode_value("item.x", math.nan)))


@pytest.mark.parametrize("encoded", [{"float": 3}, {"set": []}, {"int": "x"}, {"int": "1", "str": "1"}], ids=repr)
def test_an_invalid_encoded_value_is_refused(encoded):
    with pytest.raises(ct.CorruptStepError):
        decode_value(encoded)


@pytest.mark.parametrize(
    "record",
    [
        Record(path=("w", 0), kind="array", shape=(2, 3), dtype="bfloat16", digest="xxh3:0"),
        Record(path=("key",), kind="key", shape=(), dtype="threefry2x32", digest="xxh3:0"),
        Record(path=("s",), kind="array", shape=(4,), dtype="float32", slices=((((0, 4),), "xxh3:0"),)),
        Record(path=(), kind="value", value=""),
        Record(path=(), kind="value", value=None),
    ],
    ids=["array", "key", "sharded", "empty string", "None"],
)
def test_a_record_survives_json(record):
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    "data",
    [
        {"path": [], "kind": "array", "shape": [2], "dtype": "float32", "digest": 5},
        {"path": [], "kind": "empty", "shape": [2**40], "dtype": "float32"},
        {"path": [], "kind": "array", "shape": [2], "dtype": "object", "digest": "xxh3:0"},
        {"path": [], "kind": "array", "shape": [2], "dtype": "float32", "value": {"bytes": "AAAA"}},
    ],
    ids=["digest", "size", "dtype", "bytes"],
)
def test_a_hostile_record_is_refused(data):
    with pytest.raises(ct.CorruptStepError):
        Record.from_json(data)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_the_host_shape_of_keys_is_that_of_their_data(implementation):
    data = jax.random.key_data(jax.random.split(jax.random.key(0, impl=implementation), 3))
    record = Record(path=(), kind="key", shape=(3,), dtype=implementation)
    assert get_host_shape(record) == (data.shape, data.dtype)
    assert count_host_bytes([record]) == data.nbytes


def test_an_array_in_the_manifest_is_read_from_its_bytes():
    array = np.arange(3, dtype=np.int16)
    record = Record(path=(), kind="array", shape=(3,), dtype="int16", value=encode_value("x", array.tobytes()))
    np.testing.assert_array_equal(read_inline_array(record), array)
    assert read_inline_array(Record(path=(), kind="array", shape=(3,), dtype="int16")) is None
    assert count_host_bytes([record]) == 0, "Orbax stores nothing of it"


def test_a_form_names_dtype_and_shape():
    assert format_form(Record(path=(), kind="array", shape=(2, 3), dtype="float32")) == "float32[2,3]"
    assert format_form(Record(path=(), kind="key", dtype="rbg")) == "key rbg[]"
    assert format_form(Record(path=(), kind="value")) == "a plain value"

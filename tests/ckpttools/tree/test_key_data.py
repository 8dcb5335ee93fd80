# SPDX-License-Identifier: Apache-2.0
"""Shape and dtype of key data, for every implementation that is registered with JAX."""

import jax
import pytest

import ckpttools as ct
from ckpttools.tree.key_data import get_key_data_shape, get_key_dtype


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_shape_and_dtype_are_those_of_real_keys(implementation):
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
    data = jax.random.key_data(keys)
    assert get_key_dtype(implementation) == keys.dtype
    assert get_key_data_shape((3,), implementation) == (data.shape, data.dtype)


def test_an_unregistered_implementation_is_refused():
    with pytest.raises(ct.CorruptStepError, match="unknown key implementation 'other'"):
        get_key_dtype("other")

# SPDX-License-Identifier: Apache-2.0
"""Key data of any PRNG implementation, also of those that users register with JAX.

Apart from `records`, which knows the sizes of JAX's own implementations and imports this file only for others.
"""

import functools
from typing import Any

import jax
import numpy as np

from ..errors import CorruptStepError


@functools.cache
def get_key_dtype(implementation: str) -> Any:
    """The dtype of typed keys of an implementation such as "threefry2x32"."""
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype
    except ValueError as error:
        raise CorruptStepError(what=f"the manifest names an unknown key implementation {implementation!r}.") from error


def get_key_data_shape(shape: tuple[int, ...], implementation: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the data of typed keys.

    Args:
        shape: Shape of the array of keys.
        implementation: Name of their implementation, such as "threefry2x32".

    Raises:
        CorruptStepError: If no such implementation is registered with JAX.
    """
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, get_key_dtype(implementation)))
    return tuple(data.shape), np.dtype(data.dtype)

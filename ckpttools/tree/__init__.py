# SPDX-License-Identifier: Apache-2.0
"""nnx objects and pytrees to named leaves and back. No disk."""

from remattools.lazy_imports import attach

__all__ = ["key_data"]

# `records` needs JAX only for keys of an implementation that is not one of JAX's own.
__getattr__, __dir__ = attach(__name__, __file__)

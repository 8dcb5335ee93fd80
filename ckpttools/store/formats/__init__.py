# SPDX-License-Identifier: Apache-2.0
"""Files that other programs write and read: recognise them, and convert them."""

from remattools.lazy_imports import attach

__all__ = ["flax_msgpack"]

# `show` reads such a file only if it is one, so that flax is imported only then.
__getattr__, __dir__ = attach(__name__, __file__)

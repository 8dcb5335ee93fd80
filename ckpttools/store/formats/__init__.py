# SPDX-License-Identifier: Apache-2.0
"""Recognise and convert files that other programs write and read."""

from remattools.lazy_imports import attach

__all__ = ["flax_msgpack"]

# flax is imported only when a msgpack file is read.
__getattr__, __dir__ = attach(__name__, __file__)

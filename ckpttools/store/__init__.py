# SPDX-License-Identifier: Apache-2.0
"""One run on the disk: its layout, its files, and the only moves that change it."""

from remattools.lazy_imports import attach

__all__ = ["leaf_integrity", "orbax"]

# Tools that read arrays only in some cases reach Orbax through the package, so that it is imported only then.
__getattr__, __dir__ = attach(__name__, __file__)

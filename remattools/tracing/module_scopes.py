# SPDX-License-Identifier: Apache-2.0
"""Module paths in the named scopes of a trace that is compiled and measured.

Sits on `transform.naming`. A compiled program names the traced operation with its scopes on every buffer; nnx opens no
scope of its own. The scopes are metadata: the program that is measured is the program that runs. JAX caches the traces
of jitted functions, so traces with scopes have a context of their own and never serve the user's later calls.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ..rules.paths import Path
from ..transform import region
from ..transform.naming import scopes

# Part of the key of JAX's trace caches.
_WITH_SCOPES = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def add_module_scopes(roots: Iterable[tuple[Path, Any]]) -> Iterator[None]:
    """Open a named scope with its path around each module's call inside the block.

    Args:
        roots: Pairs of a path and the module, or pytree of modules, at it.
    """
    with _WITH_SCOPES(True), region.record_region_scopes(), scopes.record_paths(roots, mark_outputs=False):
        yield

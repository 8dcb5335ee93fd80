# SPDX-License-Identifier: Apache-2.0
"""The only file that touches private JAX: what a policy answers with, a jit's compiler options, which trace is on.

JAX's policies return values of these classes, which have no public name; a policy
that combines or offloads has to recognise and return them. Of the trace that is
on, public JAX tells only whether it is another one, not whether it still lives.
"""

import weakref
from typing import Any

from jax._src import core
from jax._src.ad_checkpoint import name_p
from jax._src.interpreters import partial_eval

# The primitive behind `jax.ad_checkpoint.checkpoint_name`; policies are asked about it like about any other.
NAME_PRIMITIVE: Any = name_p
SAVEABLE: Any = partial_eval.Saveable
RECOMPUTE: Any = partial_eval.Recompute


def make_offloadable(source: str, target: str) -> Any:
    """What a policy returns to move a value from one memory kind to another."""
    return partial_eval.Offloadable(src=source, dst=target)


def parse_offload(decision: Any) -> tuple[str, str] | None:
    """Source and target memory kind, if a policy's answer is to offload."""
    return (decision.src, decision.dst) if isinstance(decision, partial_eval.Offloadable) else None


def get_compiler_options(lowered: Any) -> tuple[Any, ...]:
    """The `compiler_options` of the `jax.jit` behind a lowered program, which its text does not show."""
    inner = getattr(getattr(lowered, "lowered", lowered), "_lowering", None)  # nnx wraps JAX's
    return tuple(getattr(inner, "_compiler_options_kvs", None) or ())


def get_current_trace() -> weakref.ref[Any]:
    """The trace that runs the caller's code: one for each call of `jit`'s, `grad`'s or `vmap`'s function."""
    return weakref.ref(core.trace_ctx.trace)

# SPDX-License-Identifier: Apache-2.0
"""The only file that imports private JAX: what policies return, a jit's compiler options, the current trace.

JAX's policies return values of private classes; a policy that combines or offloads
has to recognise and return them. Public JAX can compare the current trace with
another one, but cannot say whether that one still exists.
"""

import weakref
from typing import Any

from jax._src import core
from jax._src.ad_checkpoint import name_p
from jax._src.interpreters import partial_eval

# The primitive behind `jax.ad_checkpoint.checkpoint_name`; policies decide about it as about any other.
NAME_PRIMITIVE: Any = name_p
SAVEABLE: Any = partial_eval.Saveable
RECOMPUTE: Any = partial_eval.Recompute


def make_offloadable(source: str, target: str) -> Any:
    """Return the answer of a policy that moves a value to another memory kind.

    Args:
        source: Memory kind on the device, such as "device".
        target: Memory kind to move to, such as "pinned_host".
    """
    return partial_eval.Offloadable(src=source, dst=target)


def parse_offload(decision: Any) -> tuple[str, str] | None:
    """Return source and target memory kind if a policy's answer is to offload, else None."""
    return (decision.src, decision.dst) if isinstance(decision, partial_eval.Offloadable) else None


def get_compiler_options(lowered: Any) -> tuple[Any, ...]:
    """Return the `compiler_options` of the `jax.jit` behind a lowered program, which its text does not show."""
    inner = getattr(getattr(lowered, "lowered", lowered), "_lowering", None)  # nnx wraps JAX's object
    return tuple(getattr(inner, "_compiler_options_kvs", None) or ())


def get_current_trace() -> weakref.ref[Any]:
    """Return the trace that runs the caller's code; `jit`, `grad` and `vmap` make a new one for each call."""
    return weakref.ref(core.trace_ctx.trace)

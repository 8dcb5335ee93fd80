# SPDX-License-Identifier: Apache-2.0
"""The only file that imports private JAX: what policies return, what a lowered program is, the current trace.

JAX's policies return values of private classes; a policy that combines or offloads
has to recognise and return them. Public JAX can compare the current trace with
another one, but cannot say whether that one still exists.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import config, core, source_info_util
from jax._src import mesh as mesh_lib
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
    return tuple(getattr(_get_lowering(lowered), "_compiler_options_kvs", None) or ())


@dataclasses.dataclass(frozen=True)
class LoweredArray:
    """One argument or result of a lowered program.

    Attributes:
        shape: Shape of the whole array.
        dtype: Its dtype.
        sharding: How it is divided; None where the compiler decides.
        donated: Whether the program may reuse its memory.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    donated: bool = False


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """What a lowered program takes and returns, and where it runs.

    Attributes:
        devices: The devices that it is lowered for.
        arguments: Its arguments, without those that it does not read.
        results: Its results.
    """

    devices: tuple[Any, ...]
    arguments: tuple[LoweredArray, ...]
    results: tuple[LoweredArray, ...]


def read_lowered(lowered: Any) -> LoweredProgram:
    """Return what a lowered program of `jax.jit` or `nnx.jit` takes and returns; JAX's `out_info` has no shardings."""
    lowering = _get_lowering(lowered)
    options = getattr(lowering, "compile_args", {})
    donated = getattr(lowering, "_donated_invars", ())
    return LoweredProgram(
        devices=tuple(getattr(lowering, "_device_list", None) or ()),
        arguments=_read_arrays(options.get("global_in_avals", ()), options.get("in_shardings", ()), donated),
        results=_read_arrays(options.get("global_out_avals", ()), options.get("out_shardings", ()), ()),
    )


def _read_arrays(avals: Any, shardings: Any, donated: Any) -> tuple[LoweredArray, ...]:
    known = [sharding if hasattr(sharding, "shard_shape") else None for sharding in shardings]
    return tuple(
        LoweredArray(tuple(aval.shape), aval.dtype, sharding, bool(index < len(donated) and donated[index]))
        for index, (aval, sharding) in enumerate(zip(avals, known or [None] * len(avals), strict=True))
    )


def _get_lowering(lowered: Any) -> Any:
    return getattr(getattr(lowered, "lowered", lowered), "_lowering", None)  # nnx wraps JAX's object


def get_axes() -> Any:
    """Return the mesh and the named axes that are bound here, such as inside `shard_map`; for `bind_axes`."""
    return mesh_lib.get_abstract_mesh(), core.get_axis_env(), config._check_vma.value


@contextlib.contextmanager
def bind_axes(axes: Any) -> Iterator[None]:
    """Bind named axes for the duration of a block, so that a program from inside a `shard_map` can be traced again.

    Args:
        axes: From `get_axes`.
    """
    mesh, environment, checks_varying = axes
    with mesh_lib.use_abstract_mesh(mesh), config._check_vma(checks_varying):
        before = core.get_axis_env()
        core.trace_ctx.set_axis_env(environment)
        try:
            yield
        finally:
            core.trace_ctx.set_axis_env(before)


def make_abstract(aval: Any) -> Any:
    """Return an argument for `jax.make_jaxpr`: shape and dtype; inside `shard_map` also along which axes it differs."""
    return aval if core.get_axis_env().axis_sizes else jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def get_current_trace() -> weakref.ref[Any]:
    """Return the trace that runs the caller's code; `jit`, `grad` and `vmap` make a new one for each call."""
    return weakref.ref(core.trace_ctx.trace)


def make_zeros(aval: Any, dtype: Any) -> Any:
    """Return zeros with the shape of an aval, and as it is placed: along explicit axes of a mesh and in `shard_map`."""
    sharding = getattr(aval, "sharding", None)
    is_divided = any(axes is not None for axes in getattr(sharding, "spec", ()))
    zeros = jax.lax.full(aval.shape, 0, dtype, sharding=sharding if is_divided else None)
    kinds = getattr(aval, "mat", None)  # before jax 0.12 the aval itself had the axes
    varying = tuple(getattr(aval, "vma", ()) if kinds is None else kinds.varying)
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


@contextlib.contextmanager
def enter_equation(equation: Any) -> Iterator[None]:
    """Run a block as if it were an equation: its names joined to the current ones, its source lines, its compute type.

    Args:
        equation: An equation of a jaxpr.
    """
    source = equation.source_info
    name_stack = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=name_stack), equation.ctx.manager:
        yield


def bind(equation: Any, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    """Run an equation's primitive under the current trace.

    Args:
        equation: The equation whose primitive, names, source lines and compute type are used.
        operands: Values of its operands, which may differ in shape from those of the equation.
        params: Parameters, in the form of `equation.params`.

    Returns:
        The values of the results, a list also for one result.
    """
    primitive = equation.primitive
    with enter_equation(equation):
        results = primitive.bind(*operands, **primitive.get_bind_params(dict(params)))
    return list(results) if primitive.multiple_results else [results]

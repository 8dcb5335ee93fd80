# SPDX-License-Identifier: Apache-2.0
"""`residuals`: the values saved from the forward to the backward pass, by module path.

Sits on `tracing`. The call is linearised as for a gradient; every value that the backward
pass takes from the forward pass is a residual. Nothing is computed, so abstract models
will do.

These are JAX's residuals, of the traced program, on one device. What the compiler makes of them (fusing, merging,
reordering) is in the report of `measure`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
from jax.extend import core
from rich.table import Table
from rich.text import Text

from ..compiler.partition import WHOLE_ARRAYS, DeviceSizes, find_device_sizes
from ..jaxpr import jaxprs
from ..rules.fold_paths import mask_text, merge_rows
from ..rules.paths import parse_path
from ..text import format_bytes, make_table, render_text
from ..tracing import pure_call
from ..tracing.origins import (
    OriginFinder,
    check_no_gradient,
    is_backward,
    is_in_host_memory,
    select_loss_or_floats,
    trace_with_paths,
)

_MAX_ROWS = 30
ResidualKind = Literal["computed", "parameter", "argument", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """One value saved from the forward to the backward pass, or several equal ones (`count`).

    Attributes:
        path: Path of the module that computes it, or of the parameter or argument that it is.
        name: Primitive, or `@name` for a `checkpoint_name`; "" for parameters and arguments.
        shape: Shape on one device; inside a scan, with the scan's leading axis.
        dtype: Name of the dtype.
        bytes: Size of all `count` values on one device.
        kind: "computed", "parameter", "argument" or "constant".
        reason: Why it is saved.
        host: Whether it is in host memory (offloaded).
        count: Number of equal values in this row.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> (residual,) = rt.residuals(lambda x: jnp.sum(jnp.sin(x)), x).rows
        >>> residual.name, residual.shape, residual.bytes, residual.kind
        ('cos', (8,), 32, 'computed')
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    kind: ResidualKind
    reason: str
    host: bool = False
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ResidualReport:
    """All residuals of one call, per device; `str()` is a table of the largest, with equal layers in one row.

    Attributes:
        rows: One row per value, in the program's order.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> report = rt.residuals(lambda x: jnp.sum(jnp.sin(x) ** 3), x)
        >>> print(report)
        bytes  module  name  shape       saved
         32 B  .       cos   float32[8]  for the gradient of .:mul
         32 B  .       mul   float32[8]  for the gradient of .:mul
        64 B computed and saved; 0 B are arguments
        >>> report.computed_bytes == sum(row.bytes for row in report.rows)
        True
    """

    rows: tuple[Residual, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all residuals, including arguments, which are live anyway."""
        return sum(row.bytes for row in self.rows)

    @property
    def computed_bytes(self) -> int:
        """Bytes of the residuals computed and saved on the device: what remat can change."""
        return sum(row.bytes for row in self.rows if row.kind == "computed" and not row.host)

    @property
    def host_bytes(self) -> int:
        """Bytes of the residuals in host memory."""
        return sum(row.bytes for row in self.rows if row.host)

    def fold(self) -> tuple[Residual, ...]:
        """Return rows with equal layers merged into one (`layers.[0:32].mlp`), largest first."""
        rows = merge_rows(
            self.rows,
            lambda row: (row.name, row.shape, row.dtype, row.kind, row.host, mask_text(row.reason)),
            reason=lambda group: _merge_reasons([row.reason for row in group]),
        )
        return tuple(rows)

    def by_module(self) -> tuple[tuple[str, int], ...]:
        """Return computed bytes on the device by module path, equal layers merged, largest first."""
        totals: dict[str, int] = {}
        for row in self.fold():
            if row.kind == "computed" and not row.host:
                totals[row.path] = totals.get(row.path, 0) + row.bytes
        return tuple(sorted(totals.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "total_bytes": self.total_bytes,
            "computed_bytes": self.computed_bytes,
            "host_bytes": self.host_bytes,
            "rows": [dataclasses.asdict(row) for row in self.fold()],
        }

    def __repr__(self) -> str:
        return f"ResidualReport({len(self.rows)} rows, total_bytes={self.total_bytes})"

    def __str__(self) -> str:
        return render_text(self.__rich__())

    def __rich__(self) -> Table:
        shown = [row for row in self.fold() if row.kind == "computed"]
        others = self.total_bytes - self.computed_bytes - self.host_bytes
        caption = f"{format_bytes(self.computed_bytes)} computed and saved; {format_bytes(others)} are arguments"
        if self.host_bytes:
            caption += f"; {format_bytes(self.host_bytes)} in host memory"
        rows = []
        for row in shown[:_MAX_ROWS]:
            times = f" x{row.count}" if row.count > 1 else ""
            shape = f"{row.dtype}[{','.join(map(str, row.shape))}]{times}"
            rows.append((format_bytes(row.bytes), row.path, row.name, shape, row.reason))
        if len(shown) > _MAX_ROWS:
            rest = sum(row.bytes for row in shown[_MAX_ROWS:])
            rows.append((format_bytes(rest), f"{len(shown) - _MAX_ROWS} smaller rows", "", "", ""))
        table = make_table(("bytes", "module", "name", "shape", "saved"), rows, numeric=("bytes",))
        table.caption = Text(caption)
        return table


def residuals(fn: Callable[..., Any], *args: Any) -> ResidualReport:
    """Return every value saved from the forward to the backward pass of `fn(*args)`.

    Args:
        fn: A loss, not yet a gradient: a function of models and arrays that returns a scalar, a tuple whose first
            item is one, or float arrays. It may close over the model.
        *args: Its arguments, real or abstract.

    Returns:
        One row per value, by module path. The totals equal those of the linearised program, on one device: arguments
        on a mesh with Auto axes are compiled for it, since only the compiler knows how it splits values.

    Raises:
        MeasureError: If there is nothing to differentiate, or `fn` takes the gradient itself.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> rt.residuals(lambda x: jnp.sum(jnp.sin(x)), x).total_bytes  # the cosine
        32
    """
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    pure_call.check_differentiable(call)
    program = linearize_call(call)
    return make_report(call, *program, find_device_sizes(call, differentiate=True))


def make_report(
    call: pure_call.Call, jaxpr: Any, num_residuals: int, sizes: DeviceSizes = WHOLE_ARRAYS
) -> ResidualReport:
    """Return the report on a program from `linearize_call`.

    Args:
        call: The call it was made from.
        jaxpr: The program; its first results are the residuals.
        num_residuals: How many of its results are residuals.
        sizes: Sizes on one device.
    """
    origins = OriginFinder(jaxpr, call)
    saved = list(dict.fromkeys(v for v in origins.jaxpr.outvars[:num_residuals] if isinstance(v, core.Var)))
    consumers = _find_consumers(origins.jaxpr, saved)
    return ResidualReport(rows=tuple(_make_row(var, origins, consumers.get(var), sizes) for var in saved))


def linearize_call(call: pure_call.Call) -> tuple[Any, int]:
    """Return the gradient's program with the residuals as its first results, and their number.

    Raises:
        MeasureError: If the call takes a gradient itself, or returns nothing to differentiate.
    """
    program = trace_with_paths(call, select_loss_or_floats)
    check_no_gradient(program, "residuals are what a loss saves for its backward pass, and a train step has none.")
    indices = call.differentiable_indices
    counts: list[int] = []

    def compute_gradients(leaves: list[Any]) -> Any:
        def run_forward(chosen: list[Any]) -> list[Any]:
            return jaxprs.run(program, pure_call.replace_leaves(leaves, indices, chosen))

        out, backward = jax.vjp(run_forward, [leaves[i] for i in indices])
        saved = jax.tree.leaves(backward)
        counts.append(len(saved))
        return saved, backward([jax.numpy.ones_like(value) for value in out])

    return jax.make_jaxpr(compute_gradients)(call.abstractify_leaves()), counts[0]


def _find_consumers(jaxpr: Any, saved: Sequence[Any]) -> dict[Any, Any]:
    """Return for each residual the first equation of the backward pass that reads it."""
    saved_vars, consumers = set(saved), dict[Any, Any]()
    for equation in jaxpr.eqns:
        if not is_backward(equation):
            continue
        for atom in equation.invars:
            if isinstance(atom, core.Var) and atom in saved_vars:
                consumers.setdefault(atom, equation)
    return consumers


def _make_row(var: Any, origins: OriginFinder, consumer: Any, sizes: DeviceSizes) -> Residual:
    origin = origins.find_origin(var)
    path = parse_path(origin.path) if origin.kind == "computed" else None
    leaf = origins.leaves.get(var) if sizes.leaf_bytes else None
    if is_in_host_memory(var.aval) and origin.kind == "computed":
        reason = "offloaded to host memory"
    elif origin.kind != "computed":
        reason = {"parameter": "is a parameter", "argument": "is an argument"}.get(origin.kind, "is a constant")
    elif origin.region is not None:
        reason = f"by the policy of region {origin.region}"
    elif consumer is None:
        reason = "for the backward pass, which does not read it"
    else:
        reason = f"for the gradient of {origins.format_location(consumer)}"
    if origin.iterations > 1:
        reason += f", in each of {origin.iterations} iterations"
    return Residual(
        path=origin.path,
        name=origin.name,
        shape=sizes.find_shape(var.aval, path, origin.name) if leaf is None else sizes.leaf_shapes[leaf],
        dtype=str(var.aval.dtype),
        bytes=sizes.count_any_bytes(var.aval, path, origin.name) if leaf is None else sizes.leaf_bytes[leaf],
        kind=cast(ResidualKind, origin.kind),
        reason=reason,
        host=is_in_host_memory(var.aval),
    )


def _merge_reasons(reasons: list[str]) -> str:
    """Return one reason for all, with the indices in which they differ replaced by `*`."""
    distinct = list(dict.fromkeys(reasons))
    return distinct[0] if len(distinct) == 1 else mask_text(distinct[0], "*")

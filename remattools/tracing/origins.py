# SPDX-License-Identifier: Apache-2.0
"""Where the values of a traced program come from: module path, operation and region.

Sits on `pure_call` and `transform.naming`. A program is traced with module paths in the operations' name stacks, also
inside regions. The marks that `scopes` puts on outputs are removed again, so that only metadata differs from the
user's program. Name stacks survive differentiation, so values of the backward pass have the same paths.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from ..errors import MeasureError
from ..jaxpr import jaxprs
from ..rules.paths import Path, format_path
from ..rules.policy_types import DROPOUT_MASK
from ..transform.naming import marking, names, scopes
from . import pure_call

# Skipped in the search for a producer: these move, round or mark a value and compute nothing.
_TRANSPARENT_PRIMITIVES = frozenset({"reduce_precision", "optimization_barrier", "copy", "copy_p", "device_put"})
_ROOT_MARKS = re.compile(f"({scopes.REGION}|{scopes.RELATIVE})")
_REGION_MARKS = frozenset({names.SAVED, names.OFFLOADED, DROPOUT_MASK})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value of a program comes from.

    Attributes:
        kind: "computed", "parameter", "argument" or "constant".
        path: Path of the module that computes it, or of the leaf.
        name: Primitive, or `@name` for a `checkpoint_name` in the model; "" for parameters and arguments.
        region: Path of the innermost region around it, or None.
        iterations: Product of the lengths of the scans around it; every iteration saves one value.
    """

    kind: str
    path: str
    name: str = ""
    region: str | None = None
    iterations: int = 1


def trace_with_paths(call: pure_call.Call, select: Callable[[Any], Any]) -> Any:
    """Trace a call with module paths on its operations.

    Args:
        call: From `pure_call.stage`.
        select: Maps what `pure_call.evaluate` returns to what the program returns.

    Returns:
        The closed jaxpr.
    """

    def run_selected(leaves: list[Any]) -> Any:
        return select(pure_call.evaluate(call, leaves, with_paths=True))

    return marking.mark_equations(jax.make_jaxpr(run_selected)(call.abstractify_leaves()), {})


def select_loss_or_floats(result: tuple[Any, list[Any]]) -> list[Any]:
    """Select what to differentiate: the result or first result if it is a scalar, or else all floats returned.

    Args:
        result: From `pure_call.evaluate`.

    Raises:
        MeasureError: If the function returns no floats.
    """
    out, _ = result
    first = out[0] if isinstance(out, tuple) and out else out
    if getattr(first, "shape", None) == ():
        return [pure_call.split_loss(result)[0]]
    floats = [leaf for leaf in pure_call.collect_arrays(out) if pure_call.is_float(leaf)]
    return floats or [pure_call.split_loss(result)[0]]


def has_gradient(jaxpr: Any) -> bool:
    """Whether a program contains operations of a backward pass."""
    return any(
        "transpose(" in str(equation.source_info.name_stack)
        or any(has_gradient(inner) for _, inner in jaxprs.find_subjaxprs(equation))
        for equation in jaxprs.open_jaxpr(jaxpr).eqns
    )


def check_no_gradient(jaxpr: Any, purpose: str) -> None:
    """Raise if a train step or a gradient function was passed instead of a loss.

    A loss may use a gradient (a gradient penalty, forces from an energy); then its result depends on that gradient.

    Args:
        jaxpr: Program that returns what `select_loss_or_floats` selects.
        purpose: The error's reason why a loss is needed.

    Raises:
        MeasureError: If the function computes a gradient that its loss does not depend on.
    """
    top = jaxprs.open_jaxpr(jaxpr)
    if has_gradient(top) and not (_is_loss(top) and _is_from_gradient(top, set(range(len(top.outvars))))):
        raise MeasureError(
            what="the function computes a gradient itself.",
            why=purpose,
            fix="pass the loss function and its arguments, (loss, model, batch), instead of the train step.",
        )


def is_backward(equation: Any) -> bool:
    """Whether an operation belongs to the backward pass of the outermost gradient."""
    stack = str(equation.source_info.name_stack)
    before, found, _ = stack.partition("transpose(")
    return bool(found) and "jvp(" not in before  # else to a gradient inside the differentiated function


def _is_loss(jaxpr: Any) -> bool:
    return [var.aval.shape for var in jaxpr.outvars] == [()]


def _is_from_gradient(jaxpr: Any, indices: set[int]) -> bool:
    """Whether the results at `indices` depend on a value that a backward pass computes."""
    inner = jaxprs.open_jaxpr(jaxpr)
    live = {inner.outvars[index] for index in indices if isinstance(inner.outvars[index], core.Var)}
    for equation in reversed(inner.eqns):
        used = {index for index, var in enumerate(equation.outvars) if var in live}
        if not used:
            continue
        if "transpose(" in str(equation.source_info.name_stack):
            return True
        for _, nested in jaxprs.find_subjaxprs(equation):
            results = len(jaxprs.open_jaxpr(nested).outvars)
            exact = results == len(equation.outvars) and equation.primitive.name not in ("scan", "while")
            if _is_from_gradient(nested, used if exact else set(range(results))):
                return True
        live.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return False


class OriginFinder:
    """Finds where the values of one program come from.

    Args:
        jaxpr: The closed jaxpr.
        call: The call it was traced from.
    """

    def __init__(self, jaxpr: Any, call: pure_call.Call) -> None:
        self.call = call
        self.jaxpr = jaxprs.open_jaxpr(jaxpr)
        self.leaves = {var: index for index, var in enumerate(self.jaxpr.invars)}
        self.producers: dict[int, dict[Any, tuple[Any, int]]] = {}

    def find_origin(self, atom: Any) -> Origin:
        """Return the origin of a value of the outermost program."""
        return self._find_origin(self.jaxpr, atom, [], 1)

    def format_location(self, equation: Any) -> str:
        """Format an equation of the outermost program as `path:primitive`."""
        path, _ = locate([str(equation.source_info.name_stack)])
        return f"{format_path(path)}:{equation.primitive.name}"

    def _find_origin(self, jaxpr: Any, atom: Any, stacks: list[str], iterations: int) -> Origin:
        if not isinstance(atom, core.Var):
            return Origin(kind="constant", path=".", name="literal")
        found = self._find_producer(jaxpr, atom)
        if found is None:
            return self._find_input_origin(atom)
        equation, index = found
        if _is_transparent(equation):
            return self._find_origin(jaxpr, equation.invars[index], stacks, iterations)
        stacks = [*stacks, str(equation.source_info.name_stack)]
        inner = self._find_nested_origin(jaxpr, equation, index, stacks, iterations)
        if inner is not None:
            return inner
        name = jaxprs.get_checkpoint_name(equation)
        path, region = locate(stacks)
        return Origin(
            kind="computed",
            path=format_path(path),
            name=_get_label(equation) if name is None else f"@{name}",
            region=None if region is None else format_path(region),
            iterations=iterations,
        )

    def _find_input_origin(self, var: Any) -> Origin:
        index = self.leaves.get(var)
        if index is None:
            return Origin(kind="constant", path=".", name="constant")
        info = self.call.leaf_infos[index]
        return Origin(kind="parameter" if info.parameter else "argument", path=info.label)

    def _find_nested_origin(
        self, jaxpr: Any, equation: Any, index: int, stacks: list[str], iterations: int
    ) -> Origin | None:
        """The origin in a nested program, if the equation only returns what that program computes."""
        nested = list(jaxprs.find_subjaxprs(equation))
        if not nested:
            return None
        inner = jaxprs.open_jaxpr(nested[0][1])
        if len(inner.outvars) != len(equation.outvars):
            return None
        scan = jaxprs.parse_scan(equation)
        if scan is not None and index >= scan.num_carry:
            iterations *= scan.length
        result = self._skip_transparent(inner, inner.outvars[index])
        if isinstance(result, core.Var) and result in inner.invars:
            position = list(inner.invars).index(result)
            if len(inner.invars) == len(equation.invars):
                if scan is not None and position >= scan.num_consts:
                    return None  # a stacked carry or slice is a new value
                return self._find_origin(jaxpr, equation.invars[position], stacks[:-1], iterations)
            return None
        return self._find_origin(inner, result, stacks, iterations)

    def _skip_transparent(self, jaxpr: Any, atom: Any) -> Any:
        """Return what a value is moved, rounded or marked from."""
        found = self._find_producer(jaxpr, atom) if isinstance(atom, core.Var) else None
        if found is None or not _is_transparent(found[0]):
            return atom
        return self._skip_transparent(jaxpr, found[0].invars[found[1]])

    def _find_producer(self, jaxpr: Any, var: Any) -> tuple[Any, int] | None:
        table = self.producers.get(id(jaxpr))
        if table is None:
            table = {out: (equation, index) for equation in jaxpr.eqns for index, out in enumerate(equation.outvars)}
            self.producers[id(jaxpr)] = table
        return table.get(var)


def _is_transparent(equation: Any) -> bool:
    return equation.primitive.name in _TRANSPARENT_PRIMITIVES or jaxprs.get_checkpoint_name(equation) in _REGION_MARKS


def is_in_host_memory(aval: Any) -> bool:
    """Whether a value lies in host memory, since it was offloaded."""
    return str(getattr(aval, "memory_space", "")).endswith("Host")


def _get_label(equation: Any) -> str:
    # What a scan itself computes is the carry of each iteration.
    return "scan carry" if equation.primitive.name == "scan" else str(equation.primitive.name)


def locate(stacks: list[str]) -> tuple[Path, Path | None]:
    """Return module path and innermost region (or None) of an operation.

    Args:
        stacks: The name stacks around it, outermost first.
    """
    path: Path = ()
    region: Path | None = None
    *outer, last = _ROOT_MARKS.split("/".join(stacks))
    for part, mark in zip(outer[::2], outer[1::2], strict=True):
        path = (*path, *(scopes.find_path(part) or ()))
        region = path if mark == scopes.REGION else region
    return (*path, *(scopes.find_path(last) or ())), region

# SPDX-License-Identifier: Apache-2.0
"""Traced programs with module paths: what computes a value, and where.

Sits on `staging` and `transform.names`. A program is traced with the modules' paths in
the operations' name stacks, inside regions too; the marks that `scopes` puts onto
outputs are taken out again, so that nothing but metadata differs from the user's
program. Name stacks survive differentiation, so values of the backward pass are
known by the same paths.
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
from ..transform.naming import names, scopes
from . import pure_call

# Looked through: they move, round or mark a value, and are not what computes it.
_TRANSPARENT = frozenset({"reduce_precision", "optimization_barrier", "copy", "copy_p", "device_put"})
_BEGINNINGS = re.compile(f"({scopes.REGION}|{scopes.RELATIVE})")
_MARKS = frozenset({names.SAVED, names.OFFLOADED})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value of a program comes from.

    Attributes:
        kind: "computed", "parameter", "argument" or "constant".
        path: Module that computes it, or the leaf's own path.
        name: Primitive, or `@name` where the model's author named it; "" for arguments.
        region: Path of the innermost region it lies in, or None.
        turns: Turns of the scans around it; each keeps one.
    """

    kind: str
    path: str
    name: str = ""
    region: str | None = None
    turns: int = 1


def named_program(call: pure_call.Call, select: Callable[[Any], Any]) -> Any:
    """The program of a call with module paths.

    Args:
        call: From `staging.stage`.
        select: From what `staging.evaluate` gives to what the program is to return.
    """

    def traced(leaves: list[Any]) -> Any:
        return select(pure_call.evaluate(call, leaves, named=True))

    return names.marked(jax.make_jaxpr(traced)(call.abstract_leaves()), {})


def loss_or_floats(evaluated: tuple[Any, list[Any]]) -> list[Any]:
    """What a gradient is taken of: the scalar that comes first, or all floats that the function returns.

    Raises:
        MeasureError: If it returns no floats.
    """
    out, _ = evaluated
    first = out[0] if isinstance(out, tuple) and out else out
    if getattr(first, "shape", None) == ():
        return [pure_call.loss_of(evaluated)[0]]
    floats = [leaf for leaf in pure_call.arrays_of(out) if pure_call.is_float(leaf)]
    return floats or [pure_call.loss_of(evaluated)[0]]


def takes_gradient(program: Any) -> bool:
    """Whether a program holds operations of a backward pass."""
    return any(
        "transpose(" in str(equation.source_info.name_stack)
        or any(takes_gradient(inner) for _, inner in jaxprs.nested(equation))
        for equation in jaxprs.open_program(program).eqns
    )


def check_no_step(program: Any, purpose: str) -> None:
    """Refuse a train step or a gradient's function in the place of a loss.

    A loss may well use a gradient (a penalty on it, forces from an energy): then its result comes from one.

    Args:
        program: Of what `loss_or_floats` selects.
        purpose: Why a loss is wanted.

    Raises:
        MeasureError: If the function takes a gradient that is not a part of its loss.
    """
    top = jaxprs.open_program(program)
    if takes_gradient(top) and not (_is_loss(top) and _comes_from_gradient(top, set(range(len(top.outvars))))):
        raise MeasureError(
            what="the function takes a gradient itself.",
            why=purpose,
            fix="pass the loss and its arguments, (loss, model, batch), rather than the train step.",
        )


def is_backward(equation: Any) -> bool:
    """Whether an operation belongs to the outermost gradient's way back."""
    stack = str(equation.source_info.name_stack)
    before, found, _ = stack.partition("transpose(")
    return bool(found) and "jvp(" not in before  # else a gradient inside of what is differentiated


def _is_loss(program: Any) -> bool:
    return [var.aval.shape for var in program.outvars] == [()]


def _comes_from_gradient(program: Any, wanted: set[int]) -> bool:
    """Whether the wanted results of a program are computed from what a backward pass computes."""
    inner = jaxprs.open_program(program)
    live = {inner.outvars[index] for index in wanted if isinstance(inner.outvars[index], core.Var)}
    for equation in reversed(inner.eqns):
        used = {index for index, var in enumerate(equation.outvars) if var in live}
        if not used:
            continue
        if "transpose(" in str(equation.source_info.name_stack):
            return True
        for _, nested in jaxprs.nested(equation):
            results = len(jaxprs.open_program(nested).outvars)
            exact = results == len(equation.outvars) and equation.primitive.name not in ("scan", "while")
            if _comes_from_gradient(nested, used if exact else set(range(results))):
                return True
        live.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return False


class Origins:
    """Finds where the values of one program come from.

    Args:
        program: A closed program.
        call: The call it was traced from.
    """

    def __init__(self, program: Any, call: pure_call.Call) -> None:
        self.call = call
        self.top = jaxprs.open_program(program)
        self.leaves = {var: index for index, var in enumerate(self.top.invars)}
        self.producers: dict[int, dict[Any, tuple[Any, int]]] = {}

    def of(self, atom: Any) -> Origin:
        """The origin of a value of the outermost program."""
        return self._of(self.top, atom, [], 1)

    def where(self, equation: Any) -> str:
        """Module and primitive of an equation of the outermost program, as `path:primitive`."""
        path, _ = located([str(equation.source_info.name_stack)])
        return f"{format_path(path)}:{equation.primitive.name}"

    def _of(self, program: Any, atom: Any, stacks: list[str], turns: int) -> Origin:
        if not isinstance(atom, core.Var):
            return Origin(kind="constant", path=".", name="literal")
        found = self._producer(program, atom)
        if found is None:
            return self._input(atom)
        equation, index = found
        if equation.primitive.name in _TRANSPARENT or jaxprs.name_of(equation) in _MARKS:
            return self._of(program, equation.invars[index], stacks, turns)
        stacks = [*stacks, str(equation.source_info.name_stack)]
        inner = self._inside(program, equation, index, stacks, turns)
        if inner is not None:
            return inner
        name = jaxprs.name_of(equation)
        path, region = located(stacks)
        return Origin(
            kind="computed",
            path=format_path(path),
            name=_label(equation) if name is None else f"@{name}",
            region=None if region is None else format_path(region),
            turns=turns,
        )

    def _input(self, var: Any) -> Origin:
        index = self.leaves.get(var)
        if index is None:
            return Origin(kind="constant", path=".", name="constant")
        info = self.call.infos[index]
        return Origin(kind="parameter" if info.parameter else "argument", path=info.text)

    def _inside(self, program: Any, equation: Any, index: int, stacks: list[str], turns: int) -> Origin | None:
        """The origin in a nested program, if the equation only passes on what one computes."""
        nested = list(jaxprs.nested(equation))
        if not nested:
            return None
        inner = jaxprs.open_program(nested[0][1])
        if len(inner.outvars) != len(equation.outvars):
            return None
        scan = jaxprs.scan_of(equation)
        if scan is not None and index >= scan.carry:
            turns *= scan.length
        result = inner.outvars[index]
        if isinstance(result, core.Var) and result in inner.invars:
            position = list(inner.invars).index(result)
            if len(inner.invars) == len(equation.invars):
                if scan is not None and position >= scan.consts:
                    return None  # a carry or a slice, stacked: a value of its own
                return self._of(program, equation.invars[position], stacks[:-1], turns)
            return None
        return self._of(inner, result, stacks, turns)

    def _producer(self, program: Any, var: Any) -> tuple[Any, int] | None:
        table = self.producers.get(id(program))
        if table is None:
            table = {out: (equation, index) for equation in program.eqns for index, out in enumerate(equation.outvars)}
            self.producers[id(program)] = table
        return table.get(var)


def in_host_memory(aval: Any) -> bool:
    """Whether a value lies in host memory: it was offloaded."""
    return str(getattr(aval, "memory_space", "")).endswith("Host")


def _label(equation: Any) -> str:
    # What a scan computes itself is the carry of each turn.
    return "scan carry" if equation.primitive.name == "scan" else str(equation.primitive.name)


def located(stacks: list[str]) -> tuple[Path, Path | None]:
    """Module path and innermost region of an operation, from the name stacks around it, outermost first."""
    path: Path = ()
    region: Path | None = None
    *outer, last = _BEGINNINGS.split("/".join(stacks))
    for part, mark in zip(outer[::2], outer[1::2], strict=True):
        path = (*path, *(scopes.path_of(part) or ()))
        region = path if mark == scopes.REGION else region
    return (*path, *(scopes.path_of(last) or ())), region

# SPDX-License-Identifier: Apache-2.0
"""Names of the values inside a region, and saving and offloading by name.

Sits on `scopes` (module paths on operations). The name of a value inside a region is

-   `attn.q_proj`: the output of a submodule; `norm[1]` the output of its second call;
-   `mlp:dot_general`: the result of an operation in `mlp`; `mlp:dot_general[1]` of the second such operation there, in
    trace order;
-   `@qkv`: a `checkpoint_name` in the user's model.

Each selected value is wrapped in a `checkpoint_name`, and the policy saves that name: a structured policy, known before
the trace, which `jax_remat3` supports too. The operations do not change, also inside jits, scans and branches. No
policy reaches the values inside a custom derivative or a kernel; these are listed with `reachable=False`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from ... import compat
from ...errors import UnmatchedRuleError, suggest_names
from ...jaxpr import jaxprs, result_derivatives
from ...rules import policies
from ...rules.paths import NamePattern, Path, format_path
from ...rules.policy_types import Decision, Policy
from ...rules.rule import Remat
from . import scopes

SAVED, OFFLOADED = "remattools:save", "remattools:offload"

# Where an equation is: its index in each nested program from the outside in, with the place of that program among the
# equation's parameters.
Position = tuple[tuple[int, tuple[str, int]] | int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedValue:
    """A value that a region can save or offload.

    Attributes:
        kind: "module" (a submodule's output), "op" (the result of an operation) or "user" (a `checkpoint_name`).
        path: Path of its module, relative to the region; `()` for the region's module.
        primitive: Name of the JAX primitive, or the `checkpoint_name`; "" for kind "module".
        index: Number among the values of equal kind, path and primitive, in trace order.
        avals: Shape and dtype of each of its arrays.
        reachable: Whether a policy can save it; False inside custom derivatives and kernels.
        where: Positions of its equations in the traced program.
    """

    kind: str
    path: Path
    primitive: str
    index: int
    avals: tuple[Any, ...]
    reachable: bool = True
    where: tuple[Position, ...] = ()

    @property
    def label(self) -> str:
        """The name without its index, as a pattern without an index matches it."""
        if self.kind == "user":
            return f"@{self.primitive}"
        path = format_path(self.path)
        return path if self.kind == "module" else f"{path}:{self.primitive}"

    @property
    def bytes(self) -> int:
        """Size of all its arrays in bytes."""
        return sum(jaxprs.count_aval_bytes(aval) for aval in self.avals)


def is_naming_needed(action: Remat) -> bool:
    """Whether a region under `action` needs the names of its values."""
    return bool(action.save or action.offload) or _is_policy_by_names(action)


def _is_policy_by_names(action: Remat) -> bool:
    """Whether the policy itself becomes names: `jax_remat3` calls neither combined policies nor bare callables."""
    if action.policy is None or not _is_remat3():
        return False
    return action.policy.is_lowered_to_names or bool(action.save or action.offload)


def lower_policy(action: Remat) -> Callable[..., Any] | None:
    """Return the JAX policy of `action`: JAX's own object if there is one, for the same program as `jax.checkpoint`."""
    if not is_naming_needed(action):
        return None if action.policy is None else action.policy.lower()
    marks: Policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[SAVED],
        names_which_can_be_offloaded=[OFFLOADED],
        offload_src="device",
        offload_dst="pinned_host",
    )
    if not action.offload:
        marks = policies.save_only_these_names(SAVED)
    if action.policy is None or _is_policy_by_names(action):
        return marks.lower()
    return (action.policy | marks).lower()


def evaluate(fn: Callable[[list[Any]], list[Any]], leaves: list[Any], action: Remat) -> list[Any]:
    """Compute `fn(leaves)` with the values that `action` saves or offloads marked for its policy.

    Raises:
        UnmatchedRuleError: If a pattern of `save` or `offload` matches no value that can be saved.
    """
    program = jax.make_jaxpr(fn)(leaves)
    marks = select_marks(functools.partial(find_named_values, program), action)
    if action.policy is not None and _is_policy_by_names(action):
        marks = {**_decide_marks(program, action.policy), **marks}
    results: list[Any] = jaxprs.run(mark_equations(program, marks), leaves)
    return results


def select_marks(find_values: Callable[..., Iterable[NamedValue]], action: Remat) -> dict[Position, str]:
    """Select the equations whose results are saved or offloaded; a value named for both is saved.

    Args:
        find_values: Returns the named values; with `deeper=True`, also those in inner regions.
        action: What is saved and offloaded.

    Returns:
        `SAVED` or `OFFLOADED` by the equation's position.

    Raises:
        UnmatchedRuleError: If a pattern matches no value that can be saved.
    """
    values = list(find_values())
    marks: dict[Position, str] = {}
    errors: dict[str, UnmatchedRuleError] = {}
    for patterns, mark in ((action.offload, OFFLOADED), (action.save, SAVED)):
        for text in patterns:
            pattern = NamePattern.parse(text)
            matches = [v for v in values if pattern.is_match(v.kind, v.path, v.primitive, v.index)]
            reachable = [v for v in matches if v.reachable]
            if not reachable:
                errors[text] = _make_unmatched_error(pattern, matches, values, list(find_values(deeper=True)))
            marks.update({position: mark for value in reachable for position in value.where})
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise UnmatchedRuleError(
            what=f"{len(errors)} names match no value of this region that can be saved: "
            f"{', '.join(map(repr, errors))}.",
            why="nothing would be saved for them; names are relative to the region.",
            fix="\n    ".join(f"{text!r}: {error.fix}" for text, error in errors.items()),
        )
    return marks


def _make_unmatched_error(
    pattern: NamePattern, matches: Sequence[NamedValue], values: Sequence[NamedValue], deeper: Sequence[NamedValue]
) -> UnmatchedRuleError:
    text = pattern.text
    inner = [v for v in deeper if pattern.is_match(v.kind, v.path, v.primitive, v.index)]
    if inner and not matches:
        return UnmatchedRuleError(
            what=f"the name {text!r} matches only values inside another region ({inner[0].label}).",
            why="a region decides for its own inside; the outer region's policy has no effect there.",
            fix="name it in the inner module's rule, relative to that module, or exclude that region with False.",
        )
    if matches:
        return UnmatchedRuleError(
            what=f"the name {text!r} matches only values inside a custom derivative or a kernel ({matches[0].label}).",
            why="no JAX policy can save them; the derivative's own code decides whether to recompute them.",
            fix="save the output of the module around it instead.",
        )
    labels = list(dict.fromkeys(value.label for value in values if value.reachable))
    stem = re.sub(r"\[\d+\]$", "", text)
    same = [value.index for value in values if value.reachable and value.label == stem]
    return UnmatchedRuleError(
        what=f"the name {text!r} matches no value of this region.",
        why="nothing would be saved; names are relative to the region.",
        fix=f"{stem!r} without an index; the last of these is '{stem}[{max(same)}]'."
        if same
        else suggest_names(text, labels),
    )


def find_named_values(jaxpr: Any, *, deeper: bool = False) -> Iterator[NamedValue]:
    """Yield the named values of a traced program in trace order, with `deeper` also those in regions inside it."""
    counts: dict[tuple[str, Path, str], int] = {}
    outputs: dict[tuple[Path, int], NamedValue] = {}
    for position, equation, path, reachable in _walk_equations(jaxpr, (), (), True, deeper=deeper):
        name = jaxprs.get_checkpoint_name(equation)
        avals = tuple(var.aval for var in equation.outvars)
        output = scopes.parse_output(name) if name is not None else None
        if output is not None:
            earlier = outputs.get(output)
            outputs[output] = NamedValue(
                kind="module",
                path=output[0],
                primitive="",
                index=output[1],
                avals=avals if earlier is None else earlier.avals + avals,
                reachable=reachable,
                where=(position,) if earlier is None else (*earlier.where, position),
            )
            continue
        kind, primitive = ("op", equation.primitive.name) if name is None else ("user", name)
        key = (kind, path, primitive)
        index = counts.get(key, 0)
        counts[key] = index + 1
        yield NamedValue(
            kind=kind,
            path=path,
            primitive=primitive,
            index=index,
            avals=avals,
            reachable=reachable,
            where=(position,),
        )
    yield from (value for (path, _), value in outputs.items() if path)


def _walk_equations(
    jaxpr: Any, prefix: Position, outer: Path, reachable: bool, *, deeper: bool = False
) -> Iterator[tuple[Position, Any, Path, bool]]:
    """Yield the equations that compute something, depth first, without the wrappers around nested programs."""
    for number, equation in enumerate(jaxprs.open_jaxpr(jaxpr).eqns):
        path = scopes.find_path(str(equation.source_info.name_stack))
        path = outer if path is None else path
        nested = list(jaxprs.find_subjaxprs(equation))
        opaque = jaxprs.is_opaque(equation)
        if not nested or opaque or jaxprs.is_region(equation):
            yield (*prefix, number), equation, path, reachable
        if jaxprs.is_region(equation) and not deeper:
            continue  # an inner region has its own names
        for place, inner in nested:
            yield from _walk_equations(inner, (*prefix, (number, place)), path, reachable and not opaque, deeper=deeper)


def mark_equations(jaxpr: Any, marks: dict[Position, str], prefix: Position = ()) -> Any:
    """Return the program with a `checkpoint_name` after every marked equation, and without the marks of `scopes`."""
    equations: list[Any] = []
    same: dict[Any, Any] = {}  # result of a removed mark -> the value it marked
    inner = jaxprs.open_jaxpr(jaxpr)
    placed = _place_marks(inner, marks, prefix)
    for number, equation in enumerate(inner.eqns):
        if same:
            equation = equation.replace(invars=[_resolve_atom(same, atom) for atom in equation.invars])
        name, mark = jaxprs.get_checkpoint_name(equation), placed.get(number)
        equation = _mark_nested(equation, marks, prefix, number)
        if mark in (SAVED, OFFLOADED) and name is None and result_derivatives.is_result_in_derivative(equation):
            equations.extend(result_derivatives.name_with_derivative(equation, mark))
        elif name is not None and mark is not None:
            equations.extend(jaxprs.replace_checkpoint_name(equation, mark))
        elif name is not None and scopes.parse_output(name) is not None:
            same[equation.outvars[0]] = equation.invars[0]
        elif mark is not None:
            equations.extend(jaxprs.add_checkpoint_name(equation, mark))
        else:
            equations.append(equation)
    if all(new is old for new, old in zip(equations, inner.eqns, strict=False)) and len(equations) == len(inner.eqns):
        return jaxpr  # the same object, so that JAX lowers a function called twice only once
    return jaxprs.replace_equations(jaxpr, equations, [_resolve_atom(same, atom) for atom in inner.outvars])


def _place_marks(inner: Any, marks: dict[Position, str], prefix: Position) -> dict[int, str]:
    """Marks by equation number in one program.

    The mark of a `checkpoint_name` moves to the equation that computes the value, if only there it can be saved.
    """
    found = {number: marks[*prefix, number] for number in range(len(inner.eqns)) if (*prefix, number) in marks}
    if not found:
        return found
    producers: dict[Any, int] = {}
    for number, equation in enumerate(inner.eqns):
        name = jaxprs.get_checkpoint_name(equation)
        if name is None:
            producers.update(dict.fromkeys(equation.outvars, number))
            continue
        producer = producers.get(equation.invars[0]) if isinstance(equation.invars[0], core.Var) else None
        if producer is None:
            continue
        producers[equation.outvars[0]] = producer
        if (
            found.get(number) in (SAVED, OFFLOADED)
            and len(inner.eqns[producer].outvars) == 1
            and result_derivatives.is_result_in_derivative(inner.eqns[producer])
        ):
            mark = found.pop(number)
            found[producer] = SAVED if found.get(producer) == SAVED else mark
    return found


def _mark_nested(equation: Any, marks: dict[Position, str], prefix: Position, number: int) -> Any:
    if jaxprs.is_region(equation) or jaxprs.is_opaque(equation):
        return equation
    new = {
        place: (below, mark_equations(below, marks, (*prefix, (number, place))))
        for place, below in jaxprs.find_subjaxprs(equation)
    }
    changed = {place: rewritten for place, (below, rewritten) in new.items() if rewritten is not below}
    return jaxprs.replace_subjaxprs(equation, changed) if changed else equation


def _resolve_atom(same: dict[Any, Any], atom: Any) -> Any:
    return same.get(atom, atom) if isinstance(atom, core.Var) else atom


def _decide_marks(jaxpr: Any, policy: Policy) -> dict[Position, str]:
    """Marks for a policy that `jax_remat3` would not call."""
    marks = {}
    for position, equation, _, reachable in _walk_equations(jaxpr, (), (), True):
        name = jaxprs.get_checkpoint_name(equation)
        if not reachable or (name is not None and scopes.parse_output(name) is not None):
            continue
        avals = [atom.aval for atom in equation.invars]
        if name is None:
            verdict = policy.decide(equation.primitive, *avals, **equation.params)
        else:
            verdict = policy.decide(compat.NAME_PRIMITIVE, *avals, name=name)
        if verdict is not Decision.RECOMPUTE:
            marks[position] = SAVED if verdict is Decision.SAVE else OFFLOADED
    return marks


def _is_remat3() -> bool:
    return bool(getattr(jax.config, "jax_remat3", False))

# SPDX-License-Identifier: Apache-2.0
"""Names of the values inside a region, and saving by them.

Sits on `scopes` (module paths on operations). Inside a region a value is known as

-   `attn.q_proj`: what a submodule returned; `norm[1]` what its second call returned;
-   `mlp:dot_general`: what an operation written in `mlp` computed; `mlp:dot_general[1]`
    the second of its kind there, in trace order;
-   `@qkv`: what the model's own author named by `checkpoint_name`.

The chosen values are wrapped in one `checkpoint_name` each and the policy saves
that name: a structured policy, known before the trace, which also `jax_remat3`
understands. The operations are left as they are, inside jits, scans and
branches too. What a custom derivative or a kernel computes on its inside is out
of reach of every policy; such values are listed with `reachable=False`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from ... import compat
from ...errors import UnmatchedRuleError, suggest_names
from ...jaxpr import jaxprs, result_derivatives
from ...rules import policies
from ...rules.paths import NamePattern, Path, format_path
from ...rules.policy import Decision, Policy
from ...rules.rule import Remat
from . import scopes

SAVED, OFFLOADED = "remattools:save", "remattools:offload"

# Where an equation stands: its index in each nested program from the outside in, with the place of that program
# among the equation's parameters.
Position = tuple[tuple[int, tuple[str, int]] | int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedValue:
    """A value that a region can save or offload.

    Attributes:
        kind: "module" (a submodule's output), "op" or "user" (a `checkpoint_name`).
        path: Module it belongs to, relative to the region; `()` is the region's own.
        primitive: Name of the JAX primitive, or of the `checkpoint_name`.
        index: Which of equal kind, path and primitive, in trace order.
        avals: Shape and dtype of each array it consists of.
        reachable: False inside custom derivatives and kernels.
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
        """The name without its index: what a pattern without an index matches."""
        if self.kind == "user":
            return f"@{self.primitive}"
        path = format_path(self.path)
        return path if self.kind == "module" else f"{path}:{self.primitive}"

    @property
    def bytes(self) -> int:
        """Size of all its arrays."""
        return sum(jaxprs.count_aval_bytes(aval) for aval in self.avals)


def is_naming_needed(action: Remat) -> bool:
    """Whether a region under `action` has to know the names of its values."""
    return bool(action.save or action.offload) or _is_policy_by_names(action)


def _is_policy_by_names(action: Remat) -> bool:
    """Whether the policy itself has to become names: `jax_remat3` asks no combined policy and no bare callable."""
    if action.policy is None or not _is_remat3():
        return False
    return action.policy.is_lowered_to_names or bool(action.save or action.offload)


def lower_policy(action: Remat) -> Callable[..., Any] | None:
    """The JAX policy of `action`; JAX's own object where it has one, so that the program is JAX's."""
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
    """`fn(leaves)`, with the values that `action` keeps marked for its policy.

    Raises:
        UnmatchedRuleError: If a pattern of `save` or `offload` names nothing here.
    """
    program = jax.make_jaxpr(fn)(leaves)
    marks = select_marks(functools.partial(find_named_values, program), action)
    if action.policy is not None and _is_policy_by_names(action):
        marks = {**_decide_marks(program, action.policy), **marks}
    results: list[Any] = jaxprs.run(mark_equations(program, marks), leaves)
    return results


def select_marks(find_values: Callable[..., Iterable[NamedValue]], action: Remat) -> dict[Position, str]:
    """Which equations' results are saved or offloaded; later patterns do not override, `save` comes first.

    Args:
        find_values: The values by name; `named(deeper=True)` looks into inner regions, too.
        action: What is saved and offloaded.

    Raises:
        UnmatchedRuleError: If a pattern names nothing that can be kept.
    """
    values = list(find_values())
    marks: dict[Position, str] = {}
    for patterns, mark in ((action.offload, OFFLOADED), (action.save, SAVED)):
        for text in patterns:
            pattern = NamePattern.parse(text)
            found = [v for v in values if pattern.is_match(v.kind, v.path, v.primitive, v.index)]
            reachable = [v for v in found if v.reachable]
            if not reachable:
                raise _make_unmatched_error(pattern, found, values, list(find_values(deeper=True)))
            marks.update({position: mark for value in reachable for position in value.where})
    return marks


def _make_unmatched_error(
    pattern: NamePattern, found: Sequence[NamedValue], values: Sequence[NamedValue], deeper: Sequence[NamedValue]
) -> UnmatchedRuleError:
    text = pattern.text
    inner = [v for v in deeper if pattern.is_match(v.kind, v.path, v.primitive, v.index)]
    if inner and not found:
        return UnmatchedRuleError(
            what=f"the name {text!r} matches only values inside another region ({inner[0].label}).",
            why="a region decides over its inside alone: what is saved there cannot be named from outside.",
            fix="name it in the inner module's own rule, relative to that module, or take that region out.",
        )
    if found:
        return UnmatchedRuleError(
            what=f"the name {text!r} matches only values inside a custom derivative or a kernel ({found[0].label}).",
            why="no policy of JAX reaches them: they are recomputed by the code that defines the derivative.",
            fix="save the output of the module around it instead.",
        )
    labels = list(dict.fromkeys(value.label for value in values if value.reachable))
    return UnmatchedRuleError(
        what=f"the name {text!r} matches no value of this region.",
        why="it would silently save nothing; names are relative to the region.",
        fix=suggest_names(text, labels),
    )


def find_named_values(jaxpr: Any, *, deeper: bool = False) -> Iterator[NamedValue]:
    """All values of a traced program by name, in trace order; `deeper` looks into regions inside it, too."""
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
    """Equations that compute something, depth first; the wrappers around nested programs are passed over."""
    for number, equation in enumerate(jaxprs.open_jaxpr(jaxpr).eqns):
        path = scopes.find_path(str(equation.source_info.name_stack))
        path = outer if path is None else path
        nested = list(jaxprs.find_subjaxprs(equation))
        opaque = jaxprs.is_opaque(equation)
        if not nested or opaque or jaxprs.is_region(equation):
            yield (*prefix, number), equation, path, reachable
        if jaxprs.is_region(equation) and not deeper:
            continue  # a region of its own, with names of its own
        for place, inner in nested:
            yield from _walk_equations(inner, (*prefix, (number, place)), path, reachable and not opaque, deeper=deeper)


def mark_equations(jaxpr: Any, marks: dict[Position, str], prefix: Position = ()) -> Any:
    """The program with a `checkpoint_name` behind every marked equation and no marks of `scopes`."""
    equations: list[Any] = []
    same: dict[Any, Any] = {}  # result of a dropped mark -> the value it marked
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
    """Marks by the equations of one program; a kept name's goes to what made the value, where only that can keep it."""
    found = {number: marks[*prefix, number] for number in range(len(inner.eqns)) if (*prefix, number) in marks}
    if not found:
        return found
    makers: dict[Any, int] = {}
    for number, equation in enumerate(inner.eqns):
        name = jaxprs.get_checkpoint_name(equation)
        if name is None:
            makers.update(dict.fromkeys(equation.outvars, number))
            continue
        maker = makers.get(equation.invars[0]) if isinstance(equation.invars[0], core.Var) else None
        if maker is None:
            continue
        makers[equation.outvars[0]] = maker
        kept = found.get(number) in (SAVED, OFFLOADED)
        if (
            kept
            and len(inner.eqns[maker].outvars) == 1
            and result_derivatives.is_result_in_derivative(inner.eqns[maker])
        ):
            mark = found.pop(number)
            found[maker] = SAVED if found.get(maker) == SAVED else mark
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
    """Marks for a policy that `jax_remat3` would not ask."""
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

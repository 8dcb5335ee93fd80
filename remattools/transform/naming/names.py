# SPDX-License-Identifier: Apache-2.0
"""Names of the values inside a region, and saving and offloading by name.

Sits on `scopes` (module paths on operations). The name of a value inside a region is

-   `attn.q_proj`: the output of a submodule; `norm[1]` the output of its second call;
-   `mlp:dot_general`: the result of an operation in `mlp`; `mlp:dot_general[1]` of the second such operation there, in
    trace order;
-   `mlp:input`: an array that is passed to a submodule; `.:input` one that is passed to the region itself;
-   `@qkv`: a `checkpoint_name` in the user's model.

Each selected value is wrapped in a `checkpoint_name`, and the policy saves that name: a structured policy, known before
the trace, which `jax_remat3` supports too. The operations do not change, also inside jits, scans and branches. Of a
`custom_vjp` the values of its forward rule are named, since that is what runs; the residuals of kernels are there. No
policy reaches the values inside another custom derivative or a kernel; these are listed with `reachable=False`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from ... import compat
from ...errors import UnmatchedRuleError, suggest_names
from ...jaxpr import forward_rules, jaxprs, random_bits
from ...rules import policies
from ...rules.paths import NamePattern, Path, format_path
from ...rules.policy_types import DROPOUT_MASK, Decision, Policy
from ...rules.rule import Remat
from . import scopes

SAVED, OFFLOADED = "remattools:save", "remattools:offload"
# What a stretch that is computed in pieces returns, and the reductions of its rows: what its pieces read and compute
# otherwise is not for policies, so a region around it saves by names.
TILE_RESULT, TILE_ROW = "remattools:tile", "remattools:tile-row"

Position = jaxprs.Position


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedValue:
    """A value that a region can save or offload.

    Attributes:
        kind: "module" (a submodule's output), "input" (an array passed to a module), "op" (the result of an operation)
            or "user" (a `checkpoint_name`).
        path: Path of its module, relative to the region; `()` for the region's module.
        primitive: Name of the JAX primitive, "input", or the `checkpoint_name`; "" for kind "module".
        index: Number among the values of equal kind, path and primitive, in trace order.
        avals: Shape and dtype of each of its arrays.
        reachable: Whether a policy can save it; False inside custom derivatives and kernels.
        where: Positions of its equations in the traced program.
        is_dropout_mask: Whether it is a mask that is computed from random bits.
    """

    kind: str
    path: Path
    primitive: str
    index: int
    avals: tuple[Any, ...]
    reachable: bool = True
    where: tuple[Position, ...] = ()
    is_dropout_mask: bool = False

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


def is_naming_needed(action: Remat, *, holds_tiles: bool = False) -> bool:
    """Whether a region under `action` needs the names of its values.

    Args:
        action: What is saved and offloaded.
        holds_tiles: Whether something inside is computed in pieces.
    """
    is_by_masks = action.policy is not None and action.policy.has_dropout_masks
    return bool(action.save or action.offload) or is_by_masks or is_policy_by_names(action, holds_tiles=holds_tiles)


def is_policy_by_names(action: Remat, *, holds_tiles: bool = False) -> bool:
    """Whether the policy itself becomes names.

    `jax_remat3` calls neither combined policies nor bare callables; and a policy would also decide about the inside of
    pieces, where "save the matrix products" would bring back the values that are computed in pieces.
    """
    if action.policy is None or holds_tiles:
        return action.policy is not None
    return _is_remat3() and (action.policy.is_lowered_to_names or bool(action.save or action.offload))


def lower_policy(action: Remat, *, holds_tiles: bool = False) -> Callable[..., Any] | None:
    """Return the JAX policy of `action`: JAX's own object if there is one, for the same program as `jax.checkpoint`."""
    is_by_names = is_policy_by_names(action, holds_tiles=holds_tiles)
    if not (action.save or action.offload or is_by_names or holds_tiles):
        return None if action.policy is None else action.policy.lower()
    saved = [SAVED, TILE_RESULT, TILE_ROW] if holds_tiles else [SAVED]
    marks: Policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=[OFFLOADED],
        offload_src="device",
        offload_dst="pinned_host",
    )
    if not action.offload:
        marks = policies.save_only_these_names(*saved)
    if action.policy is None or is_by_names:
        return marks.lower()
    return (action.policy | marks).lower()


def select_marks(
    find_values: Callable[..., Iterable[NamedValue]], action: Remat, *, holds_tiles: bool = False
) -> dict[Position, str]:
    """Select the equations whose results are saved or offloaded; a value named for both is saved.

    Args:
        find_values: Returns the named values; with `deeper=True`, also those in inner regions.
        action: What is saved and offloaded.
        holds_tiles: Whether something inside is computed in pieces.

    Returns:
        `SAVED`, `OFFLOADED` or `DROPOUT_MASK` by the equation's position.

    Raises:
        UnmatchedRuleError: If a pattern matches no value that can be saved.
    """
    values = list(find_values())
    chosen: dict[str, list[NamedValue]] = {OFFLOADED: [], DROPOUT_MASK: [], SAVED: []}  # later ones win
    errors: dict[str, UnmatchedRuleError] = {}
    for patterns, mark in ((action.offload, OFFLOADED), (action.save, SAVED)):
        for text in patterns:
            pattern = NamePattern.parse(text)
            matches = [v for v in values if pattern.is_match(v.kind, v.path, v.primitive, v.index)]
            reachable = [v for v in matches if v.reachable]
            if not reachable:
                errors[text] = _make_unmatched_error(pattern, matches, values, list(find_values(deeper=True)))
            chosen[mark] += reachable
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise UnmatchedRuleError(
            what=f"{len(errors)} names match no value of this region that can be saved: "
            f"{', '.join(map(repr, errors))}.",
            why="nothing would be saved for them; names are relative to the region.",
            fix="\n    ".join(f"{text!r}: {error.fix}" for text, error in errors.items()),
        )
    if _is_saving_dropout_masks(action):
        mark = SAVED if is_policy_by_names(action, holds_tiles=holds_tiles) else DROPOUT_MASK
        chosen[mark] += [value for value in values if value.is_dropout_mask and value.reachable]
    return {position: mark for mark, group in chosen.items() for value in group for position in value.where}


def _is_saving_dropout_masks(action: Remat) -> bool:
    if action.policy is None or not action.policy.has_dropout_masks:
        return False
    return action.policy.decide(compat.NAME_PRIMITIVE, name=DROPOUT_MASK) is Decision.SAVE


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


def find_named_values(jaxpr: Any, *, deeper: bool = False, in_rule: bool = False) -> Iterator[NamedValue]:
    """Yield the named values of a traced program in trace order.

    Args:
        jaxpr: The program.
        deeper: Whether values in regions inside it are included.
        in_rule: Whether it is the forward rule of a custom_vjp.
    """
    masks = random_bits.find_dropout_masks(jaxpr, deeper=deeper)
    counts: dict[tuple[str, Path, str], int] = {}
    outputs: dict[tuple[Path, int], NamedValue] = {}
    for position, equation, path, reachable in walk_equations(jaxpr, (), (), True, deeper=deeper, in_rule=in_rule):
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
        passed_to = scopes.parse_input(name) if name is not None else None
        if passed_to is not None:
            kind, primitive, path = "input", "input", passed_to
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
            is_dropout_mask=position in masks,
        )
    yield from (value for (path, _), value in outputs.items() if path)


def walk_equations(
    jaxpr: Any, prefix: Position, outer: Path, reachable: bool, *, deeper: bool = False, in_rule: bool = False
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
        # A custom_vjp inside a forward rule is not differentiated: its function runs, and no policy sees into that.
        rule = forward_rules.trace_forward_rule(equation) if reachable and not in_rule else None
        if rule is not None:
            start = (*prefix, (number, forward_rules.FORWARD_RULE))
            yield from walk_equations(rule, start, path, True, deeper=deeper, in_rule=True)
            continue
        for place, inner in nested:
            position = (*prefix, (number, place))
            visible = reachable and not opaque
            yield from walk_equations(inner, position, path, visible, deeper=deeper, in_rule=in_rule)


def _is_remat3() -> bool:
    return bool(getattr(jax.config, "jax_remat3", False))

# SPDX-License-Identifier: Apache-2.0
"""Apply rules to a model in place, and revert them.

Sits on `swap`, `modules` and `rules.resolve`. Everything is decided and checked before the first module changes, so
that an error leaves the model unchanged.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from ..errors import RuleError
from ..rules.paths import Path, format_path
from ..rules.resolve import ModuleDecision, ModuleNode, resolve
from ..rules.rule import Remat
from ..rules.ruleset import LOSS, Rules
from . import swap
from .derive import get_base_class
from .functions import apply_loss_rules, remove_action
from .group import Group
from .modules import ModuleEntry, find_modules


def apply[M](model: M, rules: Any, *, on: str | None = None, strict: bool = True) -> M:
    """Make the matched modules of `model` rematerialise, in place.

    Only the residuals between forward and backward change. Values, gradients, state paths and
    checkpoints stay the same. A second `apply` adds to the first: a module that no rule matches
    keeps its action. Nothing is copied, so abstract models (`nnx.eval_shape`) work too.

    Args:
        model: An nnx module, or a pytree of modules; concrete or abstract. Or a loss function, for the rule "@loss".
        rules: `Rules`, a mapping of patterns to actions, or the path of a rule file; with `on`,
            a single action (a policy, a `Remat` or a `Tile`).
        on: Pattern of the modules that the single action is for.
        strict: Raise if a rule matches nothing; otherwise warn.

    Returns:
        `model` itself; for a function, one that computes the same.

    Raises:
        UnmatchedRuleError: If `strict` and a rule matches no module that can be called.
        RuleError: If `model` holds no modules, a module lacks a method named in its action, or the
            modules of a `group` are not in a sequence.

    Example:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
        >>> _ = rt.apply(model, {"layers.*": "nothing_saveable"})
        >>> isinstance(model.layers[0], nnx.Linear)
        True
        >>> _ = rt.apply(model, "dots_saveable", on="layers.[0]")
    """
    if callable(model) and not isinstance(model, type) and not find_modules(model):
        loss_rules = coerce_rules(rules, on)
        if LOSS in [pattern.text for pattern, _ in loss_rules]:
            changed: M = apply_loss_rules(model, loss_rules)
            return changed
    _check_module_rules(coerce_rules(rules, on))
    entries, decisions = decide(model, rules, on=on, strict=strict)
    plan = _plan_modules(entries, decisions)
    for entry, (action, _) in zip(entries, plan, strict=True):
        if action is not None:
            swap.check_class(type(entry.module), action)
    holders = _find_tile_holders(entries, [action for action, _ in plan])
    for index, (entry, (action, groups)) in enumerate(zip(entries, plan, strict=True)):
        holds_tiles = index in holders and action is not None
        if (action, groups, holds_tiles) != _get_state(entry.module):
            swap.swap(entry.module, action, groups, holds_tiles=holds_tiles)
    return model


def _get_state(module: Any) -> tuple[Remat | None, tuple[Group, ...], bool]:
    return swap.get_action(module), swap.get_groups(module), swap.has_tiles_inside(module)


def _find_tile_holders(entries: list[ModuleEntry], actions: list[Remat | None]) -> set[int]:
    """Indices of the modules inside which a module is computed in pieces."""
    above = {
        path[:depth]
        for entry, action in zip(entries, actions, strict=True)
        if action is not None and action.tile is not None
        for path in entry.paths
        for depth in range(len(path))
    }
    return {index for index, entry in enumerate(entries) if above.intersection(entry.paths)}


def _check_module_rules(rules: Rules) -> None:
    if len(rules) and all(pattern.text == LOSS for pattern, _ in rules):
        raise RuleError(
            what=f"all rules are for {LOSS!r}, but they were applied to a model.",
            why="that rule is for what a loss computes around its model.",
            fix="loss = rt.apply(loss, rules).",
        )


type _ModuleAssignment = tuple[Remat | None, tuple[Group, ...]]


def _plan_modules(entries: list[ModuleEntry], decisions: list[ModuleDecision]) -> list[_ModuleAssignment]:
    """The action of each module, and the groups of the sequences it holds."""
    actions: list[Remat | None] = []
    grouped: dict[int, dict[tuple[Path, Remat], list[int]]] = {}
    ruled_paths: set[Path] = set()
    for entry, decision in zip(entries, decisions, strict=True):
        if decision.rule is None:
            actions.append(swap.get_action(entry.module))
            continue
        ruled_paths.update(entry.paths)
        action = decision.action if isinstance(decision.action, Remat) else None
        if action is not None and action.group != 1:
            holder = _find_holder(entries, decision.path)
            _add_to_group(grouped.setdefault(holder, {}), decision.path[len(entries[holder].path) :], action)
            action = None
        actions.append(action)
    return [
        (action, _merge_groups(swap.get_groups(entry.module), grouped.get(index, {}), entry, ruled_paths))
        for index, (entry, action) in enumerate(zip(entries, actions, strict=True))
    ]


def _add_to_group(groups: dict[tuple[Path, Remat], list[int]], path: Path, action: Remat) -> None:
    """Add the module at `path`, relative to the holder, to its group."""
    if isinstance(path[-1], int):
        groups.setdefault((path[:-1], action), []).append(path[-1])
    else:
        groups.setdefault((path, action), [])  # stacked layers, run by a scan


def _merge_groups(
    before: tuple[Group, ...], new: dict[tuple[Path, Remat], list[int]], entry: ModuleEntry, ruled_paths: set[Path]
) -> tuple[Group, ...]:
    """The new groups, and the members of the old ones that no rule matches."""
    remaining = []
    for group in before:
        root = (*entry.path, *group.sequence)
        members = tuple(index for index in group.members if (*root, index) not in ruled_paths)
        if members or (not group.members and root not in ruled_paths):
            remaining.append(Group(group.sequence, members, group.action))
    added = [Group(sequence, tuple(sorted(members)), action) for (sequence, action), members in new.items()]
    return (*remaining, *added)


def _find_holder(entries: list[ModuleEntry], path: Path) -> int:
    """Index of the nearest module above `path` that is not a container."""
    indices = {p: index for index, entry in enumerate(entries) for p in entry.paths if not entry.container}
    for depth in range(len(path) - 1, -1, -1):
        if path[:depth] in indices:
            return indices[path[:depth]]
    raise RuleError(
        what=f"a rule groups {format_path(path)}, but no module above it calls it.",
        why="a group's region is cut out of the method that calls its modules.",
        fix="apply the rules to the module whose method runs the sequence.",
    )


def revert[M](model: M) -> M:
    """Remove every action from `model`, in place; each module gets its own class back.

    Args:
        model: An nnx module, or a pytree of modules. Or a function that `tile` or `apply` returned.

    Returns:
        `model` itself; for a function, the function as it was.

    Example:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = rt.apply(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "nothing_saveable", on=".")
        >>> type(rt.revert(model)) is nnx.Linear
        True
    """
    for entry in find_modules(model):
        swap.unswap(entry.module)
    plain: M = remove_action(model)
    return plain


@contextlib.contextmanager
def applied[M](model: M, rules: Any, *, on: str | None = None, strict: bool = True) -> Iterator[M]:
    """Apply rules to `model` inside a `with` block, and restore its earlier actions afterwards.

    Args:
        model: An nnx module, or a pytree of modules; concrete or abstract.
        rules: `Rules`, a mapping of patterns to actions, or the path of a rule file; with `on`,
            a single action (a policy or a `Remat`).
        on: Pattern of the modules that the single action is for.
        strict: Raise if a rule matches nothing; otherwise warn.

    Yields:
        `model` itself.

    Raises:
        UnmatchedRuleError: If `strict` and a rule matches no module that can be called.
        RuleError: If an action cannot be applied; see `apply`.

    Example:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        >>> with rt.applied(model, "nothing_saveable", on="."):
        ...     len(rt.explain(model).regions)
        1
        >>> len(rt.explain(model).regions)
        0
    """
    before = [(entry.module, _get_state(entry.module)) for entry in find_modules(model)]
    apply(model, rules, on=on, strict=strict)
    try:
        yield model
    finally:
        for module, (action, groups, holds_tiles) in before:
            swap.swap(module, action, groups, holds_tiles=holds_tiles)


def decide(
    model: Any, rules: Any, *, on: str | None = None, strict: bool = True
) -> tuple[list[ModuleEntry], list[ModuleDecision]]:
    """Return the modules of `model` and the decision on each, without changing anything."""
    entries = find_modules(model)
    if not entries:
        raise _make_no_model_error(model)
    # A rule file may hold rules for the loss too, and each is applied where it belongs.
    module_rules = Rules((pattern, action) for pattern, action in coerce_rules(rules, on) if pattern.text != LOSS)
    return entries, resolve(module_rules, [_make_node(entry) for entry in entries], strict=strict)


def _make_no_model_error(value: Any) -> RuleError:
    if isinstance(value, type):
        return RuleError(
            what=f"{value.__name__} is a class, not a model.",
            why="rules apply to the modules of an instance.",
            fix=f"pass an instance, or decorate the class {value.__name__} with @remat(rules=...).",
        )
    subject = f"the function {getattr(value, '__name__', '')}" if callable(value) else f"this {type(value).__name__}"
    return RuleError(
        what=f"{subject} contains no nnx module.",
        why="rules apply to the modules of a model; a function, a state or an optimizer has none.",
        fix='pass the model itself, or a dict or list of models. The rule "@loss" is for functions.',
    )


def coerce_rules(rules: Any, on: str | None) -> Rules:
    """Convert `rules` from any form that `apply` accepts."""
    if on is not None:
        if isinstance(rules, Rules | dict):
            raise RuleError(
                what=f"on={on!r} was passed with rules that already have patterns.",
                why="it would be unclear which pattern applies.",
                fix=f'apply(model, "nothing_saveable", on={on!r}), or apply(model, {{{on!r}: "nothing_saveable"}}).',
            )
        return Rules({on: rules})
    return Rules.coerce(rules)


def _make_node(entry: ModuleEntry) -> ModuleNode:
    methods = frozenset() if entry.container else _find_methods(get_base_class(type(entry.module)))
    return ModuleNode(paths=tuple(entry.paths), class_names=entry.class_names, methods=methods)


@functools.lru_cache(maxsize=4096)
def _find_methods(cls: type) -> frozenset[str]:
    return frozenset(swap.find_methods(cls))


def find_outermost_sequences(model: Any) -> list[str]:
    """Return patterns for the modules of each sequence that is not inside another sequence, such as `layers.*`."""
    found: dict[str, None] = {}
    for entry in find_modules(model):
        indices = [depth for depth, segment in enumerate(entry.path) if isinstance(segment, int)]
        if len(indices) == 1 and indices[0] == len(entry.path) - 1:
            found[format_path((*entry.path[:-1], "*"))] = None
    return list(found)


def get_active_actions(entries: list[ModuleEntry]) -> list[Remat | None]:
    """Return the action that is in force on each module, its own or its group's."""
    actions = [swap.get_action(entry.module) for entry in entries]
    indices = {path: index for index, entry in enumerate(entries) for path in entry.paths}
    for entry in entries:
        for group in swap.get_groups(entry.module):
            root = (*entry.path, *group.sequence)
            for path in [(*root, index) for index in group.members] or [root]:
                actions[indices[path]] = group.action
    return actions

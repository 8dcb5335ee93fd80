# SPDX-License-Identifier: Apache-2.0
"""Rules onto a model, in place, and off again.

Sits on `swap`, `modules` and `rules.resolve`. Everything is decided and checked
before the first module changes, so that an error leaves the model as it was.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from ..errors import RuleError
from ..rules.paths import Path, format_path
from ..rules.resolve import ModuleDecision, ModuleNode, resolve
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from . import swap
from .derive import get_base_class
from .group import Group
from .modules import ModuleEntry, find_modules


def apply[M](model: M, rules: Any, *, on: str | None = None, strict: bool = True) -> M:
    """Make the matched modules of `model` rematerialise, in place.

    Values, gradients, state paths and checkpoints stay as they were; what changes
    is what lives from forward to backward. Applying on top of an earlier `apply`
    adds to it: a module that no rule speaks of keeps its action. Nothing is copied,
    so abstract models (`nnx.eval_shape`) work too.

    Args:
        model: An nnx module, or a pytree of modules.
        rules: `Rules`, a mapping of patterns to actions, the path of a rule file,
            or with `on` a single action.
        on: Pattern for a single action: `apply(model, "nothing_saveable", on="layers.*")`.
        strict: Raise on a rule that matches nothing; else warn.

    Returns:
        `model` itself.

    Raises:
        UnmatchedRuleError: If a rule matches no module that can be called.
        RuleError: If an action cannot be honoured.

    Examples:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
        >>> _ = rt.apply(model, {"layers.*": "nothing_saveable"})
        >>> isinstance(model.layers[0], nnx.Linear)
        True
    """
    entries, decisions = decide(model, rules, on=on, strict=strict)
    plan = _plan_modules(entries, decisions)
    for entry, (action, _) in zip(entries, plan, strict=True):
        if action is not None:
            swap.check_class(type(entry.module), action)
    for entry, (action, groups) in zip(entries, plan, strict=True):
        if (action, groups) != (swap.get_action(entry.module), swap.get_groups(entry.module)):
            swap.swap(entry.module, action, groups)
    return model


type _ModuleAssignment = tuple[Remat | None, tuple[Group, ...]]


def _plan_modules(entries: list[ModuleEntry], decisions: list[ModuleDecision]) -> list[_ModuleAssignment]:
    """What each module is to run under: its own action, and the groups of the sequences it holds."""
    actions: list[Remat | None] = []
    grouped: dict[int, dict[tuple[Path, Remat], list[int]]] = {}
    spoken: set[Path] = set()
    for entry, decision in zip(entries, decisions, strict=True):
        if decision.rule is None:
            actions.append(swap.get_action(entry.module))
            continue
        spoken.update(entry.paths)
        action = decision.action if isinstance(decision.action, Remat) else None
        if action is not None and action.group != 1:
            holder = _find_holder(entries, decision.path)
            _add_to_group(grouped.setdefault(holder, {}), decision.path[len(entries[holder].path) :], action)
            action = None
        actions.append(action)
    return [
        (action, _merge_groups(swap.get_groups(entry.module), grouped.get(index, {}), entry, spoken))
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
    """The new groups, and what is left of the old ones where no rule spoke."""
    kept = []
    for group in before:
        root = (*entry.path, *group.sequence)
        members = tuple(index for index in group.members if (*root, index) not in ruled_paths)
        if members or (not group.members and root not in ruled_paths):
            kept.append(Group(group.sequence, members, group.action))
    made = [Group(sequence, tuple(sorted(members)), action) for (sequence, action), members in new.items()]
    return (*kept, *made)


def _find_holder(entries: list[ModuleEntry], path: Path) -> int:
    """Index of the nearest module above `path` that has code of its own."""
    known = {p: index for index, entry in enumerate(entries) for p in entry.paths if not entry.container}
    for depth in range(len(path) - 1, -1, -1):
        if path[:depth] in known:
            return known[path[:depth]]
    raise RuleError(
        what=f"group was asked for {format_path(path)}, which no module holds.",
        why="the method of the holding module is where a group's code stands.",
        fix="apply the rules to the module that calls the sequence.",
    )


def revert[M](model: M) -> M:
    """Take every action off `model`, in place, and return it; each module gets its own class back."""
    for entry in find_modules(model):
        swap.unswap(entry.module)
    return model


@contextlib.contextmanager
def applied[M](model: M, rules: Any, *, on: str | None = None, strict: bool = True) -> Iterator[M]:
    """`apply` for the length of a `with` block; afterwards the model is exactly as before.

    Args:
        model: As in `apply`.
        rules: As in `apply`.
        on: As in `apply`.
        strict: As in `apply`.

    Yields:
        `model` itself, under the rules.
    """
    before = [(e.module, swap.get_action(e.module), swap.get_groups(e.module)) for e in find_modules(model)]
    apply(model, rules, on=on, strict=strict)
    try:
        yield model
    finally:
        for module, action, groups in before:
            swap.swap(module, action, groups)


def decide(
    model: Any, rules: Any, *, on: str | None = None, strict: bool = True
) -> tuple[list[ModuleEntry], list[ModuleDecision]]:
    """The modules of `model` and the verdict on each; changes nothing."""
    entries = find_modules(model)
    if not entries:
        raise _make_no_model_error(model)
    return entries, resolve(coerce_rules(rules, on), [_make_node(entry) for entry in entries], strict=strict)


def _make_no_model_error(value: Any) -> RuleError:
    if isinstance(value, type):
        return RuleError(
            what=f"{value.__name__} is a class, not a model.",
            why="rules are put on the modules of an instance.",
            fix=f"an instance, or the decorator: @remat(rules=...) class {value.__name__}.",
        )
    called = f"the function {getattr(value, '__name__', '')}" if callable(value) else f"this {type(value).__name__}"
    return RuleError(
        what=f"{called} holds no nnx module.",
        why="rules are put on the modules of a model; a function, a state or an optimizer has none.",
        fix="pass the model itself, or a dict or list of models.",
    )


def coerce_rules(rules: Any, on: str | None) -> Rules:
    """`rules` in any of the accepted forms."""
    if on is not None:
        if isinstance(rules, Rules | dict):
            raise RuleError(
                what=f"`on={on!r}` was given together with rules that have patterns of their own.",
                why="it would be unclear which pattern counts.",
                fix=f'apply(model, "nothing_saveable", on={on!r}) or apply(model, {{{on!r}: "nothing_saveable"}}).',
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
    """Patterns for the children of each sequence of modules that lies in no other sequence."""
    found: dict[str, None] = {}
    for entry in find_modules(model):
        indices = [depth for depth, segment in enumerate(entry.path) if isinstance(segment, int)]
        if len(indices) == 1 and indices[0] == len(entry.path) - 1:
            found[format_path((*entry.path[:-1], "*"))] = None
    return list(found)


def get_active_actions(entries: list[ModuleEntry]) -> list[Remat | None]:
    """The action each module runs under now, its own or its group's."""
    actions = [swap.get_action(entry.module) for entry in entries]
    known = {path: index for index, entry in enumerate(entries) for path in entry.paths}
    for entry in entries:
        for group in swap.get_groups(entry.module):
            root = (*entry.path, *group.sequence)
            for path in [(*root, index) for index in group.members] or [root]:
                actions[known[path]] = group.action
    return actions

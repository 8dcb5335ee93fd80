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
from ..rules.paths import format_path
from ..rules.resolve import Decision, Node, resolve
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from . import swap
from .modules import ModuleEntry, modules_of


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
    actions = [(entry, d.action) for entry, d in zip(entries, decisions, strict=True)]
    for entry, action in actions:
        if isinstance(action, Remat):
            swap.check(type(entry.module), action)
    for entry, action in actions:
        if isinstance(action, Remat):
            swap.swap(entry.module, action)
        elif action is False:
            swap.unswap(entry.module)
    return model


def revert[M](model: M) -> M:
    """Take every action off `model`, in place, and return it; each module gets its own class back."""
    for entry in modules_of(model):
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
    before = [(entry.module, swap.action_of(entry.module)) for entry in modules_of(model)]
    apply(model, rules, on=on, strict=strict)
    try:
        yield model
    finally:
        for module, action in before:
            swap.unswap(module)
            if action is not None:
                swap.swap(module, action)


def decide(
    model: Any, rules: Any, *, on: str | None = None, strict: bool = True
) -> tuple[list[ModuleEntry], list[Decision]]:
    """The modules of `model` and the verdict on each; changes nothing."""
    entries = modules_of(model)
    return entries, resolve(as_rules(rules, on), [_node(entry) for entry in entries], strict=strict)


def as_rules(rules: Any, on: str | None) -> Rules:
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


def _node(entry: ModuleEntry) -> Node:
    methods = frozenset() if entry.container else _methods(swap.base_class(type(entry.module)))
    return Node(paths=tuple(entry.paths), class_names=entry.class_names, methods=methods)


@functools.lru_cache(maxsize=4096)
def _methods(cls: type) -> frozenset[str]:
    return frozenset(swap.methods_of(cls))


def outermost_sequences(model: Any) -> list[str]:
    """Patterns for the children of each sequence of modules that lies in no other sequence."""
    found: dict[str, None] = {}
    for entry in modules_of(model):
        indices = [depth for depth, segment in enumerate(entry.path) if isinstance(segment, int)]
        if len(indices) == 1 and indices[0] == len(entry.path) - 1:
            found[format_path((*entry.path[:-1], "*"))] = None
    return list(found)

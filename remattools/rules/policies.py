# SPDX-License-Identifier: Apache-2.0
"""Policies as values: what a region keeps, combined by `|`, `&` and `~`.

All of JAX's policies under their names. Where JAX's own object does what its name
says, `lower` gives exactly that object, so that the program is the one of
hand-written `jax.checkpoint`; where it does not (`save_anything_except_these_names`
saves everything; `save_from_both_policies` raises on offloading), ours does.

A policy is asked for each operation and answers save, offload or recompute. `|`
keeps what either keeps, saving before offloading; `&` what both keep; `~` keeps
what the other recomputes.
"""

import ast
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ..errors import PolicyError, suggest_names
from .policy_types import (
    AllExceptNames,
    CallablePolicy,
    JaxPolicy,
    LoweredPolicy,
    NamePolicy,
    OffloadDots,
    Policy,
    format_names,
)

_JAX_POLICIES = jax.checkpoint_policies


def _require_strings(values: Iterable[Any], where: str) -> frozenset[str]:
    names = list(values)
    for name in names:
        if not isinstance(name, str):
            raise PolicyError(
                what=f"{where} was given {name!r}.",
                why="names are compared as text; anything else would match nothing.",
                fix=f"{where}('first', 'second').",
            )
    return frozenset(names)


everything_saveable = JaxPolicy("everything_saveable")
nothing_saveable = JaxPolicy("nothing_saveable")
dots_saveable = checkpoint_dots = JaxPolicy("dots_saveable")
dots_with_no_batch_dims_saveable = checkpoint_dots_with_no_batch_dims = JaxPolicy("dots_with_no_batch_dims_saveable")


def save_only_these_names(*names: str) -> Policy:
    """Save only values with these `checkpoint_name`s."""
    return NamePolicy(saved_names=_require_strings(names, "save_only_these_names"))


def save_any_names_but_these(*names: str) -> Policy:
    """Save every named value except these; unnamed ones are recomputed."""
    return AllExceptNames(_require_strings(names, "save_any_names_but_these"), is_named_only=True)


def save_anything_except_these_names(*names: str) -> Policy:
    """Save every value, named or not, except these.

    JAX's policy of this name saves everything since jax#37888.
    """
    return AllExceptNames(_require_strings(names, "save_anything_except_these_names"), is_named_only=False)


def save_from_both_policies(first: Any, second: Any) -> Policy:
    """Keep what either policy keeps; unlike JAX's, also where one offloads."""
    return resolve(first) | resolve(second)


def offload_dot_with_no_batch_dims(offload_src: str = "device", offload_dst: str = "pinned_host") -> Policy:
    """Offload matrix products without batch dimensions to another memory kind."""
    return OffloadDots(offload_src, offload_dst)


def save_and_offload_only_these_names(
    *,
    names_which_can_be_saved: Iterable[str],
    names_which_can_be_offloaded: Iterable[str],
    offload_src: str = "device",
    offload_dst: str = "pinned_host",
) -> Policy:
    """Save some named values, offload others.

    Raises:
        PolicyError: If a name is in both lists.
    """
    saved = _require_strings(names_which_can_be_saved, "names_which_can_be_saved")
    offloaded = _require_strings(names_which_can_be_offloaded, "names_which_can_be_offloaded")
    if saved & offloaded:
        raise PolicyError(
            what=f"{format_names(saved & offloaded)} is to be saved and offloaded.",
            why="a value is kept in one place.",
            fix="name it in one of the two lists.",
        )
    return NamePolicy(saved, offloaded, offload_src, offload_dst)


_POLICIES: dict[str, Policy] = {
    "everything_saveable": everything_saveable,
    "nothing_saveable": nothing_saveable,
    "dots_saveable": dots_saveable,
    "checkpoint_dots": dots_saveable,
    "dots_with_no_batch_dims_saveable": dots_with_no_batch_dims_saveable,
    "checkpoint_dots_with_no_batch_dims": dots_with_no_batch_dims_saveable,
}
_FACTORIES: dict[str, Callable[..., Policy]] = {
    "offload_dot_with_no_batch_dims": offload_dot_with_no_batch_dims,
    "save_anything_except_these_names": save_anything_except_these_names,
    "save_any_names_but_these": save_any_names_but_these,
    "save_only_these_names": save_only_these_names,
    "save_from_both_policies": save_from_both_policies,
    "save_and_offload_only_these_names": save_and_offload_only_these_names,
}


def names() -> tuple[str, ...]:
    """Names of all policies; those that take arguments are functions of this module."""
    return tuple(sorted((*_POLICIES, *_FACTORIES)))


def resolve(value: Any) -> Policy:
    """A policy from its text, from a JAX policy callable, or from itself.

    Raises:
        PolicyError: If there is no such policy.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return parse_policy(value)
    if callable(value):
        for name, policy in _POLICIES.items():
            if getattr(_JAX_POLICIES, name) is value:
                return policy
        if any(value is factory or value is getattr(_JAX_POLICIES, name) for name, factory in _FACTORIES.items()):
            raise _make_no_arguments_error(value.__name__)
        return value.policy if isinstance(value, LoweredPolicy) else CallablePolicy(value)
    raise PolicyError(
        what=f"{value!r} is no policy.",
        why="a region has to know which of its values to keep.",
        fix='the name of a policy such as "dots_saveable", or a callable as jax.checkpoint takes it.',
    )


def _make_no_arguments_error(name: str) -> PolicyError:
    return PolicyError(
        what=f"{name} was given without its arguments.",
        why="it makes a policy, and is none itself: JAX would take its result, a function, for True.",
        fix=f"{name}(...) with the names or memory kinds it is about.",
    )


def parse_policy(text: str) -> Policy:
    """Read `dots_saveable | save_only_these_names('qkv')` and the like; nothing is evaluated.

    Raises:
        PolicyError: If the text is no expression of known policies.
    """
    try:
        return _build_policy(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, PolicyError):
            raise
        raise _make_unreadable_error(text) from None


def _make_unreadable_error(text: str) -> PolicyError:
    return PolicyError(
        what=f"{text!r} is no policy.",
        why="policies are names, combined by |, & and ~, with names of values in quotes.",
        fix="for example: dots_saveable | save_only_these_names('qkv').",
    )


def _build_policy(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _build_policy(node.left, text) | _build_policy(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _build_policy(node.left, text) & _build_policy(node.right, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_build_policy(node.operand, text)
    if isinstance(node, ast.Name):
        if node.id in _POLICIES:
            return _POLICIES[node.id]
        if node.id in _FACTORIES:
            raise _make_no_arguments_error(node.id)
        raise _make_unknown_error(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call_factory(node.func.id, node, text)
    raise _make_unreadable_error(text)


def _call_factory(name: str, node: ast.Call, text: str) -> Policy:
    factory = _FACTORIES.get(name)
    if factory is None:
        raise _make_unreadable_error(text) if name in _POLICIES else _make_unknown_error(name)
    read = _build_policy if name == "save_from_both_policies" else _evaluate_literal
    try:
        return factory(
            *(read(argument, text) for argument in node.args),
            **{keyword.arg: read(keyword.value, text) for keyword in node.keywords if keyword.arg},
        )
    except TypeError as error:
        raise PolicyError(
            what=f"{text!r}: {error}.", why="the policy cannot be made from these arguments.", fix=f"{name}(...)."
        ) from None


def _evaluate_literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _make_unreadable_error(text) from None


def _make_unknown_error(name: str) -> PolicyError:
    return PolicyError(
        what=f"there is no policy {name!r}.",
        why="a misspelt policy would otherwise save nothing, or everything.",
        fix=suggest_names(name, names()),
    )

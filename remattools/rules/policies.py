# SPDX-License-Identifier: Apache-2.0
"""Policies as values: what a region saves, combined by `|`, `&` and `~`.

All of JAX's policies under their names, and `dropout_masks_saveable`. Where JAX's object does what its name says,
`lower` returns exactly that object, so that the program is that of hand-written
`jax.checkpoint`; where it does not (`save_anything_except_these_names` saves
everything; `save_from_both_policies` raises on offloading), ours does.

A policy answers save, offload or recompute for each operation. `|` saves what
either saves, saving before offloading; `&` what both save; `~` saves what the other
recomputes.
"""

import ast
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ..errors import PolicyError, suggest_names
from .policy_types import (
    AllExceptNames,
    CallablePolicy,
    DropoutMasks,
    JaxPolicy,
    LoweredPolicy,
    NamePolicy,
    OffloadDots,
    Policy,
    format_names,
)

# What stands for a policy: an expression, a policy of this package, or a callable as `jax.checkpoint` takes it.
type PolicyLike = str | Policy | Callable[..., Any]

_JAX_POLICIES = jax.checkpoint_policies


def _require_strings(values: Iterable[Any], where: str) -> frozenset[str]:
    names = list(values)
    for name in names:
        if not isinstance(name, str):
            raise PolicyError(
                what=f"{where} was given {name!r}.",
                why="names are compared as strings; anything else would match nothing.",
                fix=f"{where}('first', 'second').",
            )
    return frozenset(names)


everything_saveable = JaxPolicy("everything_saveable")
nothing_saveable = JaxPolicy("nothing_saveable")
dots_saveable = checkpoint_dots = JaxPolicy("dots_saveable")
dots_with_no_batch_dims_saveable = checkpoint_dots_with_no_batch_dims = JaxPolicy("dots_with_no_batch_dims_saveable")
# Not one of JAX's: only the regions of this package know which values are masks.
dropout_masks_saveable = DropoutMasks()


def save_only_these_names(*names: str) -> Policy:
    """Return a policy that saves only values with these `checkpoint_name`s.

    Example:
        >>> from remattools import policies
        >>> str(policies.dots_saveable | policies.save_only_these_names("qkv", "mlp"))
        "dots_saveable | save_only_these_names('mlp', 'qkv')"
    """
    return NamePolicy(saved_names=_require_strings(names, "save_only_these_names"))


def save_any_names_but_these(*names: str) -> Policy:
    """Return a policy that saves every named value except these, and recomputes unnamed ones.

    Example:
        >>> from remattools import policies
        >>> policies.save_any_names_but_these("scores") == policies.resolve("save_any_names_but_these('scores')")
        True
    """
    return AllExceptNames(_require_strings(names, "save_any_names_but_these"), is_named_only=True)


def save_anything_except_these_names(*names: str) -> Policy:
    """Return a policy that saves every value, named or not, except these.

    JAX's policy of this name saves everything since jax#37888.

    Example:
        >>> from remattools import policies
        >>> str(policies.save_anything_except_these_names("scores"))
        "save_anything_except_these_names('scores')"
    """
    return AllExceptNames(_require_strings(names, "save_anything_except_these_names"), is_named_only=False)


def save_from_both_policies(first: PolicyLike, second: PolicyLike) -> Policy:
    """Save what either policy saves; unlike JAX's, also if one offloads.

    Example:
        >>> from remattools import policies
        >>> str(policies.save_from_both_policies("dots_saveable", policies.save_only_these_names("qkv")))
        "dots_saveable | save_only_these_names('qkv')"
    """
    return resolve(first) | resolve(second)


def offload_dot_with_no_batch_dims(offload_src: str = "device", offload_dst: str = "pinned_host") -> Policy:
    """Return a policy that offloads matrix products without batch dimensions.

    Args:
        offload_src: Memory kind to move from.
        offload_dst: Memory kind to move to.

    Example:
        >>> from remattools import policies
        >>> str(policies.offload_dot_with_no_batch_dims())
        "offload_dot_with_no_batch_dims('device', 'pinned_host')"
    """
    return OffloadDots(offload_src, offload_dst)


def save_and_offload_only_these_names(
    *,
    names_which_can_be_saved: Iterable[str],
    names_which_can_be_offloaded: Iterable[str],
    offload_src: str = "device",
    offload_dst: str = "pinned_host",
) -> Policy:
    """Return a policy that saves some named values and offloads others.

    Args:
        names_which_can_be_saved: The `checkpoint_name`s to save on the device.
        names_which_can_be_offloaded: The `checkpoint_name`s to offload.
        offload_src: Memory kind to move from.
        offload_dst: Memory kind to move to.

    Raises:
        PolicyError: If a name is in both lists.

    Example:
        >>> from remattools import policies
        >>> policy = policies.save_and_offload_only_these_names(
        ...     names_which_can_be_saved=["qkv"], names_which_can_be_offloaded=["mlp"]
        ... )
        >>> policy.saved_names, policy.offloaded_names
        (frozenset({'qkv'}), frozenset({'mlp'}))
    """
    saved = _require_strings(names_which_can_be_saved, "names_which_can_be_saved")
    offloaded = _require_strings(names_which_can_be_offloaded, "names_which_can_be_offloaded")
    if saved & offloaded:
        raise PolicyError(
            what=f"{format_names(saved & offloaded)} cannot be both saved and offloaded.",
            why="a value is stored in one place.",
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
    "dropout_masks_saveable": dropout_masks_saveable,
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
    """Return the names of all policies; those that take arguments are functions of this module.

    Example:
        >>> "dots_saveable" in names()
        True
    """
    return tuple(sorted((*_POLICIES, *_FACTORIES)))


def resolve(value: PolicyLike) -> Policy:
    """Return the policy that a value stands for.

    Args:
        value: A `Policy`, an expression such as "dots_saveable | save_only_these_names('qkv')", or a policy callable
            as `jax.checkpoint` takes it.

    Raises:
        PolicyError: If it is none of these, or names an unknown policy.

    Example:
        >>> import jax
        >>> resolve(jax.checkpoint_policies.dots_saveable) == resolve("dots_saveable")
        True
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return parse_policy(value)
    if callable(value):
        for name, policy in _POLICIES.items():
            if getattr(_JAX_POLICIES, name, None) is value:
                return policy
        if any(value is factory or value is getattr(_JAX_POLICIES, name) for name, factory in _FACTORIES.items()):
            raise _make_no_arguments_error(value.__name__)
        return value.policy if isinstance(value, LoweredPolicy) else CallablePolicy(value)
    raise PolicyError(
        what=f"{value!r} is not a policy.",
        why="a region has to know which of its values to save.",
        fix='the name of a policy such as "dots_saveable", or a callable as jax.checkpoint takes it.',
    )


def _make_no_arguments_error(name: str) -> PolicyError:
    return PolicyError(
        what=f"{name} was given without its arguments.",
        why="it returns a policy, but is not one: JAX would treat its result, a function, as True.",
        fix=f"{name}(...) with its names or memory kinds.",
    )


def parse_policy(text: str) -> Policy:
    """Return the policy that an expression stands for; the expression is parsed, not evaluated.

    Args:
        text: Names of policies and calls with literals, combined by |, & and ~.

    Raises:
        PolicyError: If it is not such an expression, or names an unknown policy.

    Example:
        >>> str(parse_policy("dots_saveable | save_only_these_names('qkv')"))
        "dots_saveable | save_only_these_names('qkv')"
    """
    try:
        return _build_policy(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, PolicyError):
            raise
        raise _make_unreadable_error(text) from None


def _make_unreadable_error(text: str) -> PolicyError:
    return PolicyError(
        what=f"{text!r} is not a policy.",
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
            what=f"{text!r}: {error}.", why="the policy cannot be built from these arguments.", fix=f"{name}(...)."
        ) from None


def _evaluate_literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _make_unreadable_error(text) from None


def _make_unknown_error(name: str) -> PolicyError:
    return PolicyError(
        what=f"the policy {name!r} does not exist.",
        why="a misspelt policy would otherwise save nothing, or everything.",
        fix=suggest_names(name, names()),
    )

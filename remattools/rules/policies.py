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
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .. import compat
from ..errors import PolicyError, did_you_mean

_JAX = jax.checkpoint_policies


class Decision(enum.IntEnum):
    """What becomes of one value, the stronger the greater."""

    RECOMPUTE = 0
    OFFLOAD = 1
    SAVE = 2


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies: immutable, hashable, equal by what they do."""

    def decide(self, primitive: Any, *avals: Any, **params: Any) -> Decision:
        """The verdict on one operation.

        Args:
            primitive: The JAX primitive.
            *avals: Abstract values of its operands.
            **params: Its parameters.
        """
        return self._answer(primitive, *avals, **params)[0]

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        raise NotImplementedError  # every policy below says how

    def lower(self) -> Callable[..., Any]:
        """The policy as JAX takes it; equal policies give equal callables, so that JAX's caches hit."""
        return _Lowered(self)

    @property
    def needs_lowering_to_names(self) -> bool:
        """Whether jax_remat3 would not ask it: that knows JAX's own policies over names and matrix products only."""
        return True

    def __or__(self, other: "Policy") -> "Policy":
        return _combined(Union, self, other)

    def __and__(self, other: "Policy") -> "Policy":
        return _combined(Intersection, self, other)

    def __invert__(self) -> "Policy":
        return self.policy if isinstance(self, Complement) else Complement(self)


@functools.cache
def _jax_policy(factory: str, args: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """A policy made by JAX, one object for equal arguments: JAX's caches compare policies."""
    policy: Callable[..., Any] = getattr(_JAX, factory)(*args, **dict(keywords))
    return policy


@dataclasses.dataclass(frozen=True)
class _Lowered:
    """A policy with JAX's calling convention."""

    policy: Policy

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        decision, kinds = self.policy._answer(primitive, *avals, **params)
        if decision is Decision.SAVE:
            return compat.SAVEABLE
        return compat.RECOMPUTE if kinds is None else compat.offloadable(*kinds)


def _translated(answer: Any) -> tuple[Decision, tuple[str, str] | None]:
    """A JAX policy's answer: a bool or one of JAX's classes."""
    kinds = compat.offload_of(answer)
    if kinds is not None:
        return Decision.OFFLOAD, kinds
    return (Decision.SAVE if answer is True or answer is compat.SAVEABLE else Decision.RECOMPUTE), None


@dataclasses.dataclass(frozen=True)
class Named(Policy):
    """One of JAX's policies without arguments.

    Attributes:
        name: Its name in `jax.checkpoint_policies`.
    """

    name: str

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return _translated(self.lower()(primitive, *avals, **params))

    def lower(self) -> Callable[..., Any]:
        """JAX's own object."""
        policy: Callable[..., Any] = getattr(_JAX, self.name)
        return policy

    @property
    def needs_lowering_to_names(self) -> bool:
        """False: JAX handles its own under jax_remat3 too."""
        return False

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Names(Policy):
    """Saves and offloads values by their `checkpoint_name`.

    Attributes:
        saved: Names to keep on the device.
        offloaded: Names to keep in host memory.
        src: Memory kind on the device.
        dst: Memory kind of the host.
    """

    saved: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    src: str = "device"
    dst: str = "pinned_host"

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        name = params.get("name") if primitive is compat.NAME_PRIMITIVE else None
        if name in self.saved:
            return Decision.SAVE, None
        return (Decision.OFFLOAD, (self.src, self.dst)) if name in self.offloaded else (Decision.RECOMPUTE, None)

    def lower(self) -> Callable[..., Any]:
        """What JAX's factory makes of it."""
        if not self.offloaded:
            return _jax_policy("save_only_these_names", tuple(sorted(self.saved)), ())
        keywords = (
            ("names_which_can_be_saved", tuple(sorted(self.saved))),
            ("names_which_can_be_offloaded", tuple(sorted(self.offloaded))),
            ("offload_src", self.src),
            ("offload_dst", self.dst),
        )
        return _jax_policy("save_and_offload_only_these_names", (), keywords)

    @property
    def needs_lowering_to_names(self) -> bool:
        """False: it is about names."""
        return False

    def __str__(self) -> str:
        if not self.offloaded:
            return f"save_only_these_names({_listed(self.saved)})"
        return (
            f"save_and_offload_only_these_names(names_which_can_be_saved=[{_listed(self.saved)}], "
            f"names_which_can_be_offloaded=[{_listed(self.offloaded)}], "
            f"offload_src={self.src!r}, offload_dst={self.dst!r})"
        )


@dataclasses.dataclass(frozen=True)
class AllBut(Policy):
    """Saves everything except the values of some names.

    Attributes:
        names: The exceptions.
        named_only: Save only named values, as `save_any_names_but_these` does.
    """

    names: frozenset[str]
    named_only: bool

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        if primitive is compat.NAME_PRIMITIVE:
            return (Decision.RECOMPUTE if params["name"] in self.names else Decision.SAVE), None
        return (Decision.RECOMPUTE if self.named_only else Decision.SAVE), None

    def lower(self) -> Callable[..., Any]:
        """What JAX's factory makes of it, if that does what its name says."""
        if self.named_only:
            return _jax_policy("save_any_names_but_these", tuple(sorted(self.names)), ())
        return super().lower()

    @property
    def needs_lowering_to_names(self) -> bool:
        """Whether unnamed values count too."""
        return not self.named_only

    def __str__(self) -> str:
        kind = "save_any_names_but_these" if self.named_only else "save_anything_except_these_names"
        return f"{kind}({_listed(self.names)})"


@dataclasses.dataclass(frozen=True)
class OffloadDots(Policy):
    """Offloads matrix products without batch dimensions.

    Attributes:
        src: Memory kind on the device.
        dst: Memory kind of the host.
    """

    src: str = "device"
    dst: str = "pinned_host"

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        if _JAX.dots_with_no_batch_dims_saveable(primitive, *avals, **params):
            return Decision.OFFLOAD, (self.src, self.dst)
        return Decision.RECOMPUTE, None

    def lower(self) -> Callable[..., Any]:
        """What JAX's factory makes of it."""
        return _jax_policy("offload_dot_with_no_batch_dims", (self.src, self.dst), ())

    @property
    def needs_lowering_to_names(self) -> bool:
        """False: it is about matrix products."""
        return False

    def __str__(self) -> str:
        return f"offload_dot_with_no_batch_dims({self.src!r}, {self.dst!r})"


@dataclasses.dataclass(frozen=True)
class Bare(Policy):
    """A policy callable of the user, compared by identity; it has no text.

    Attributes:
        function: Called as JAX calls a policy.
    """

    function: Callable[..., Any]

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return _translated(self.function(primitive, *avals, **params))

    def lower(self) -> Callable[..., Any]:
        """The callable itself."""
        return self.function

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


@dataclasses.dataclass(frozen=True)
class Union(Policy):
    """Keeps what any of its parts keeps; saving wins over offloading."""

    parts: tuple[Policy, ...]

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return max((part._answer(primitive, *avals, **params) for part in self.parts), key=_strength)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclasses.dataclass(frozen=True)
class Intersection(Policy):
    """Keeps what all of its parts keep; offloading wins over saving."""

    parts: tuple[Policy, ...]

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return min((part._answer(primitive, *avals, **params) for part in self.parts), key=_strength)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Union) else str(part) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Complement(Policy):
    """Saves what another recomputes, recomputes what the other saves or offloads."""

    policy: Policy

    def _answer(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        kept = self.policy._answer(primitive, *avals, **params)[0] is not Decision.RECOMPUTE
        return (Decision.RECOMPUTE if kept else Decision.SAVE), None

    def __str__(self) -> str:
        inner = str(self.policy)
        return f"~({inner})" if isinstance(self.policy, Union | Intersection) else f"~{inner}"


def _strength(answer: tuple[Decision, Any]) -> int:
    return answer[0]


def _combined(kind: type[Union] | type[Intersection], first: Policy, second: Policy) -> Policy:
    if not isinstance(second, Policy):
        return NotImplemented
    parts: list[Policy] = []
    for policy in (first, second):
        parts += policy.parts if isinstance(policy, kind) else [policy]
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _texts(values: Iterable[Any], where: str) -> frozenset[str]:
    names = list(values)
    for name in names:
        if not isinstance(name, str):
            raise PolicyError(
                what=f"{where} was given {name!r}.",
                why="names are compared as text; anything else would match nothing.",
                fix=f"{where}('first', 'second').",
            )
    return frozenset(names)


everything_saveable = Named("everything_saveable")
nothing_saveable = Named("nothing_saveable")
dots_saveable = checkpoint_dots = Named("dots_saveable")
dots_with_no_batch_dims_saveable = checkpoint_dots_with_no_batch_dims = Named("dots_with_no_batch_dims_saveable")


def save_only_these_names(*names: str) -> Policy:
    """Save only values with these `checkpoint_name`s."""
    return Names(saved=_texts(names, "save_only_these_names"))


def save_any_names_but_these(*names: str) -> Policy:
    """Save every named value except these; unnamed ones are recomputed."""
    return AllBut(_texts(names, "save_any_names_but_these"), named_only=True)


def save_anything_except_these_names(*names: str) -> Policy:
    """Save every value, named or not, except these.

    JAX's policy of this name saves everything since jax#37888.
    """
    return AllBut(_texts(names, "save_anything_except_these_names"), named_only=False)


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
    saved = _texts(names_which_can_be_saved, "names_which_can_be_saved")
    offloaded = _texts(names_which_can_be_offloaded, "names_which_can_be_offloaded")
    if saved & offloaded:
        raise PolicyError(
            what=f"{_listed(saved & offloaded)} is to be saved and offloaded.",
            why="a value is kept in one place.",
            fix="name it in one of the two lists.",
        )
    return Names(saved, offloaded, offload_src, offload_dst)


_VALUES: dict[str, Policy] = {
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
    return tuple(sorted((*_VALUES, *_FACTORIES)))


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
        for name, policy in _VALUES.items():
            if getattr(_JAX, name) is value:
                return policy
        if any(value is factory or value is getattr(_JAX, name) for name, factory in _FACTORIES.items()):
            raise _no_arguments(value.__name__)
        return value.policy if isinstance(value, _Lowered) else Bare(value)
    raise PolicyError(
        what=f"{value!r} is no policy.",
        why="a region has to know which of its values to keep.",
        fix='the name of a policy such as "dots_saveable", or a callable as jax.checkpoint takes it.',
    )


def _no_arguments(name: str) -> PolicyError:
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
        return _built(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, PolicyError):
            raise
        raise _unreadable(text) from None


def _unreadable(text: str) -> PolicyError:
    return PolicyError(
        what=f"{text!r} is no policy.",
        why="policies are names, combined by |, & and ~, with names of values in quotes.",
        fix="for example: dots_saveable | save_only_these_names('qkv').",
    )


def _built(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _built(node.left, text) | _built(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _built(node.left, text) & _built(node.right, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_built(node.operand, text)
    if isinstance(node, ast.Name):
        if node.id in _VALUES:
            return _VALUES[node.id]
        if node.id in _FACTORIES:
            raise _no_arguments(node.id)
        raise _unknown(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(node.func.id, node, text)
    raise _unreadable(text)


def _called(name: str, node: ast.Call, text: str) -> Policy:
    factory = _FACTORIES.get(name)
    if factory is None:
        raise _unreadable(text) if name in _VALUES else _unknown(name)
    read = _built if name == "save_from_both_policies" else _literal
    try:
        return factory(
            *(read(argument, text) for argument in node.args),
            **{keyword.arg: read(keyword.value, text) for keyword in node.keywords if keyword.arg},
        )
    except TypeError as error:
        raise PolicyError(
            what=f"{text!r}: {error}.", why="the policy cannot be made from these arguments.", fix=f"{name}(...)."
        ) from None


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _unreadable(text) from None


def _unknown(name: str) -> PolicyError:
    return PolicyError(
        what=f"there is no policy {name!r}.",
        why="a misspelt policy would otherwise save nothing, or everything.",
        fix=did_you_mean(name, names()),
    )

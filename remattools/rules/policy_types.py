# SPDX-License-Identifier: Apache-2.0
"""Types of policies: values that decide for each operation whether its result is saved, offloaded or recomputed.

`policies` has their names and parses expressions of them. `lower` returns JAX's own
object wherever that does what its name says, so that the program equals that of a
hand-written `jax.checkpoint`.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .. import compat

_JAX_POLICIES = jax.checkpoint_policies
# The `checkpoint_name` that regions put on dropout masks for a policy that saves them.
DROPOUT_MASK = "remattools:dropout_mask"


class Decision(enum.IntEnum):
    """What happens to one value; the greater, the more is saved on the device."""

    RECOMPUTE = 0
    OFFLOAD = 1
    SAVE = 2


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies: immutable and hashable; equal if they were built from equal parts."""

    def decide(self, primitive: Any, *avals: Any, **params: Any) -> Decision:
        """Return the decision on one operation.

        Args:
            primitive: The JAX primitive.
            *avals: Abstract values of its operands.
            **params: Its parameters.
        """
        return self._classify(primitive, *avals, **params)[0]

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        raise NotImplementedError

    def lower(self) -> Callable[..., Any]:
        """Return the policy as JAX takes it; equal policies return equal callables, so that JAX's caches hit."""
        return LoweredPolicy(self)

    @property
    def is_lowered_to_names(self) -> bool:
        """Whether jax_remat3 ignores it: that supports JAX's own policies over names and matrix products only."""
        return True

    @property
    def has_dropout_masks(self) -> bool:
        """Whether it decides on dropout masks, which regions then name."""
        return False

    def __or__(self, other: "Policy") -> "Policy":
        return _combine(Union, self, other)

    def __and__(self, other: "Policy") -> "Policy":
        return _combine(Intersection, self, other)

    def __invert__(self) -> "Policy":
        return self.policy if isinstance(self, Complement) else Complement(self)


@functools.cache
def _make_jax_policy(factory: str, args: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Return a policy made by JAX, the same object for equal arguments: JAX's caches compare policies."""
    policy: Callable[..., Any] = getattr(_JAX_POLICIES, factory)(*args, **dict(keywords))
    return policy


@dataclasses.dataclass(frozen=True)
class LoweredPolicy:
    """A policy with JAX's calling convention."""

    policy: Policy

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        """Return what JAX's own policies return: a bool, or an instance of a private class."""
        decision, kinds = self.policy._classify(primitive, *avals, **params)
        if decision is Decision.SAVE:
            return compat.SAVEABLE
        return compat.RECOMPUTE if kinds is None else compat.make_offloadable(*kinds)


def _parse_decision(decision: Any) -> tuple[Decision, tuple[str, str] | None]:
    """Return a JAX policy's answer, a bool or an instance of a private class, with the memory kinds of an offload."""
    kinds = compat.parse_offload(decision)
    if kinds is not None:
        return Decision.OFFLOAD, kinds
    return (Decision.SAVE if decision is True or decision is compat.SAVEABLE else Decision.RECOMPUTE), None


@dataclasses.dataclass(frozen=True)
class JaxPolicy(Policy):
    """One of JAX's policies without arguments.

    Attributes:
        name: Its name in `jax.checkpoint_policies`.
    """

    name: str

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return _parse_decision(self.lower()(primitive, *avals, **params))

    def lower(self) -> Callable[..., Any]:
        """Return JAX's own object."""
        policy: Callable[..., Any] = getattr(_JAX_POLICIES, self.name)
        return policy

    @property
    def is_lowered_to_names(self) -> bool:
        """False, as jax_remat3 supports JAX's own policies."""
        return False

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class NamePolicy(Policy):
    """Saves and offloads values by their `checkpoint_name`.

    Attributes:
        saved_names: Names of values to save on the device.
        offloaded_names: Names of values to offload to host memory.
        src: Memory kind on the device.
        dst: Memory kind of the host.
    """

    saved_names: frozenset[str] = frozenset()
    offloaded_names: frozenset[str] = frozenset()
    src: str = "device"
    dst: str = "pinned_host"

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        name = params.get("name") if primitive is compat.NAME_PRIMITIVE else None
        if name in self.saved_names:
            return Decision.SAVE, None
        return (Decision.OFFLOAD, (self.src, self.dst)) if name in self.offloaded_names else (Decision.RECOMPUTE, None)

    def lower(self) -> Callable[..., Any]:
        """Return the policy that JAX's factory makes."""
        if not self.offloaded_names:
            return _make_jax_policy("save_only_these_names", tuple(sorted(self.saved_names)), ())
        keywords = (
            ("names_which_can_be_saved", tuple(sorted(self.saved_names))),
            ("names_which_can_be_offloaded", tuple(sorted(self.offloaded_names))),
            ("offload_src", self.src),
            ("offload_dst", self.dst),
        )
        return _make_jax_policy("save_and_offload_only_these_names", (), keywords)

    @property
    def is_lowered_to_names(self) -> bool:
        """False, as jax_remat3 supports policies over names."""
        return False

    def __str__(self) -> str:
        if not self.offloaded_names:
            return f"save_only_these_names({format_names(self.saved_names)})"
        return (
            f"save_and_offload_only_these_names(names_which_can_be_saved=[{format_names(self.saved_names)}], "
            f"names_which_can_be_offloaded=[{format_names(self.offloaded_names)}], "
            f"offload_src={self.src!r}, offload_dst={self.dst!r})"
        )


@dataclasses.dataclass(frozen=True)
class DropoutMasks(Policy):
    """Saves the masks that are computed from random bits; the regions of this package find and name them."""

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        is_mask = primitive is compat.NAME_PRIMITIVE and params["name"] == DROPOUT_MASK
        return (Decision.SAVE if is_mask else Decision.RECOMPUTE), None

    def lower(self) -> Callable[..., Any]:
        """Return JAX's policy over the name of the masks."""
        return _make_jax_policy("save_only_these_names", (DROPOUT_MASK,), ())

    @property
    def is_lowered_to_names(self) -> bool:
        """False, as jax_remat3 supports policies over names."""
        return False

    @property
    def has_dropout_masks(self) -> bool:
        """True."""
        return True

    def __str__(self) -> str:
        return "dropout_masks_saveable"


@dataclasses.dataclass(frozen=True)
class AllExceptNames(Policy):
    """Saves everything except the values of some names.

    Attributes:
        names: The exceptions.
        is_named_only: Save only named values, as `save_any_names_but_these` does.
    """

    names: frozenset[str]
    is_named_only: bool

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        if primitive is compat.NAME_PRIMITIVE:
            return (Decision.RECOMPUTE if params["name"] in self.names else Decision.SAVE), None
        return (Decision.RECOMPUTE if self.is_named_only else Decision.SAVE), None

    def lower(self) -> Callable[..., Any]:
        """Return the policy that JAX's factory makes, if that does what its name says."""
        if self.is_named_only:
            return _make_jax_policy("save_any_names_but_these", tuple(sorted(self.names)), ())
        return super().lower()

    @property
    def is_lowered_to_names(self) -> bool:
        """True if unnamed values are saved too."""
        return not self.is_named_only

    def __str__(self) -> str:
        kind = "save_any_names_but_these" if self.is_named_only else "save_anything_except_these_names"
        return f"{kind}({format_names(self.names)})"


@dataclasses.dataclass(frozen=True)
class OffloadDots(Policy):
    """Offloads matrix products without batch dimensions.

    Attributes:
        src: Memory kind on the device.
        dst: Memory kind of the host.
    """

    src: str = "device"
    dst: str = "pinned_host"

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        if _JAX_POLICIES.dots_with_no_batch_dims_saveable(primitive, *avals, **params):
            return Decision.OFFLOAD, (self.src, self.dst)
        return Decision.RECOMPUTE, None

    def lower(self) -> Callable[..., Any]:
        """Return the policy that JAX's factory makes."""
        return _make_jax_policy("offload_dot_with_no_batch_dims", (self.src, self.dst), ())

    @property
    def is_lowered_to_names(self) -> bool:
        """False, as jax_remat3 supports policies over matrix products."""
        return False

    def __str__(self) -> str:
        return f"offload_dot_with_no_batch_dims({self.src!r}, {self.dst!r})"


@dataclasses.dataclass(frozen=True)
class CallablePolicy(Policy):
    """A policy callable of the user, compared by identity; it cannot be written to a file.

    Attributes:
        function: Called as JAX calls a policy.
    """

    function: Callable[..., Any]

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return _parse_decision(self.function(primitive, *avals, **params))

    def lower(self) -> Callable[..., Any]:
        """Return the callable itself."""
        return self.function

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


@dataclasses.dataclass(frozen=True)
class Union(Policy):
    """Saves or offloads what any of its parts does; saving wins over offloading."""

    parts: tuple[Policy, ...]

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return max((part._classify(primitive, *avals, **params) for part in self.parts), key=_get_strength)

    @property
    def has_dropout_masks(self) -> bool:
        """Whether one of its parts decides on dropout masks."""
        return any(part.has_dropout_masks for part in self.parts)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclasses.dataclass(frozen=True)
class Intersection(Policy):
    """Saves or offloads what all of its parts do; offloading wins over saving."""

    parts: tuple[Policy, ...]

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        return min((part._classify(primitive, *avals, **params) for part in self.parts), key=_get_strength)

    @property
    def has_dropout_masks(self) -> bool:
        """Whether one of its parts decides on dropout masks."""
        return any(part.has_dropout_masks for part in self.parts)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Union) else str(part) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Complement(Policy):
    """Saves what another policy recomputes, and recomputes what that policy saves or offloads."""

    policy: Policy

    def _classify(self, primitive: Any, *avals: Any, **params: Any) -> tuple[Decision, tuple[str, str] | None]:
        is_recomputed = self.policy._classify(primitive, *avals, **params)[0] is Decision.RECOMPUTE
        return (Decision.SAVE if is_recomputed else Decision.RECOMPUTE), None

    @property
    def has_dropout_masks(self) -> bool:
        """Whether the other policy decides on dropout masks."""
        return self.policy.has_dropout_masks

    def __str__(self) -> str:
        inner = str(self.policy)
        return f"~({inner})" if isinstance(self.policy, Union | Intersection) else f"~{inner}"


def _get_strength(decision: tuple[Decision, Any]) -> int:
    return decision[0]


def _combine(kind: type[Union] | type[Intersection], first: Policy, second: Policy) -> Policy:
    if not isinstance(second, Policy):
        return NotImplemented
    parts: list[Policy] = []
    for policy in (first, second):
        parts += policy.parts if isinstance(policy, kind) else [policy]
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def format_names(names: Iterable[str]) -> str:
    """Return names as the arguments of a call, sorted."""
    return ", ".join(map(repr, sorted(names)))

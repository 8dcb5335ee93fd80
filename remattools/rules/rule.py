# SPDX-License-Identifier: Apache-2.0
"""Actions: what a region saves, offloads and recomputes.

Pure values, validated when they are built, so that every existing one is valid.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ..errors import RuleError
from .paths import NamePattern
from .policies import PolicyLike, everything_saveable, resolve
from .policy_types import Policy
from .tile import Tile

# Not Iterable[str]: a lone string is one, and type checkers should refuse it as the constructor does.
type Names = tuple[str, ...] | list[str]


@dataclasses.dataclass(frozen=True, init=False)
class Remat:
    """What a region saves, offloads and recomputes.

    With neither a policy nor names, only the region's inputs are saved. Every argument is an attribute of the same
    name; there, `policy` is a `Policy` or None, and names are tuples.

    Args:
        policy: An expression such as "dots_saveable | save_only_these_names('qkv')", a `Policy`, a policy callable as
            `jax.checkpoint` takes it, or None.
        save: Patterns over the names inside the region to save on the device: `"attn.qkv"` (the output of a
            submodule), `"mlp:dot_general"` (the result of an operation in it), `"@name"` (a `checkpoint_name`).
        offload: Patterns over the same names, to offload to host memory.
        every_n: Select every n-th module of a sequence; an int, at least 1.
        offset: Index of the first module that `every_n` selects; an int below `every_n`.
        group: How many consecutive modules of a sequence share one region; an int of at least 1, or "sqrt" for about
            the square root of the sequence's length.
        nested: Whether each module of a group is a region of its own inside the group's. Then the backward pass holds
            the inputs of one group's modules and what one module recomputes, rather than what the whole group
            recomputes, for one more forward pass. What `save` and `offload` name is stored once, by both.
        methods: Names of the methods that become regions.
        prevent_cse: As in `jax.checkpoint`; False only inside a scan.
        tile: Compute the region's largest values in pieces; also written `Remat(...) & Tile(...)`. With the policy
            "everything_saveable" nothing else is recomputed: that is what a `Tile` alone means as an action.

    Raises:
        PolicyError: If `policy` does not stand for a policy.
        PatternError: If a pattern in `save` or `offload` has a syntax error.
        RuleError: If another argument is invalid, or a name is both saved and offloaded.

    Example:
        >>> Remat(save=["attn.qkv"], every_n=2)
        Remat(save=('attn.qkv',), every_n=2)
        >>> import jax
        >>> Remat("dots_saveable") == Remat(jax.checkpoint_policies.dots_saveable)
        True
    """

    policy: Policy | None = None
    _: dataclasses.KW_ONLY
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    every_n: int = 1
    offset: int = 0
    group: int | Literal["sqrt"] = 1
    nested: bool = False
    methods: tuple[str, ...] = ("__call__",)
    prevent_cse: bool = True
    tile: Tile | None = None

    # Not the generated one: it would take the types of the attributes, which are narrower.
    def __init__(
        self,
        policy: PolicyLike | None = None,
        *,
        save: Names = (),
        offload: Names = (),
        every_n: int = 1,
        offset: int = 0,
        group: int | Literal["sqrt"] = 1,
        nested: bool = False,
        methods: Names = ("__call__",),
        prevent_cse: bool = True,
        tile: Tile | None = None,
    ) -> None:
        values = {
            "policy": None if policy is None else resolve(policy),
            "save": _require_strings("save", save),
            "offload": _require_strings("offload", offload),
            "every_n": every_n,
            "offset": offset,
            "group": group,
            "nested": nested,
            "methods": _require_strings("methods", methods),
            "prevent_cse": prevent_cse,
            "tile": tile,
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)
        self._check_names()
        self._check_counts()
        self._check_methods()
        self._check_tile()

    @property
    def is_tile_alone(self) -> bool:
        """Whether nothing is recomputed but what is computed in pieces."""
        return self.tile is not None and self.policy == everything_saveable

    def __and__(self, other: Any) -> "Remat":
        if not isinstance(other, Tile):
            return NotImplemented
        return dataclasses.replace(self, tile=other)

    __rand__ = __and__

    def _check_tile(self) -> None:
        if self.tile is not None and not isinstance(self.tile, Tile):
            raise RuleError(
                what=f"tile={self.tile!r} is not a Tile.", why="it says into how many pieces.", fix="Tile(8), or None."
            )
        if self.tile is not None and self.group != 1:
            raise RuleError(
                what=f"tile={self.tile!r} with group={self.group!r} is not possible.",
                why="a group's region is several modules, and what is computed in pieces lies in one.",
                fix='name the modules inside in a rule of their own, such as {"layers.*": Remat(group=4), '
                '"layers.*.attn": Tile()}.',
            )

    def _check_names(self) -> None:
        for name in (*self.save, *self.offload):
            NamePattern.parse(name)
        both = set(self.save) & set(self.offload)
        if both:
            raise RuleError(
                what=f"{sorted(both)[0]!r} cannot be both saved and offloaded.",
                why="a value is stored in one place.",
                fix="name it in save= or in offload=.",
            )

    def _check_methods(self) -> None:
        for name in self.methods:
            if not name.isidentifier():
                raise RuleError(what=f"{name!r} is not a method name.", why="regions are methods.", fix='"__call__".')
        if not self.methods:
            raise RuleError(what="methods is empty.", why="no call would become a region.", fix='("__call__",).')
        if type(self.prevent_cse) is not bool:
            raise RuleError(
                what=f"prevent_cse={self.prevent_cse!r} is not a bool.",
                why="it decides whether the compiler may merge the recomputation with the first computation.",
                fix="True, or False for a region inside a scan.",
            )

    def _check_counts(self) -> None:
        # bool is an int in Python, so every_n=True would otherwise mean 1.
        if type(self.every_n) is not int or self.every_n < 1:
            raise RuleError(
                what=f"every_n={self.every_n!r} is not a count.",
                why="every n-th module of a sequence is selected.",
                fix="an int of 1 or more; to exclude a module, use False as its action.",
            )
        if type(self.offset) is not int or not 0 <= self.offset < self.every_n:
            raise RuleError(
                what=f"offset={self.offset!r} lies outside of every_n={self.every_n}.",
                why="modules with index % every_n == offset are taken, so none would be.",
                fix=f"an int from 0 to {self.every_n - 1}.",
            )
        if self.group != "sqrt" and (type(self.group) is not int or self.group < 1):
            raise RuleError(
                what=f"group={self.group!r} is not a number of modules.",
                why="that many consecutive modules share one region.",
                fix='an int of 1 or more, or "sqrt".',
            )
        if type(self.nested) is not bool or (self.nested and self.group == 1):
            raise RuleError(
                what=f"nested={self.nested!r} with group={self.group!r} does not nest regions.",
                why="nested=True puts a region into the region of a group, for each of its modules.",
                fix='Remat(group="sqrt", nested=True).',
            )

    def __repr__(self) -> str:
        parts = [] if self.policy is None else [f"policy={str(self.policy)!r}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("policy", "_", "tile") and value != field.default:
                parts.append(f"{field.name}={value!r}")
        if self.is_tile_alone and len(parts) == 1:
            return repr(self.tile)
        return f"Remat({', '.join(parts)})" + ("" if self.tile is None else f" & {self.tile!r}")


def _require_strings(field: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise RuleError(
            what=f"{field}={value!r} is not a sequence of strings.",
            why="a lone string would be read character by character.",
            fix=f"{field}=({value!r},)." if isinstance(value, str) else f"{field}=(...).",
        )
    strings = tuple(value)
    for text in strings:
        if not isinstance(text, str):
            raise RuleError(what=f"{text!r} in {field} is not a string.", why="names are strings.", fix="quote it.")
    return strings


# False excludes a module.
Action = Remat | Literal[False]


def coerce_action(value: Any) -> Action:
    """Return an action from a policy (name, value or callable), a `Remat`, a `Tile`, or False.

    Raises:
        RuleError: If it is none of these.
        PolicyError: If it does not name a policy.
    """
    if value is False or isinstance(value, Remat):
        return value
    if isinstance(value, Tile):
        return Remat(everything_saveable, tile=value)
    if isinstance(value, bool) or value is None:
        raise RuleError(
            what=f"{value!r} is not an action.",
            why="it does not say what to save.",
            fix='"nothing_saveable", Remat(save=(...)), or False to take a module out.',
        )
    return Remat(policy=value)

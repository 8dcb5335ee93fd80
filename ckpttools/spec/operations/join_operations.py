# SPDX-License-Identifier: Apache-2.0
"""Operations that make one array from several, or several from one."""

import dataclasses

from .operation import (
    Operation,
    find_wildcards,
    make_field_error,
    make_wildcard_error,
    require_axis,
    require_flag,
    require_joined,
    require_new_name,
    simplify,
)


@dataclasses.dataclass(frozen=True)
class Stack(Operation):
    """Stack stored arrays of equal shape along a new axis: layers of an unrolled model become those of a scan.

    The last wildcard of `pattern` lists the arrays, in the order of their numbers or of the alternatives in braces.

    Attributes:
        pattern: The names on disk, such as "model.layers.*".
        new: The name in the state, with every wildcard but the last.
        axis: The new axis in the stacked array.

    Examples:
        >>> Stack("model.layers.*", "model.layers")
        Stack(pattern='model.layers.*', new='model.layers', axis=0)
    """

    new: str
    axis: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_joined(self, self.new, self.axis, "model.layers.*", "model.layers")


@dataclasses.dataclass(frozen=True)
class Unstack(Operation):
    """Unstack stored arrays along an axis, which disappears: layers of a scan become those of an unrolled model.

    Attributes:
        pattern: The names on disk, such as "model.layers".
        new: The names in the state; its last wildcard stands for the position along the axis.
        axis: The axis of the stored array.

    Examples:
        >>> Unstack("model.layers", "model.layers.*")
        Unstack(pattern='model.layers', new='model.layers.*', axis=0)
    """

    new: str
    axis: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_new_name(self, self.new, self.new)
        old, new = find_wildcards(self.pattern), find_wildcards(self.new)
        if simplify(old) != new[:-1] or new[-1:] != ["*"]:
            raise make_wildcard_error(self, self.new, "the last * on the right is the position", "a.b", "a.*.b")
        require_axis(self, self.axis)


@dataclasses.dataclass(frozen=True)
class Merge(Operation):
    """Merge stored arrays along an existing axis: separate query, key and value become one array.

    The last wildcard of `pattern` lists the arrays, in the order of their numbers or of the alternatives in braces.

    Attributes:
        pattern: The names on disk, such as "model.layers.*.{q,k,v}".
        new: The name in the state, with every wildcard but the last.
        axis: The axis along which they are merged; -1 for the last.
        interleaved: Whether their entries alternate along the axis.

    Examples:
        >>> Merge("model.{q,k,v}", "model.qkv").axis
        -1
    """

    new: str
    axis: int = -1
    interleaved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_joined(self, self.new, self.axis, "model.{q,k,v}", "model.qkv")
        require_flag(self, self.interleaved)


@dataclasses.dataclass(frozen=True)
class Split(Operation):
    """Split stored arrays along an axis: one fused array becomes query, key and value.

    Attributes:
        pattern: The names on disk, such as "model.layers.*.qkv".
        new: The names in the state; the alternatives in its last braces name the pieces in their order.
        axis: The axis along which they are split; -1 for the last.
        sizes: Sizes of the pieces along the axis; () for equal pieces.
        interleaved: Whether the entries of the pieces alternate along the axis.

    Examples:
        >>> Split("model.layers.*.qkv", "model.layers.*.{q,k,v}").piece_names
        ('q', 'k', 'v')
    """

    new: str
    axis: int = -1
    sizes: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        wildcards = find_wildcards(self.new) if isinstance(self.new, str) else []
        names = wildcards[-1][1:-1].split(",") if wildcards and wildcards[-1].startswith("{") else []
        if (
            len(names) < 2
            or not all(names)
            or "*" in "".join(names)
            or simplify(find_wildcards(self.pattern)) != (wildcards[:-1])
        ):
            raise make_wildcard_error(
                self, self.new, "the last braces on the right name the pieces", "a.qkv", "a.{q,k,v}"
            )
        require_new_name(self, self.new, self.new.replace(wildcards[-1], names[0]))
        require_axis(self, self.axis)
        require_flag(self, self.interleaved)
        legal = isinstance(self.sizes, tuple) and all(type(size) is int and size > 0 for size in self.sizes)
        if not legal or (self.sizes and (len(self.sizes) != len(names) or self.interleaved)):
            why = f"sizes holds a positive int for each of {len(names)} pieces; interleaved pieces are equal."
            fix = f"{self.pattern!r}, {self.new!r}, sizes={(8,) * len(names)}"
            raise make_field_error(self, f"{self.new!r}, sizes={self.sizes!r}", why, fix)

    @property
    def piece_names(self) -> tuple[str, ...]:
        """Return the alternatives that name the pieces."""
        return tuple(find_wildcards(self.new)[-1][1:-1].split(","))


type Join = Stack | Merge
"""Operations that make one array from several."""

# SPDX-License-Identifier: Apache-2.0
"""Operations of surgery: what must happen to stored leaves so that they fit another model, as frozen values.

Pure: values and strings. Names begin with the item, as errors and reports show them: `model.layers.0.kernel`. A pattern
(the language of remattools' rules) matches a leaf, or a part of the state with everything below it. The operations are
applied in order, each to the names that the previous one produced. The room `surgery` applies them.
"""

import dataclasses
import re
from typing import Any, Literal

from remattools.errors import PatternError
from remattools.rules.paths import Pattern

from ..errors import SpecError, suggest_names

WILDCARD = re.compile(r"\*\*|\*|\{[^{}]*\}|^\[[^\]]*\]$")
"""The wildcards in one segment of a pattern."""

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Base of all operations; `pattern` says what it applies to."""

    pattern: str

    def __post_init__(self) -> None:
        kind = type(self).__name__
        try:
            Pattern.parse(self.pattern)
        except PatternError as error:
            raise SpecError(what=f"ct.{kind}({self.pattern!r}): {error.what}", why=error.why, fix=error.fix) from error
        if ":" in re.sub(r"\[[^\]]*\]", "", self.pattern):
            raise SpecError(
                what=f"ct.{kind}({self.pattern!r}) contains a class.",
                why="leaves on disk have names; their classes are not stored.",
                fix=f"ct.{kind}({self.pattern.partition(':')[0] or '**'!r})",
            )


@dataclasses.dataclass(frozen=True)
class Rename(Operation):
    """Rename stored leaves.

    Each wildcard of `new` (`*`, `**`) stands for what the wildcard at the same position in `pattern` matched; braces
    and slices in `pattern` count as `*`. A pattern without a dot matches that one name at any depth, and only that name
    changes.

    Attributes:
        pattern: The names on disk, such as "model.blocks.*.attn".
        new: Their names in the state, such as "model.layers.*.attention".

    Examples:
        >>> Rename("encoder", "backbone")      # in the model and in the optimizer's copies of it
        Rename(pattern='encoder', new='backbone')
    """

    new: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_same_wildcards(self, self.new)


@dataclasses.dataclass(frozen=True)
class Drop(Operation):
    """Drop stored leaves that the state does not have; they are not read.

    Examples:
        >>> Drop("model.decoder")
        Drop(pattern='model.decoder')
    """


@dataclasses.dataclass(frozen=True)
class Reinit(Operation):
    """Keep the values of leaves of the state; stored leaves with their names are not read.

    Examples:
        >>> Reinit("{lora_a,lora_b}")          # additions that no checkpoint has
        Reinit(pattern='{lora_a,lora_b}')
    """


@dataclasses.dataclass(frozen=True)
class Cast(Operation):
    """Allow one cast: leaves of `from_dtype` become `to_dtype`; leaves of any other dtype stay as they are.

    A value that the new dtype cannot hold (a fraction as an int, an int that a float would round, a finite number as
    infinity) is an error. Floats are rounded.

    Attributes:
        from_dtype: The dtype on disk.
        to_dtype: The dtype in the state.

    Examples:
        >>> Cast("model", "float32", "bfloat16")
        Cast(pattern='model', from_dtype='float32', to_dtype='bfloat16')
    """

    from_dtype: str
    to_dtype: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for dtype in (self.from_dtype, self.to_dtype):
            if dtype not in DTYPES:
                raise SpecError(
                    what=f"ct.Cast({self.pattern!r}, {self.from_dtype!r}, {self.to_dtype!r}): unknown dtype {dtype!r}.",
                    why="a cast is allowed from one dtype to one other, each by its name.",
                    fix=suggest_names(str(dtype), DTYPES) or f'ct.Cast({self.pattern!r}, "float32", "bfloat16")',
                )


@dataclasses.dataclass(frozen=True)
class Pad(Operation):
    """Pad stored arrays that are smaller than those of the state along some axes, such as an embedding of fewer words.

    Attributes:
        fill: Values of the rest: a number, or "template" for those of the state. Typed random keys are always filled
            with those of the state: keys of one number would all draw the same values.
        start: Where the stored block begins, for each axis; 0 for axes not given.

    Examples:
        >>> Pad("embedding")
        Pad(pattern='embedding', fill='template', start=())
    """

    fill: float | Literal["template"] = "template"
    start: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill != "template" and (isinstance(self.fill, bool) or not isinstance(self.fill, int | float)):
            raise SpecError(
                what=f"ct.Pad({self.pattern!r}, fill={self.fill!r}) cannot be honoured.",
                why='fill is a number, or "template" for the values of the state.',
                fix=f"ct.Pad({self.pattern!r}, fill=0.0)",
            )
        _require_start(self, self.start)


@dataclasses.dataclass(frozen=True)
class Slice(Operation):
    """Slice stored arrays that are larger than those of the state along some axes: take a block of them.

    Attributes:
        start: Where the block begins in the stored array, for each axis; 0 for axes not given.

    Examples:
        >>> Slice("embedding", start=(100,))
        Slice(pattern='embedding', start=(100,))
    """

    start: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_start(self, self.start)


@dataclasses.dataclass(frozen=True)
class Copy(Operation):
    """Copy stored leaves to a second name, for example for an untied head or an average of the weights.

    Attributes:
        pattern: The names on disk.
        new: The second names; wildcards as in `Rename`.

    Examples:
        >>> Copy("model.**", "ema.**")
        Copy(pattern='model.**', new='ema.**')
    """

    new: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_same_wildcards(self, self.new)


@dataclasses.dataclass(frozen=True)
class Transpose(Operation):
    """Permute the axes of stored arrays, such as a kernel that is stored as (out, in).

    Attributes:
        axes: The stored axes in their new order, as in `numpy.transpose`; () reverses them.

    Examples:
        >>> Transpose("model.layers.*.kernel")
        Transpose(pattern='model.layers.*.kernel', axes=())
    """

    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = isinstance(self.axes, tuple) and all(type(axis) is int for axis in self.axes)
        if not legal or sorted(self.axes) != list(range(len(self.axes))):
            raise SpecError(
                what=f"ct.Transpose({self.pattern!r}, axes={self.axes!r}) cannot be honoured.",
                why="axes is a tuple that contains each axis of the array once.",
                fix=f"ct.Transpose({self.pattern!r}, axes=(0, 2, 1))",
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
        _require_joined(self, self.new, self.axis, "model.layers.*", "model.layers")


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
        _require_new_name(self, self.new, self.new)
        old, new = find_wildcards(self.pattern), find_wildcards(self.new)
        if _simplify(old) != new[:-1] or new[-1:] != ["*"]:
            raise _make_wildcard_error(self, self.new, "the last * on the right is the position", "a.b", "a.*.b")
        _require_axis(self, self.axis)


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
        _require_joined(self, self.new, self.axis, "model.{q,k,v}", "model.qkv")
        _require_flag(self, self.interleaved)


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
            or _simplify(find_wildcards(self.pattern)) != (wildcards[:-1])
        ):
            raise _make_wildcard_error(
                self, self.new, "the last braces on the right name the pieces", "a.qkv", "a.{q,k,v}"
            )
        _require_new_name(self, self.new, self.new.replace(wildcards[-1], names[0]))
        _require_axis(self, self.axis)
        _require_flag(self, self.interleaved)
        legal = isinstance(self.sizes, tuple) and all(type(size) is int and size > 0 for size in self.sizes)
        if not legal or (self.sizes and (len(self.sizes) != len(names) or self.interleaved)):
            raise SpecError(
                what=f"ct.Split({self.pattern!r}, {self.new!r}, sizes={self.sizes!r}) cannot be honoured.",
                why=f"sizes holds a positive int for each of {len(names)} pieces; interleaved pieces are equal.",
                fix=f"ct.Split({self.pattern!r}, {self.new!r}, sizes={(8,) * len(names)})",
            )

    @property
    def piece_names(self) -> tuple[str, ...]:
        """Return the alternatives that name the pieces."""
        return tuple(find_wildcards(self.new)[-1][1:-1].split(","))


type Join = Stack | Merge
"""Operations that make one array from several."""

OPERATIONS: dict[str, type[Operation]] = {
    "rename": Rename,
    "copy": Copy,
    "drop": Drop,
    "reinit": Reinit,
    "cast": Cast,
    "pad": Pad,
    "slice": Slice,
    "transpose": Transpose,
    "stack": Stack,
    "unstack": Unstack,
    "merge": Merge,
    "split": Split,
}
"""Operations by their names in files."""


def as_code(operation: Operation) -> str:
    """Return an operation as Python code: `ct.Rename("a", "b")`."""
    shown = []
    for field in dataclasses.fields(operation):
        value: Any = getattr(operation, field.name)
        if field.default is dataclasses.MISSING:
            shown.append(_quote(value))
        elif value != field.default:
            shown.append(f"{field.name}={_quote(value)}")
    return f"ct.{type(operation).__name__}({', '.join(shown)})"


def find_wildcards(pattern: str) -> list[str]:
    """Return the wildcards of a pattern, in order."""
    return [found for segment in split_segments(pattern) for found in WILDCARD.findall(segment)]


def split_segments(pattern: str) -> list[str]:
    """Split a pattern into segments; a dot inside braces does not separate."""
    return re.findall(r"(?:[^.{}]|\{[^{}]*\})+", pattern)


def _quote(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and '"' not in value else repr(value)


def _count_wildcards(wildcards: list[str]) -> str:
    return " ".join(wildcards) or "no wildcard"


def _simplify(wildcards: list[str]) -> list[str]:
    """Return wildcards with braces and slices as "*"."""
    return ["**" if each == "**" else "*" for each in wildcards]


def _make_wildcard_error(operation: Operation, new: object, rule: str, old_example: str, example: str) -> SpecError:
    kind = type(operation).__name__
    return SpecError(
        what=f"ct.{kind}({operation.pattern!r}, {new!r}) has wildcards that do not correspond.",
        why=f"{rule}; every other wildcard stands for what the wildcard at its position on the left matched.",
        fix=f'ct.{kind}("{old_example}", "{example}")',
    )


def _require_new_name(operation: Operation, new: object, name: object) -> None:
    """Raise `SpecError` unless `name` is a valid new name; `new` is the field as given."""
    kind = type(operation).__name__
    pieces = name.split(".") if isinstance(name, str) else [""]
    if not all(pieces) or any(set(piece.replace("**", "")) & set("[]{}: \t\n") for piece in pieces):
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has no valid new name.",
            why="the new name consists of segments between dots, in which only * and ** are wildcards.",
            fix=f'ct.{kind}({operation.pattern!r}, "model.new_name")',
        )
    if re.search(r"\{[^{}]*\{", operation.pattern):
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has braces inside braces.",
            why="each pair of braces is one wildcard on the right, so they cannot be nested.",
            fix=f"use several ct.{kind}, one for each alternative.",
        )


def _require_same_wildcards(operation: Operation, new: str) -> None:
    _require_new_name(operation, new, new)
    old, found = find_wildcards(operation.pattern), find_wildcards(new)
    if _simplify(old) != found:
        kind = type(operation).__name__
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has {_count_wildcards(old)}, {_count_wildcards(found)}.",
            why="each * and ** on the right stands for what the wildcard at its position on the left matched.",
            fix="write the same wildcards on both sides, in the same order.",
        )


def _require_joined(operation: Operation, new: str, axis: object, old_example: str, example: str) -> None:
    _require_new_name(operation, new, new)
    old = _simplify(find_wildcards(operation.pattern))
    if old[:-1] != find_wildcards(new) or old[-1:] != ["*"]:
        raise _make_wildcard_error(operation, new, "the last * on the left lists the arrays", old_example, example)
    _require_axis(operation, axis)


def _require_axis(operation: Operation, axis: object) -> None:
    if type(axis) is not int:
        kind = type(operation).__name__
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, axis={axis!r}) cannot be honoured.",
            why="an axis is an int; negative values count from the last axis.",
            fix=f"ct.{kind}(..., axis=0)",
        )


def _require_flag(operation: Operation, interleaved: object) -> None:
    if type(interleaved) is not bool:
        kind = type(operation).__name__
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, interleaved={interleaved!r}) cannot be honoured.",
            why="interleaved is True or False.",
            fix=f"ct.{kind}(..., interleaved=True)",
        )


def _require_start(operation: Operation, start: object) -> None:
    legal = isinstance(start, tuple) and all(type(size) is int and size >= 0 for size in start)
    if not legal:
        kind = type(operation).__name__
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, start={start!r}) cannot be honoured.",
            why="start is a tuple of ints, each 0 or more: one for each axis, from the first.",
            fix=f"ct.{kind}({operation.pattern!r}, start=(0, 0))",
        )

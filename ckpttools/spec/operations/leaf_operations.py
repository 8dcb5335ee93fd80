# SPDX-License-Identifier: Apache-2.0
"""Operations on leaves one by one: their names, whether they are read, their dtype, size and axes."""

import dataclasses
from typing import Literal

from ...errors import SpecError, suggest_names
from .operation import Operation, make_field_error, require_same_wildcards, require_start

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
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
        require_same_wildcards(self, self.new)


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
            why = 'fill is a number, or "template" for the values of the state.'
            raise make_field_error(self, f"fill={self.fill!r}", why, f"{self.pattern!r}, fill=0.0")
        require_start(self, self.start)


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
        require_start(self, self.start)


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
        require_same_wildcards(self, self.new)


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
            why = "axes is a tuple that contains each axis of the array once."
            raise make_field_error(self, f"axes={self.axes!r}", why, f"{self.pattern!r}, axes=(0, 2, 1)")

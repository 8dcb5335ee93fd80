# SPDX-License-Identifier: Apache-2.0
"""A compiled program as data: computations, instructions in the order they run, and the size of every value.

Pure text processing of what `compiled.as_text()` prints. Three facts shaped it: the text is scheduled, so the order of
the lines is the order of execution; a type shows the layout, with the tiles that pad it and the memory it lies in; and
every line may name the traced operation it comes from (`op_name`).
"""

import dataclasses
import math
import re

# Bits, because there are types of four bits. A token has no bytes.
_BITS = {
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_INTEGER = re.compile(r"-?\d+")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
# "/*index=5*/" between the items of a long tuple.
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
        dtype: XLA's name, such as `bf16`.
        shape: Length of each axis, on one device.
        bytes: Size in memory with the padding of its layout.
        memory_space: 0 for the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    memory_space: int = 0

    @property
    def device_bytes(self) -> int:
        """Bytes in the device's main memory."""
        return 0 if self.memory_space else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# A tuple's type is a tuple of types.
Type = Array | tuple["Type", ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Its name.
        opcode: What it does, such as `fusion`.
        type: Type of its result.
        operands: Names of the instructions it reads; for a parameter or a constant, none.
        attributes: The rest of the line.
        number: For a parameter, its number.
        is_root: Whether it is the computation's result.
        value: For an integer constant, its value.
    """

    name: str
    opcode: str
    type: Type
    operands: tuple[str, ...]
    attributes: str
    number: int
    is_root: bool
    value: int | None = None

    @property
    def op_name(self) -> str:
        """The traced operation with the scopes around it; "" if the compiler made it up."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def find_called(self, *keys: str) -> list[str]:
        """Return the names of the computations under these attributes, such as `calls` or `body`."""
        names: list[str] = []
        for key in keys:
            found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
            if found:
                names += [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]
        return names


@dataclasses.dataclass(frozen=True, eq=False)
class HloProgram:
    """A compiled program.

    Attributes:
        computations: Instructions of each computation, in the order they run, by name.
        entry: Name of the computation that runs first.
        header: The first line.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    header: str = ""


def parse_program(hlo: str) -> HloProgram:
    """Parse a compiled program.

    Args:
        hlo: What `compiled.as_text()` prints.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header is not None:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found = _LINE.match(line)
            if found is not None:
                current.append(_parse_instruction(found[2], found[3], is_root=bool(found[1])))
    return HloProgram({name: tuple(found) for name, found in computations.items()}, entry, hlo.partition("\n")[0])


def list_arrays(kind: Type) -> list[Array]:
    """Return the arrays of a type in order."""
    return [kind] if isinstance(kind, Array) else [array for part in kind for array in list_arrays(part)]


def _parse_instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    rest = _COMMENT.sub("", rest)
    kind, end = _parse_type(rest, 0)
    opcode, _, rest = rest[end:].strip().partition("(")
    inside, attributes = _split_at_close(rest)
    integer = int(inside) if _INTEGER.fullmatch(inside) else None
    number = integer if opcode == "parameter" and integer is not None else -1
    value = integer if opcode == "constant" else None
    operands = () if opcode == "constant" else tuple(_OPERAND.findall(inside))
    return Instruction(name, opcode, kind, operands, attributes, number, is_root, value)


def _split_at_close(text: str) -> tuple[str, str]:
    """Split after the bracket that closes the one before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def _parse_type(text: str, start: int) -> tuple[Type, int]:
    """Return the type that begins at `start`, and where it ends."""
    if text[start] == "(":
        parts: list[Type] = []
        place = start + 1
        while text[place] != ")":
            part, place = _parse_type(text, place)
            parts.append(part)
            while text[place] in ", ":
                place += 1
        return tuple(parts), place + 1
    found = _ARRAY.match(text, start)
    if found is None:  # a type that holds no array, such as `token[]` in another form
        end = start
        while end < len(text) and text[end] not in ",) ":
            end += 1
        return Array("opaque", (), 0), max(end, start + 1)
    return _make_array(found[1], found[2], found[3] or ""), found.end()


def _make_array(dtype: str, dims: str, layout: str) -> Array:
    shape = tuple(int(length.lstrip("<=")) for length in dims.split(",") if length)
    order, _, rest = layout.partition(":")
    space = _MEMORY_SPACE.search(rest)
    physical = [shape[int(axis)] for axis in reversed([axis for axis in order.split(",") if axis.isdigit()])]
    physical = physical if len(physical) == len(shape) else list(shape)
    tile = _TILE.search(rest)
    if tile is not None:
        lengths = [int(length) for length in tile[1].split(",")]
        physical = [1] * (len(lengths) - len(physical)) + physical
        for place, length in enumerate(reversed(lengths), 1):
            physical[-place] = -(-physical[-place] // length) * length
    bits = _BITS.get(dtype, 8 if dtype.startswith("f8") else 32)
    return Array(dtype, shape, -(-math.prod(physical) * bits // 8), int(space[1]) if space else 0)

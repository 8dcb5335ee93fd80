# SPDX-License-Identifier: Apache-2.0
"""The buffers that are live at the fullest moment of a compiled program, from its scheduled text.

Sits on `program`. The instructions are walked in the order they run: a buffer is live from the instruction that
makes it to the last one that reads it, or a view of it. Arguments, constants and the program's results are not
temporaries and do not count. Facts of XLA that the walk follows:

-   bitcasts, tuples, loops, conditionals and the second halves of asynchronous operations make no buffer: their results
    are their operands' buffers; an update in place (`dynamic-update-slice`, `scatter`) writes into its first operand.
-   an element-wise operation may write its result over an operand of the same type that nothing reads afterwards.
-   a loop's body writes its results into the buffers that the loop carries; only what it needs beyond them counts.
-   memory spaces other than 0 are not the device's main memory.

What it does not see is how the compiler lays buffers beside each other (fragmentation), so `Measurement` states the
difference to the compiler's own total.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from .program import Array, HloProgram, Instruction, Type

# Results are the operands' buffers.
_VIEWS = frozenset({"bitcast", "optimization-barrier", "opt-barrier", "add-dependency", "domain", "while"})
# The first operand's buffer is written in place.
_IN_PLACE = frozenset({"dynamic-update-slice", "scatter"})
# May write over an operand of the same type.
_ELEMENT_WISE = frozenset(
    """
    abs add and atan2 bitcast-convert cbrt ceil clamp compare complex convert cosine count-leading-zeros divide erf
    exponential exponential-minus-one floor imag is-finite log log-plus-one logistic map maximum minimum multiply
    negate not or popcnt power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt select
    shift-left shift-right-arithmetic shift-right-logical sign sine sqrt subtract tan tanh xor copy all-reduce
    """.split()  # noqa: SIM905 (one name a line would be fifty lines)
)
# Under which attributes an operation has the computations that it runs.
_CALLERS = {
    "while": ("body", "condition"),
    "call": ("to_apply",),
    "async-start": ("calls",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}
_INDEX = re.compile(r"\bindex=(\d+)")
_ALIASING = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")
_ALIASED_RESULT = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """One buffer of a compiled program; compares by identity.

    Attributes:
        array: Its type.
        instruction: What makes it.
    """

    array: Array
    instruction: Instruction

    @property
    def bytes(self) -> int:
        """Bytes in the device's main memory."""
        return self.array.device_bytes


# The buffers of a result, in the structure of its type.
_Value = Buffer | tuple["_Value", ...]


def find_live_buffers(program: HloProgram) -> list[Buffer]:
    """Return the temporaries that are live when a program needs most memory, largest first.

    Args:
        program: A scheduled program.
    """
    live = _LivenessWalk(program).find_peak(program.entry)[1]
    return sorted((buffer for buffer in live if buffer.bytes), key=lambda buffer: -buffer.bytes)


class _LivenessWalk:
    """Liveness of a program's computations; one that is called twice is walked once."""

    def __init__(self, program: HloProgram) -> None:
        self.program = program
        self.peaks: dict[str, tuple[int, list[Buffer]]] = {}
        self.overwritable: dict[str, frozenset[int]] = {}
        self.updates: dict[str, dict[int, int]] = {}
        # For each computation, by numbers of results: the parameter, and the number of its array, that the result is.
        self.passed_on: dict[str, dict[int, tuple[int, int]]] = {}

    def find_peak(self, name: str) -> tuple[int, list[Buffer]]:
        """Return bytes and buffers at the peak of a computation, its arguments and results apart."""
        if name not in self.peaks:
            self.peaks[name] = (0, [])  # HLO has no recursion
            self.peaks[name] = self._walk(name, self.program.computations.get(name, ()))
        return self.peaks[name]

    def _walk(self, name: str, instructions: tuple[Instruction, ...]) -> tuple[int, list[Buffer]]:
        values: dict[str, _Value] = {}
        operands: list[list[_Value]] = []
        made: list[list[Buffer]] = []
        last_reads: dict[Buffer, int] = {}
        for number, instruction in enumerate(instructions):
            operands.append([values[operand] for operand in instruction.operands if operand in values])
            value, fresh = self._evaluate(instruction, operands[-1])
            values[instruction.name] = value
            made.append([] if instruction.opcode in ("parameter", "constant") else fresh)
            last_reads.update((buffer, number) for buffer in _list_buffers((value, *operands[-1])))
        root = next((values[one.name] for one in instructions if one.is_root), ())
        results = set(_list_buffers(root))
        arguments = {
            buffer: (one.number, place)
            for one in instructions
            if one.opcode == "parameter"
            for place, buffer in enumerate(_list_buffers(values[one.name]))
        }
        self.passed_on[name] = {n: arguments[one] for n, one in enumerate(_list_buffers(root)) if one in arguments}
        ranges = {
            buffer: (number, last_reads[buffer])
            for number, fresh in enumerate(made)
            for buffer in fresh
            if buffer not in results
        }
        overwritten = [
            set(self._find_overwritten(one, operands[number], made[number], ranges, number))
            for number, one in enumerate(instructions)
        ]
        if name == self.program.entry:
            donated = {int(number.split(",")[0] or 0) for number, _, _ in _ALIASED_RESULT.findall(self.program.header)}
            own = {buffer for number, buffer in enumerate(_list_buffers(root)) if number not in donated}
            births = {buffer: number for number, fresh in enumerate(made) for buffer in fresh if buffer in own}
            for buffer in self._find_inside_results(ranges, births):
                del ranges[buffer]
        starts, ends = [list[Buffer]() for _ in instructions], [list[Buffer]() for _ in instructions]
        for buffer, (start, end) in ranges.items():
            starts[start].append(buffer)
            ends[end].append(buffer)
        live: dict[Buffer, None] = {}
        total, best = 0, (0, list[Buffer]())
        for number, instruction in enumerate(instructions):
            leaving = overwritten[number].intersection(live)
            for buffer in leaving:
                del live[buffer]
            live.update(dict.fromkeys(starts[number]))
            total += sum(buffer.bytes for buffer in starts[number]) - sum(buffer.bytes for buffer in leaving)
            inner_bytes, inner = self._find_inner_peak(instruction)
            if total + inner_bytes > best[0]:
                best = (total + inner_bytes, [*live, *inner])
            gone = [buffer for buffer in ends[number] if buffer in live]
            for buffer in gone:
                del live[buffer]
            total -= sum(buffer.bytes for buffer in gone)
        return best

    def _find_inside_results(
        self, ranges: dict[Buffer, tuple[int, int]], births: dict[Buffer, int]
    ) -> Iterator[Buffer]:
        """Yield temporaries that lie in the memory of a result that is not computed yet, larger ones first."""
        hosts = sorted(births, key=lambda buffer: buffer.bytes)
        occupied: dict[Buffer, list[tuple[int, int]]] = {buffer: [] for buffer in hosts}
        for buffer in sorted(ranges, key=lambda one: -one.bytes):
            start, end = ranges[buffer]
            for host in hosts:
                is_large_enough = host.bytes >= buffer.bytes > 0 and end < births[host]
                if is_large_enough and all(end < other or start > last for other, last in occupied[host]):
                    occupied[host].append((start, end))
                    yield buffer
                    break

    def _evaluate(self, instruction: Instruction, operands: list[_Value]) -> tuple[_Value, list[Buffer]]:
        """Return the buffers of an instruction's result, and those among them that it makes."""
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(operands), []
        if opcode == "get-tuple-element" and operands and isinstance(operands[0], tuple):
            index = int(_INDEX.findall(instruction.attributes)[0])
            if index < len(operands[0]):
                return operands[0][index], []
        if operands and opcode in _VIEWS | _IN_PLACE:
            return operands[0], []
        if opcode.endswith("-done") and operands:
            return _find_done(opcode, operands[0]), []
        value = _make_value(instruction.type, instruction)
        if opcode.endswith("-start") and isinstance(value, tuple) and len(value) > 1 and operands:
            started: _Value = operands[0] if isinstance(value[0], Buffer) else tuple(operands)
            value = (value[0], started, *value[2:]) if opcode == "copy-start" else (started, *value[1:])
            given = set(_list_buffers(started))
            return value, [buffer for buffer in _list_buffers(value) if buffer not in given]
        made = _list_buffers(value)
        reused = dict(self._find_reused(instruction, operands))
        if not reused:
            return value, made
        aliases = {made[index]: buffer for index, buffer in reused.items() if index < len(made)}
        return _replace(value, aliases), [buffer for buffer in made if buffer not in aliases]

    def _find_reused(self, instruction: Instruction, operands: list[_Value]) -> Iterator[tuple[int, Buffer]]:
        """Yield numbers of results that are written into a buffer of an operand, with that buffer."""
        written = _ALIASING.search(instruction.attributes)
        if written is not None:
            for result, operand, inner in _ALIASED_RESULT.findall(written[1]):
                buffers = _list_buffers(operands[int(operand)]) if int(operand) < len(operands) else []
                number = int(inner.split(",")[0] or 0) if inner.strip() else 0
                if number < len(buffers):
                    yield int(result.split(",")[0]) if result.strip() else 0, buffers[number]
        elif instruction.opcode == "call":
            for name in instruction.find_called("to_apply"):
                self.find_peak(name)
                for result, (parameter, place) in self.passed_on[name].items():
                    yield result, _list_buffers(operands[parameter])[place]
        elif instruction.opcode == "fusion":
            for name in instruction.find_called("calls"):
                for index, parameter in self._find_updates(name).items():
                    if parameter < len(operands) and isinstance(operands[parameter], Buffer):
                        yield index, operands[parameter]  # type: ignore[misc]  # narrowed above

    def _find_updates(self, name: str) -> dict[int, int]:
        """Return for each result of a fusion that updates a parameter in place the number of that parameter."""
        if name not in self.updates:
            inside = {one.name: one for one in self.program.computations.get(name, ())}
            root = next((one for one in inside.values() if one.is_root), None)
            results = [] if root is None else [root.name]
            if root is not None and root.opcode == "tuple":
                results = list(root.operands)
            found: dict[int, int] = {}
            for index, result in enumerate(results):
                one, is_update = inside.get(result), False
                while one is not None and one.operands and (one.opcode in _IN_PLACE or one.opcode == "bitcast"):
                    is_update |= one.opcode in _IN_PLACE
                    one = inside.get(one.operands[0])
                if is_update and one is not None and one.opcode == "parameter":
                    found[index] = one.number
            self.updates[name] = found
        return self.updates[name]

    def _find_overwritten(
        self,
        instruction: Instruction,
        operands: list[_Value],
        fresh: list[Buffer],
        ranges: dict[Buffer, tuple[int, int]],
        now: int,
    ) -> Iterator[Buffer]:
        """Yield buffers that an element-wise operation writes its results over, since nothing reads them later."""
        if instruction.opcode not in _ELEMENT_WISE and instruction.opcode != "fusion":
            return
        numbers = range(len(operands))
        if instruction.opcode == "fusion":
            numbers = sorted(self._find_overwritable(instruction.find_called("calls")[0]))  # type: ignore[assignment]
        candidates = dict.fromkeys(operands[number] for number in numbers if number < len(operands))
        free = [one for one in candidates if isinstance(one, Buffer) and one in ranges and ranges[one][1] == now]
        for buffer in fresh:
            same = next((one for one in free if one.array == buffer.array), None)
            if same is not None:
                free.remove(same)
                yield same

    def _find_overwritable(self, name: str) -> frozenset[int]:
        """Return the parameters of a fusion of which each element is read only for the same element of a result."""
        if name not in self.overwritable:
            instructions = self.program.computations.get(name, ())
            found = set()
            for parameter in instructions:
                if parameter.opcode == "parameter" and isinstance(parameter.type, Array):
                    size, reached = math.prod(parameter.type.shape), {parameter.name}
                    if all(_is_element_wise(one, size) for one in _find_readers(instructions, reached)):
                        found.add(parameter.number)
            self.overwritable[name] = frozenset(found)
        return self.overwritable[name]

    def _find_inner_peak(self, instruction: Instruction) -> tuple[int, list[Buffer]]:
        """Return what the computations that an instruction runs need beyond its operands and results."""
        if instruction.opcode not in _CALLERS:
            return 0, []
        called = instruction.find_called(*_CALLERS[instruction.opcode])
        return max((self.find_peak(name) for name in called), key=lambda peak: peak[0], default=(0, []))


def _find_readers(instructions: Iterable[Instruction], reached: set[str]) -> Iterator[Instruction]:
    """Yield all instructions that depend on those in `reached`, which grows."""
    for one in instructions:
        if not reached.isdisjoint(one.operands):
            reached.add(one.name)
            yield one


def _is_element_wise(instruction: Instruction, size: int) -> bool:
    if instruction.opcode == "tuple":
        return True
    kind = instruction.type
    return (
        instruction.opcode in _ELEMENT_WISE | {"bitcast"} and isinstance(kind, Array) and math.prod(kind.shape) == size
    )


def _make_value(kind: Type, instruction: Instruction) -> _Value:
    if isinstance(kind, Array):
        return Buffer(kind, instruction)
    return tuple(_make_value(part, instruction) for part in kind)


def _find_done(opcode: str, started: _Value) -> _Value:
    """Return the result of an asynchronous operation from what its first half returned."""
    if isinstance(started, Buffer):
        return started
    if opcode in ("copy-done", "recv-done", "all-reduce-done") or len(started) == 1:
        return started if opcode == "all-reduce-done" else started[0]
    return started[1]


def _list_buffers(value: _Value) -> list[Buffer]:
    return [value] if isinstance(value, Buffer) else [buffer for part in value for buffer in _list_buffers(part)]


def _replace(value: _Value, new: dict[Buffer, Buffer]) -> _Value:
    return new.get(value, value) if isinstance(value, Buffer) else tuple(_replace(part, new) for part in value)

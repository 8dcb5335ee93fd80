# SPDX-License-Identifier: Apache-2.0
"""Count the cycles that the TPU compiler estimates for a program.

Sits on `program`. The TPU compiler writes `estimated_cycles` on each operation it schedules. A loop's body appears in
the program once, so its cycles are multiplied by the trip count. If the compiler does not write the trip count, it is
read from the loop's condition (a counter compared with a constant, as JAX lowers a scan).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from .program import HloProgram, Instruction

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Where the compiler has no estimate it writes the largest integer, or adds 2^60 to a part of one. No operation takes
# that many cycles: these are more than ten days.
_SENTINEL = 2**50
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_LESS = re.compile(r"\bdirection=LT\b")
_CALLED = "calls", "to_apply", "body", "condition", "true_computation", "false_computation"


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of a program.

    Attributes:
        total: Sum over all operations, loop bodies times their trip counts.
        unknown_loops: Names of the loops whose trip count cannot be read; their bodies count once.
        unknown_operations: Names of the operations for which the compiler has no estimate. With any of them, the
            program's cycles are unknown, and `total` is the sum of the others.
    """

    total: int
    unknown_loops: tuple[str, ...]
    unknown_operations: tuple[str, ...] = ()


def estimate_cycles(program: HloProgram) -> Cycles | None:
    """Return the compiler's estimate, or None if it gives none (all targets except TPU).

    Args:
        program: The compiled program.
    """
    instructions = [one for body in program.computations.values() for one in body]
    if not any(_CYCLES.search(one.attributes) for one in instructions):
        return None
    unknown_loops: list[str] = []
    unknown_operations: list[str] = []
    memo: dict[str, int] = {}

    def count_cycles(name: str) -> int:
        if name not in memo:
            memo[name] = 0  # HLO has no recursion
            computation = program.computations.get(name, ())
            memo[name] = sum(count_instruction_cycles(one, computation) for one in computation)
        return memo[name]

    def count_instruction_cycles(one: Instruction, computation: Iterable[Instruction]) -> int:
        estimates = [int(estimate) for estimate in _CYCLES.findall(one.attributes)]
        cycles = sum(estimate for estimate in estimates if estimate < _SENTINEL)
        if any(estimate >= _SENTINEL for estimate in estimates):
            unknown_operations.append(one.name)
        called = sum(map(count_cycles, one.find_called(*_CALLED)))
        if one.opcode == "while":
            trips = _infer_trip_count(one, _by_name(computation), program)
            if trips is None:
                unknown_loops.append(one.name)
            return cycles + (1 if trips is None else trips) * called
        return cycles + called + max(map(count_cycles, one.find_called("branch_computations")), default=0)

    return Cycles(count_cycles(program.entry), tuple(unknown_loops), tuple(unknown_operations))


type _Instructions = Mapping[str, Instruction]


def _by_name(computation: Iterable[Instruction]) -> _Instructions:
    return {one.name: one for one in computation}


def _infer_trip_count(loop: Instruction, caller: _Instructions, program: HloProgram) -> int | None:
    written = _TRIPS.search(loop.attributes)
    if written is not None:
        return int(written[1])
    (condition,), (body,) = (
        [program.computations.get(name, ()) for name in loop.find_called(key)] for key in ("condition", "body")
    )
    tests = _by_name(condition)
    compared = _find_root(condition)
    if compared is None or compared.opcode != "compare" or not _LESS.search(compared.attributes):
        return None
    counter, limit = tests.get(compared.operands[0]), _find_constant(tests, compared.operands[1])
    index = _INDEX.search(counter.attributes) if counter is not None else None
    if limit is None or index is None:
        return None
    start = _find_constant(caller, _find_part(caller.get(loop.operands[0]), int(index[1])))
    step = _find_increment(body, int(index[1]))
    return None if start is None or not step else max(-(-(limit - start) // step), 0)


def _find_root(computation: Iterable[Instruction]) -> Instruction | None:
    return next((one for one in computation if one.is_root), None)


def _find_part(made: Instruction | None, index: int) -> str:
    """Return the name of a part of a tuple that one instruction makes; "" if it makes none."""
    is_tuple = made is not None and made.opcode == "tuple" and index < len(made.operands)
    return made.operands[index] if made is not None and is_tuple else ""


def _find_constant(instructions: _Instructions, name: str) -> int | None:
    one = instructions.get(name)
    if one is not None and one.opcode in ("copy", "bitcast"):
        return _find_constant(instructions, one.operands[0])
    return one.value if one is not None and one.opcode == "constant" else None


def _find_increment(body: Iterable[Instruction], index: int) -> int | None:
    """Return what one iteration adds to the counter."""
    instructions = _by_name(body)
    added = instructions.get(_find_part(_find_root(body), index))
    if added is None or added.opcode != "add":
        return None
    values = (_find_constant(instructions, name) for name in added.operands)
    return next((value for value in values if value is not None), None)

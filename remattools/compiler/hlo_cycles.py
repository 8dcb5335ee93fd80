# SPDX-License-Identifier: Apache-2.0
"""Count the cycles that the TPU compiler estimates for a program, from its compiled HLO.

Pure text processing. The TPU compiler writes `estimated_cycles` on each operation it
schedules. A loop's body appears in the HLO once, so its cycles are multiplied by the trip
count. If the compiler does not write the trip count, it is read from the loop's condition
(a counter compared with a constant, as JAX lowers a scan).
"""

import dataclasses
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Where the compiler has no estimate it writes the largest integer, or adds 2^60 to a part of one. No operation takes
# that many cycles: these are more than ten days.
_SENTINEL = 2**50
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(%?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CONSTANT = re.compile(r"^(-?\d+)\)")
_DIRECTION = re.compile(r"direction=(\w+)")
_INDEX = re.compile(r"index=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")


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


def estimate_cycles(hlo: str) -> Cycles | None:
    """Return the compiler's estimate, or None if it gives none (all targets except TPU).

    Args:
        hlo: The compiled program, as `compiled.as_text()` prints it.
    """
    if '"estimated_cycles"' not in hlo:
        return None
    computations, entry = _split_computations(hlo)
    unknown: list[str] = []
    unknown_operations: list[str] = []
    memo: dict[str, int] = {}

    def count_cycles(name: str) -> int:
        if name not in memo:
            memo[name] = 0  # HLO has no recursion
            memo[name] = sum(count_line_cycles(name, line) for line in computations.get(name, ()))
        return memo[name]

    def count_line_cycles(computation: str, line: str) -> int:
        estimates = [int(estimate) for estimate in _CYCLES.findall(line)]
        cycles = sum(estimate for estimate in estimates if estimate < _SENTINEL)
        if any(estimate >= _SENTINEL for estimate in estimates):
            unknown_operations.append(_get_name(line))
        loop = _WHILE.search(line)
        if loop is not None:
            trips = _infer_trip_count(line, loop, computations, computation)
            if trips is None:
                unknown.append(_get_name(line))
            return cycles + (1 if trips is None else trips) * (count_cycles(loop[2]) + count_cycles(loop[3]))
        branches = _BRANCHES.search(line)
        if branches is not None:
            return cycles + max(count_cycles(name.strip().lstrip("%")) for name in branches[1].split(","))
        return cycles + sum(map(count_cycles, _CALLED.findall(line)))

    return Cycles(count_cycles(entry), tuple(unknown), tuple(unknown_operations))


def _get_name(line: str) -> str:
    return line.split("=")[0].strip().removeprefix("ROOT ").lstrip("%")


def _split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _infer_trip_count(line: str, loop: re.Match[str], computations: dict[str, list[str]], caller: str) -> int | None:
    written = _TRIPS.search(line)
    if written is not None:
        return int(written[1])
    operand, condition, body = loop[1], computations.get(loop[2], []), computations.get(loop[3], [])
    tests = _parse_instructions(condition)
    root = next((each for each in condition if each.lstrip().startswith("ROOT")), "")
    compared = _INSTRUCTION.match(root)
    direction = _DIRECTION.search(root)
    if compared is None or compared[3] != "compare" or direction is None or direction[1] != "LT":
        return None
    left, right = (_NAME.findall(compared[4].split(")")[0]) + ["", ""])[:2]
    limit = _find_constant(tests, right)
    index = _INDEX.search(tests.get(left, ("", "", ""))[2]) if left in tests else None
    if limit is None or index is None:
        return None
    start = _find_initial_value(_parse_instructions(computations.get(caller, [])), operand, int(index[1]))
    step = _find_increment(body, int(index[1]))
    return None if start is None or not step else max(-(-(limit - start) // step), 0)


def _parse_instructions(lines: list[str]) -> dict[str, tuple[str, str, str]]:
    """Return result shape, operation and the rest of the line of each instruction, by name."""
    matches = (_INSTRUCTION.match(line) for line in lines)
    return {match[1]: (match[2], match[3], match[4]) for match in matches if match is not None}


def _find_constant(instructions: dict[str, tuple[str, str, str]], name: str) -> int | None:
    _, operation, rest = instructions.get(name, ("", "", ""))
    if operation in ("copy", "bitcast"):
        return _find_constant(instructions, (_NAME.findall(rest) + [""])[0])
    value = _CONSTANT.match(rest) if operation == "constant" else None
    return None if value is None else int(value[1])


def _find_initial_value(instructions: dict[str, tuple[str, str, str]], operand: str, index: int) -> int | None:
    """Return the counter's value before the loop, from the loop's initial tuple."""
    _, operation, rest = instructions.get(operand, ("", "", ""))
    parts = _NAME.findall(rest.split(")")[0]) if operation == "tuple" else []
    return _find_constant(instructions, parts[index]) if index < len(parts) else None


def _find_increment(body: list[str], index: int) -> int | None:
    """Return what one iteration adds to the counter."""
    instructions = _parse_instructions(body)
    root = next((each for each in body if each.lstrip().startswith("ROOT")), "")
    result = _INSTRUCTION.match(root)
    parts = _NAME.findall(result[4].split(")")[0]) if result is not None and result[3] == "tuple" else []
    _, operation, rest = instructions.get(parts[index], ("", "", "")) if index < len(parts) else ("", "", "")
    if operation != "add":
        return None
    added = [_find_constant(instructions, name) for name in _NAME.findall(rest.split(")")[0])]
    return next((value for value in added if value is not None), None)

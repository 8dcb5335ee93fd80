# SPDX-License-Identifier: Apache-2.0
"""The compiled text: how many cycles the compiler expects a program to take.

Pure text processing. The TPU's compiler writes `estimated_cycles` on each operation
it schedules; a loop's body stands in the text once, so it counts as often as the loop
turns. Where the compiler does not write the trip count down, it is read from the
loop's condition (a counter against a constant, which is how JAX writes a scan).
"""

import dataclasses
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
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
        total: Sum over all operations, loop bodies times their trip count.
        unknown_loops: Names of loops whose trip count is not in the text; their bodies count once.
    """

    total: int
    unknown_loops: tuple[str, ...]


def estimate_cycles(text: str) -> Cycles | None:
    """The compiler's own estimate, or None where it gives none (all targets but TPU)."""
    if '"estimated_cycles"' not in text:
        return None
    computations, entry = _split_computations(text)
    unknown: list[str] = []
    memo: dict[str, int] = {}

    def count_cycles(name: str) -> int:
        if name not in memo:
            memo[name] = 0  # HLO has no recursion
            memo[name] = sum(count_line_cycles(name, line) for line in computations.get(name, ()))
        return memo[name]

    def count_line_cycles(owner: str, line: str) -> int:
        own = sum(map(int, _CYCLES.findall(line)))
        loop = _WHILE.search(line)
        if loop is not None:
            trips = _infer_trip_count(line, loop, computations, owner)
            if trips is None:
                unknown.append(line.split("=")[0].strip().removeprefix("ROOT ").lstrip("%"))
            return own + (1 if trips is None else trips) * (count_cycles(loop[2]) + count_cycles(loop[3]))
        branches = _BRANCHES.search(line)
        if branches is not None:
            return own + max(count_cycles(name.strip().lstrip("%")) for name in branches[1].split(","))
        return own + sum(map(count_cycles, _CALLED.findall(line)))

    return Cycles(count_cycles(entry), tuple(unknown))


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found, entry


def _infer_trip_count(line: str, loop: re.Match[str], computations: dict[str, list[str]], owner: str) -> int | None:
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    operand, condition, body = loop[1], computations.get(loop[2], []), computations.get(loop[3], [])
    tests = _parse_instructions(condition)
    root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
    compared = _INSTRUCTION.match(root)
    direction = _DIRECTION.search(root)
    if compared is None or compared[3] != "compare" or direction is None or direction[1] != "LT":
        return None
    left, right = (_NAME.findall(compared[4].split(")")[0]) + ["", ""])[:2]
    limit = _find_constant(tests, right)
    index = _INDEX.search(tests.get(left, ("", "", ""))[2]) if left in tests else None
    if limit is None or index is None:
        return None
    start = _find_initial_value(_parse_instructions(computations.get(owner, [])), operand, int(index[1]))
    step = _find_increment(body, int(index[1]))
    return None if start is None or not step else max(-(-(limit - start) // step), 0)


def _parse_instructions(lines: list[str]) -> dict[str, tuple[str, str, str]]:
    """Result shape, operation and the rest of the line by name."""
    matches = (_INSTRUCTION.match(line) for line in lines)
    return {match[1]: (match[2], match[3], match[4]) for match in matches if match is not None}


def _find_constant(instructions: dict[str, tuple[str, str, str]], name: str) -> int | None:
    _, operation, rest = instructions.get(name, ("", "", ""))
    if operation in ("copy", "bitcast"):
        return _find_constant(instructions, (_NAME.findall(rest) + [""])[0])
    value = _CONSTANT.match(rest) if operation == "constant" else None
    return None if value is None else int(value[1])


def _find_initial_value(instructions: dict[str, tuple[str, str, str]], operand: str, index: int) -> int | None:
    """The counter's value before the loop, from the tuple that the loop starts with."""
    _, operation, rest = instructions.get(operand, ("", "", ""))
    parts = _NAME.findall(rest.split(")")[0]) if operation == "tuple" else []
    return _find_constant(instructions, parts[index]) if index < len(parts) else None


def _find_increment(body: list[str], index: int) -> int | None:
    """What one turn adds to the counter."""
    instructions = _parse_instructions(body)
    root = next((text for text in body if text.lstrip().startswith("ROOT")), "")
    result = _INSTRUCTION.match(root)
    parts = _NAME.findall(result[4].split(")")[0]) if result is not None and result[3] == "tuple" else []
    _, operation, rest = instructions.get(parts[index], ("", "", "")) if index < len(parts) else ("", "", "")
    if operation != "add":
        return None
    added = [_find_constant(instructions, name) for name in _NAME.findall(rest.split(")")[0])]
    return next((value for value in added if value is not None), None)

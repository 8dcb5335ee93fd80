# SPDX-License-Identifier: Apache-2.0
"""Which rule governs a module, given its paths.

Pure: takes paths and class names, returns decisions with their reasons. The last
rule that takes a module wins; `every_n` is part of taking, so a module that a
later rule leaves out stays with the earlier one.
"""

import dataclasses
import re
import warnings
from collections.abc import Sequence

from ..errors import RuleError, UnmatchedRuleError, UnmatchedRuleWarning
from .paths import Path, PathIndex, Pattern, find_closest, format_path, make_natural_key
from .rule import Remat
from .ruleset import Rules

_NUMBERED = re.compile(r"(.*?)(\d+)\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleNode:
    """What rules can match on in one module.

    Attributes:
        paths: All paths that reach it; it matches by any of them.
        class_names: Names of its class and bases.
        methods: Methods that can be called on it; none for a container.
    """

    paths: tuple[Path, ...]
    class_names: tuple[str, ...] = ()
    methods: frozenset[str] = frozenset({"__call__"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleDecision:
    """The decision on one module.

    Attributes:
        action: What to do; None if no rule matches it, False if one takes it out.
        rule: Index of the winning rule, or None.
        shadowed: Indices of the rules that also matched it and lost.
        path: The path by which the winner matched.
    """

    action: Remat | bool | None = None
    rule: int | None = None
    shadowed: tuple[int, ...] = ()
    path: Path = ()


def resolve(rules: Rules, nodes: Sequence[ModuleNode], *, strict: bool = True) -> list[ModuleDecision]:
    """Decide on every node.

    Args:
        rules: In order; the last that takes a node wins.
        nodes: All modules of the model, containers included.
        strict: Raise for a rule without effect; else warn.

    Raises:
        UnmatchedRuleError: If a rule takes no module (`strict=True`).
        RuleError: If `every_n` finds no sequence to count along.
    """
    universe = [(path, index) for index, node in enumerate(nodes) for path in node.paths]
    paths = [path for path, _ in universe]
    class_names = [nodes[index].class_names for _, index in universe]
    everything = PathIndex(paths, class_names)
    taken: list[list[tuple[int, Path]]] = [[] for _ in nodes]
    for number, (pattern, action) in enumerate(rules):
        hits = everything.match(pattern)
        found = {universe[hit][1]: paths[hit] for hit in reversed(hits)}
        fitting = {i: path for i, path in found.items() if _has_methods(nodes[i], action)}
        if not fitting:
            _report_unmatched(pattern.text, action, found, nodes, paths, strict=strict)
        for index, path in fitting.items():
            if isinstance(action, Remat) and not _is_counted(action, pattern.text, path, paths):
                continue
            taken[index].append((number, path))
    return [_decide(rules, entry) for entry in taken]


def _decide(rules: Rules, matches: list[tuple[int, Path]]) -> ModuleDecision:
    if not matches:
        return ModuleDecision()
    *shadowed, (winner, path) = matches
    return ModuleDecision(
        action=tuple(rules)[winner][1], rule=winner, shadowed=tuple(number for number, _ in shadowed), path=path
    )


def _has_methods(node: ModuleNode, action: Remat | bool) -> bool:
    if not isinstance(action, Remat):
        return True
    return set(action.methods) <= node.methods


def _report_unmatched(
    text: str,
    action: Remat | bool,
    found: dict[int, Path],
    nodes: Sequence[ModuleNode],
    paths: Sequence[Path],
    *,
    strict: bool,
) -> None:
    if found:
        error = _make_no_method_error(text, action, found, nodes)
    else:
        near = _suggest_anywhere(text, paths) or format_closest(text, paths)
        error = UnmatchedRuleError(
            what=f"the rule {text!r} matches no module of this model.",
            why="it would silently do nothing, and memory would not change.",
            fix=near or "`remattools.explain(model)` lists all paths.",
        )
    if strict:
        raise error
    # Pointing at the caller of the public function: apply -> resolve -> here.
    warnings.warn(UnmatchedRuleWarning(str(error)), stacklevel=4)


def _make_no_method_error(
    text: str, action: Remat | bool, found: dict[int, Path], nodes: Sequence[ModuleNode]
) -> UnmatchedRuleError:
    index, path = min(found.items(), key=lambda item: len(item[1]))
    wanted = ", ".join(action.methods) if isinstance(action, Remat) else "a call"
    methods = sorted(nodes[index].methods)
    below = sorted({p for node in nodes for p in node.paths if p[: len(path)] == path and len(p) == len(path) + 1})
    fixes = []
    if below:
        # A pattern of paths is best extended as it was written; a bare name or a class means something else with a dot.
        stem = text if "." in text and ":" not in text else format_path(path)
        prefix = stem + "." if path else ""
        fixes.append(f'its children: "{prefix}*" ({", ".join(format_path(child) for child in below[:3])}, ...)')
    if methods:
        fixes.append(f"another method: Remat(methods=({methods[0]!r},)), out of {', '.join(methods)}")
    name = nodes[index].class_names[0] if nodes[index].class_names else "module"
    return UnmatchedRuleError(
        what=f"the rule {text!r} matches {format_path(path)} ({name}), which has no {wanted}.",
        why="a region is a method call; a container of modules has nothing to rematerialise.",
        fix="name " + " or ".join(fixes) + "." if fixes else "",
    )


def _suggest_anywhere(text: str, paths: Sequence[Path]) -> str:
    """Return the hint for a pattern with a dot that would match further down; "" if there is none."""
    deeper = f"**.{text}"
    if "." not in text or text.startswith((".", "**")):
        return ""
    found = next((path for path in paths if Pattern.parse(deeper).is_match(path)), None)
    return "" if found is None else f'a pattern with a dot starts at the root: "{deeper}" matches {format_path(found)}.'


def format_closest(text: str, paths: Sequence[Path]) -> str:
    """Return the closest real paths as a sentence, or ""."""
    from_text = find_closest(text, paths)
    return f"the closest paths are {', '.join(from_text)}." if from_text else ""


def _is_counted(action: Remat, text: str, path: Path, paths: Sequence[Path]) -> bool:
    """Return whether `every_n` and `offset` take the module at `path`."""
    if action.every_n == 1:
        return True
    index = find_sequence_index(path, paths)
    if index is None:
        raise RuleError(
            what=f"the rule {text!r} has every_n={action.every_n}, but {format_path(path)} is not in a sequence.",
            why="every_n counts along a list of modules, or along siblings with numbers such as layer1, layer2.",
            fix="drop every_n, or match modules inside a list; layers stacked for a scan are one module that group= "
            "divides.",
        )
    return index % action.every_n == action.offset


def find_sequence_index(path: Path, paths: Sequence[Path]) -> int | None:
    """Return the index of a module in its nearest sequence, else among its numbered siblings, else None."""
    for segment in reversed(path):
        if isinstance(segment, int):
            return segment
    for depth in range(len(path) - 1, -1, -1):
        stem = _NUMBERED.match(str(path[depth]))
        if stem is None:
            continue
        siblings = {
            other[depth]
            for other in paths
            if len(other) > depth and other[:depth] == path[:depth] and _strip_number(other[depth]) == stem[1]
        }
        if len(siblings) > 1:
            return sorted(siblings, key=lambda name: make_natural_key((name,))).index(path[depth])
    return None


def _strip_number(segment: str | int) -> str | None:
    numbered = _NUMBERED.match(str(segment))
    return numbered[1] if numbered else None

# SPDX-License-Identifier: Apache-2.0
"""Which rule governs a module, given its paths.

Pure: takes paths and class names, returns decisions. The last rule that selects a
module wins. `every_n` is part of selecting, so a module that a later rule skips
stays with the earlier one.
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
        paths: All paths that lead to it; it matches by any of them.
        class_names: Names of its class and bases.
        methods: Names of the methods that can be called on it; empty for a container.
    """

    paths: tuple[Path, ...]
    class_names: tuple[str, ...] = ()
    methods: frozenset[str] = frozenset({"__call__"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleDecision:
    """The decision on one module.

    Attributes:
        action: What to do; None if no rule selects the module, False if the winning rule excludes it.
        rule: Index of the winning rule, or None.
        shadowed: Indices of the earlier rules that select it too.
        path: The path by which the winner matched.
    """

    action: Remat | bool | None = None
    rule: int | None = None
    shadowed: tuple[int, ...] = ()
    path: Path = ()


def resolve(rules: Rules, nodes: Sequence[ModuleNode], *, strict: bool = True) -> list[ModuleDecision]:
    """Return the decision on every module.

    Args:
        rules: The rules, in order; the last that selects a module wins.
        nodes: All modules of the model, containers included.
        strict: Whether to raise if a rule selects no module; if False, warn.

    Returns:
        One decision for each node, in order.

    Raises:
        UnmatchedRuleError: If a rule selects no module and `strict` is True.
        RuleError: If a rule has `every_n` and matches a module that is not in a sequence.

    Example:
        >>> nodes = [ModuleNode(paths=(("layers", i),)) for i in range(2)]
        >>> [each.rule for each in resolve(Rules({"layers.*": "dots_saveable", "layers.[-1]": False}), nodes)]
        [0, 1]
    """
    universe = [(path, index) for index, node in enumerate(nodes) for path in node.paths]
    paths = [path for path, _ in universe]
    class_names = [nodes[index].class_names for _, index in universe]
    path_index = PathIndex(paths, class_names)
    selecting: list[list[tuple[int, Path]]] = [[] for _ in nodes]
    errors: dict[str, UnmatchedRuleError] = {}
    for number, (pattern, action) in enumerate(rules):
        hits = path_index.match(pattern)
        matches = {universe[hit][1]: paths[hit] for hit in reversed(hits)}
        callable_matches = {i: path for i, path in matches.items() if _has_methods(nodes[i], action)}
        if not callable_matches:
            errors[pattern.text] = _make_unmatched_error(pattern.text, action, matches, nodes, paths)
        for index, path in callable_matches.items():
            if isinstance(action, Remat) and not _is_counted(action, pattern.text, path, paths):
                continue
            selecting[index].append((number, path))
    _report_unmatched(errors, strict=strict)
    return [_decide(rules, matches) for matches in selecting]


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


def _report_unmatched(errors: dict[str, UnmatchedRuleError], *, strict: bool) -> None:
    """Raise one error for all rules that match nothing, by their patterns, or warn of each."""
    if not strict:
        for error in errors.values():
            # The warning points at the caller of the public function: apply -> resolve -> here.
            warnings.warn(UnmatchedRuleWarning(str(error)), stacklevel=4)
    elif len(errors) == 1:
        raise next(iter(errors.values()))
    elif errors:
        raise UnmatchedRuleError(
            what=f"{len(errors)} rules match nothing in this model: {', '.join(map(repr, errors))}.",
            why="they would silently do nothing, and memory would not change.",
            fix="\n    ".join(f"{text!r}: {error.fix}" for text, error in errors.items()),
        )


def _make_unmatched_error(
    text: str,
    action: Remat | bool,
    matches: dict[int, Path],
    nodes: Sequence[ModuleNode],
    paths: Sequence[Path],
) -> UnmatchedRuleError:
    if matches:
        return _make_no_method_error(text, action, matches, nodes)
    near = _suggest_anywhere(text, paths) or format_closest(text, paths)
    return UnmatchedRuleError(
        what=f"the rule {text!r} matches no module of this model.",
        why="it would silently do nothing, and memory would not change.",
        fix=near or "`remattools.explain(model)` lists all paths.",
    )


def _make_no_method_error(
    text: str, action: Remat | bool, matches: dict[int, Path], nodes: Sequence[ModuleNode]
) -> UnmatchedRuleError:
    index, path = min(matches.items(), key=lambda item: len(item[1]))
    required = ", ".join(action.methods) if isinstance(action, Remat) else "method to call"
    methods = sorted(nodes[index].methods)
    below = sorted({p for node in nodes for p in node.paths if p[: len(path)] == path and len(p) == len(path) + 1})
    fixes = []
    if below:
        # A bare name or a class would change its meaning with a dot; other patterns are extended as written.
        stem = text if "." in text and ":" not in text else format_path(path)
        prefix = stem + "." if path else ""
        fixes.append(f'its children: "{prefix}*" ({", ".join(format_path(child) for child in below[:3])}, ...)')
    if methods:
        fixes.append(f"another method: Remat(methods=({methods[0]!r},)); it has {', '.join(methods)}")
    name = nodes[index].class_names[0] if nodes[index].class_names else "module"
    return UnmatchedRuleError(
        what=f"the rule {text!r} matches {format_path(path)} ({name}), which has no {required}.",
        why="a region is a method call; a container of modules has nothing to rematerialise.",
        fix="name " + " or ".join(fixes) + "." if fixes else "",
    )


def _suggest_anywhere(text: str, paths: Sequence[Path]) -> str:
    """Return the hint for a pattern with a dot that would match further down; "" if there is none."""
    deeper = f"**.{text}"
    if "." not in text or text.startswith((".", "**")):
        return ""
    match = next((path for path in paths if Pattern.parse(deeper).is_match(path)), None)
    return "" if match is None else f'a pattern with a dot starts at the root: "{deeper}" matches {format_path(match)}.'


def format_closest(text: str, paths: Sequence[Path]) -> str:
    """Return a sentence that names the existing paths most like a pattern; "" if none is like it."""
    closest = find_closest(text, paths)
    return f"the closest paths are {', '.join(closest)}." if closest else ""


def _is_counted(action: Remat, text: str, path: Path, paths: Sequence[Path]) -> bool:
    """Return whether `every_n` and `offset` select the module at `path`."""
    if action.every_n == 1:
        return True
    index = find_sequence_index(path, paths)
    if index is None:
        raise RuleError(
            what=f"the rule {text!r} has every_n={action.every_n}, but {format_path(path)} is not in a sequence.",
            why="every_n counts along a list of modules, or along numbered siblings such as layer1, layer2.",
            fix="drop every_n, or match modules in a list; layers stacked for a scan are one module, which group= "
            "divides.",
        )
    return index % action.every_n == action.offset


def find_sequence_index(path: Path, paths: Sequence[Path]) -> int | None:
    """Return the index of a module in its innermost sequence, else among its numbered siblings, else None.

    Args:
        path: Path of the module.
        paths: Paths of all modules.

    Example:
        >>> find_sequence_index(("layer2",), [("layer1",), ("layer2",)])
        1
    """
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

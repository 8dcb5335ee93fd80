# SPDX-License-Identifier: Apache-2.0
"""The fewest names and patterns that save the same values of a block, as a person would write them.

Sits on `block_ilp`. The planner chooses results of operations, one by one. A rule file survives a refactoring better
with few names, with outputs of modules rather than of operations, and without indices: `mlp.down` for `mlp.down:add`,
`*_norm` for six of `q_norm:add`. Patterns may also match what nothing reads under the choice, since JAX does not save
that. Each result is verified by resolving it, as a region would.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from ...jaxpr import forward_rules, jaxprs, result_derivatives
from ...rules.paths import NamePattern, Path, Pattern, format_path
from ...transform.naming import names as naming
from ..model.block_ilp import BlockProblem

# What a pattern costs: an output of a module or a name of the user's before an operation, and few wildcards.
_MODULE, _OPERATION, _INDEX, _WILDCARD = 1.0, 1.3, 0.4, 0.1
_DIGITS = re.compile(r"\d+")


class BlockNames:
    """The names of one kind of block.

    Args:
        problem: Its choices.
        jaxpr: Its forward pass, with the marks of `transform.naming.scopes`.
    """

    def __init__(self, problem: BlockProblem, jaxpr: Any) -> None:
        self._problem = problem
        values = [value for value in naming.find_named_values(jaxpr) if value.reachable]
        self._values = values
        # An operation is known by the position of its equation; what else names its result has the same number.
        numbers = {value.where[0]: number for number, value in enumerate(values) if value.kind == "op"}
        self._results: list[frozenset[int] | None] = []
        for number, value in enumerate(values):
            if value.kind == "op":
                self._results.append(frozenset((number,)))
                continue
            sources = [find_marked_operation(jaxpr, position) for position in value.where]
            exact = all(source in numbers for source in sources)
            own = frozenset((number,)) if value.kind == "user" else None
            self._results.append(frozenset(numbers[s] for s in sources if s is not None) if exact else own)
        self._by_label = {f"{value.label}[{value.index}]": number for number, value in enumerate(values)}
        self._by_path: dict[tuple[str, Path], list[int]] = {}
        for number, value in enumerate(values):
            path = () if value.kind == "user" else value.path
            self._by_path.setdefault((value.kind, path), []).append(number)
        self._short: dict[tuple[str, ...], tuple[str, ...]] = {}
        # Every assignment of a search is written as rules, from few choices.
        self.match = functools.cache(self._match)
        self.find_limits = functools.cache(self._find_limits)
        self.is_equal = functools.cache(self._is_equal)

    def abbreviate(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        """Return few patterns that save what these names save.

        Args:
            chosen: Keys of `BlockProblem.names`.
        """
        if chosen not in self._short:
            found = self._cover(chosen)
            self._short[chosen] = found if self._is_verified(found, chosen) else chosen
        return self._short[chosen]

    def _is_equal(self, patterns: tuple[str, ...], chosen: tuple[str, ...]) -> bool:
        """Return whether patterns save what the chosen names save, and each of them matches something.

        Args:
            patterns: What `abbreviate` returned, for this block or another.
            chosen: Keys of `BlockProblem.names`.
        """
        needed, allowed = self.find_limits(chosen)
        matched = [self.match(*_parse(text)) for text in patterns]
        return all(matched) and needed <= frozenset().union(*(one or () for one in matched)) <= allowed

    def _is_verified(self, patterns: Sequence[str], chosen: tuple[str, ...]) -> bool:
        """Return the same by resolving the patterns as a region does."""
        needed, allowed = self.find_limits(chosen)
        matched: set[int] = set()
        for text in patterns:
            pattern = NamePattern.parse(text)
            results = [
                result
                for value, result in zip(self._values, self._results, strict=True)
                if pattern.is_match(value.kind, value.path, value.primitive, value.index)
            ]
            if not results or None in results:
                return False
            matched.update(*(result for result in results if result is not None))
        return needed <= matched <= allowed

    def _find_limits(self, chosen: tuple[str, ...]) -> tuple[frozenset[int], frozenset[int]]:
        """Return the results that have to be saved, and those that may be named."""
        needed = frozenset(self._get_result(name) for name in chosen)
        unread = (self._get_result(name) for name in self._problem.find_unread_names(chosen))
        return needed, needed.union(unread)

    def _get_result(self, name: str) -> int:
        number = self._by_label[name]
        results = self._results[number]
        return next(iter(results)) if results is not None and len(results) == 1 else number

    def _cover(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        """Return patterns by a greedy search: in each step the one that costs least for each value that it adds."""
        needed, allowed = self.find_limits(chosen)
        options: dict[str, tuple[float, frozenset[int]]] = {}
        for number, results in enumerate(self._results):
            if results is None or not results & needed:
                continue
            for cost, text, key in _list_patterns(self._values[number]):
                if text not in options and (matched := self.match(*key)) and matched <= allowed:
                    options[text] = cost, matched & needed
        found: list[str] = []
        rest = set(needed)
        while rest and options:
            text = min(options, key=lambda t: (options[t][0] / max(len(options[t][1] & rest), 1e-9), len(t), t))
            if not options[text][1] & rest:
                break
            found.append(text)
            rest -= options.pop(text)[1]
        if rest:
            return chosen
        for text in list(found):  # what later patterns cover as well
            others = [self.match(*_parse(other)) or frozenset() for other in found if other != text]
            if needed <= frozenset().union(*others):
                found.remove(text)
        first = {text: min((self.match(*_parse(text)) or frozenset()) & needed) for text in found}
        return tuple(sorted(found, key=lambda text: first[text]))

    def _match(self, kind: str, path: str, primitive: str, index: int | None) -> frozenset[int] | None:
        """Return the results that a pattern names; None if an output that it names is not one operation's result."""
        pattern = Pattern.parse(path)
        glob = re.compile(re.escape(primitive).replace(r"\*", ".*"))
        found: set[int] = set()
        for (value_kind, value_path), numbers in self._by_path.items():
            if value_kind != kind or (kind != "user" and not pattern.is_match(value_path)):
                continue
            for number in numbers:
                value, results = self._values[number], self._results[number]
                if (index is None or value.index == index) and glob.fullmatch(value.primitive):
                    if results is None:
                        return None
                    found |= results
        return frozenset(found)


_Key = tuple[str, str, str, int | None]


def _list_patterns(value: naming.NamedValue) -> Iterator[tuple[float, str, _Key]]:
    """Yield patterns that match a value: what they cost, their text and their parts."""
    base = _MODULE if value.kind in ("module", "user") else _OPERATION
    indices = (None, value.index)
    if value.kind == "user":
        for index in indices:
            yield _make_option(base, "user", ".", value.primitive, index)
        return
    primitives = (value.primitive, "*") if value.kind == "op" else (value.primitive,)
    for path, primitive, index in itertools.product(_generalize_path(value.path), primitives, indices):
        yield _make_option(base, value.kind, path, primitive, index)


def _make_option(base: float, kind: str, path: str, primitive: str, index: int | None) -> tuple[float, str, _Key]:
    text = {"module": path, "user": f"@{primitive}"}.get(kind, f"{path}:{primitive}")
    text += "" if index is None else f"[{index}]"
    cost = base + _INDEX * (index is not None) + _WILDCARD * text.count("*")
    return cost, text, (kind, path, primitive, index)


def _parse(text: str) -> _Key:
    """Return the parts of a pattern that `_make_option` wrote."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", text)
    body, index = (found[1], int(found[2])) if found else (text, None)
    if body.startswith("@"):
        return "user", ".", body[1:], index
    path, colon, primitive = body.rpartition(":")
    if not colon:
        return "module", body, "", index
    return "input" if primitive == "input" else "op", path, primitive, index


@functools.lru_cache(maxsize=4096)
def _generalize_path(path: Path) -> tuple[str, ...]:
    """Return patterns for a path: itself, its last segment, and both without numbers, prefixes or suffixes."""
    if not path:
        return (".",)
    segments = [tuple(dict.fromkeys(_generalize_segment(str(segment)))) for segment in path]
    whole = [".".join(parts) for parts in itertools.islice(itertools.product(*segments), 64)]
    last = segments[-1] if len(path) > 1 else ()
    return tuple(dict.fromkeys((format_path(path), *last, *whole)))


def _generalize_segment(segment: str) -> Iterator[str]:
    yield segment
    if segment.isdecimal():
        yield "*"
        return
    without_digits = _DIGITS.sub("*", segment)
    yield without_digits
    for text in (segment, without_digits):
        head, underscore, tail = text.rpartition("_")
        if underscore:
            yield f"*_{tail}"
            yield f"{head}_*"
            yield f"{text.partition('_')[0]}_*"


def find_marked_operation(jaxpr: Any, position: naming.Position) -> naming.Position | None:
    """Return the position of the operation whose result a mark names; None if saving the two is not the same.

    Args:
        jaxpr: The traced program.
        position: Of the mark, a `checkpoint_name`.
    """
    level: Any = jaxprs.open_jaxpr(jaxpr)
    *outer, number = position
    for step in outer:
        assert isinstance(step, tuple)  # only the last step of a position is a number
        if step[1] == forward_rules.FORWARD_RULE:
            return None
        level = jaxprs.open_jaxpr(dict(jaxprs.find_subjaxprs(level.eqns[step[0]]))[step[1]])
    assert isinstance(number, int)
    return _follow(level, tuple(outer), level.eqns[number].invars[0], is_outer=True)


def _follow(level: Any, prefix: naming.Position, var: Any, *, is_outer: bool) -> naming.Position | None:
    """Return the position of the operation that computes a variable, if nothing else reads the variable."""
    place = next((n for n, equation in enumerate(level.eqns) if var in equation.outvars), None)
    if not isinstance(var, core.Var) or place is None:
        return None
    equation = level.eqns[place]
    reads = sum(atom is var for other in level.eqns for atom in other.invars)
    is_read_once = reads + sum(atom is var for atom in level.outvars) == 1
    # The name of such a result is placed behind the operation, whatever reads it.
    if not is_read_once and not (is_outer and result_derivatives.is_result_in_derivative(equation)):
        return None
    if jaxprs.get_checkpoint_name(equation) is not None:
        return _follow(level, prefix, equation.invars[0], is_outer=is_outer)
    nested = list(jaxprs.find_subjaxprs(equation))
    if not nested:
        return (*prefix, place) if len(equation.outvars) == 1 else None
    if equation.primitive.name not in jaxprs.CALL_PRIMITIVES or len(nested) != 1:
        return None
    where, inner = nested[0]
    opened = jaxprs.open_jaxpr(inner)
    result = opened.outvars[equation.outvars.index(var)]
    return _follow(opened, (*prefix, (place, where)), result, is_outer=False)

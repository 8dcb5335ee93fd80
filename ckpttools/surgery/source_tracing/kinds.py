# SPDX-License-Identifier: Apache-2.0
"""Pair leaves of equal form by their names: which stored leaf is the likely source of which leaf of the state?

Leaves whose names differ only in numbers are one kind, and kinds are paired, so the work grows with the number of
leaves, not of pairs: each kind looks up the kinds of its form that share the longest end of its name. A renamed part
moves many kinds at once, so each pair votes for the change that it implies, and the most frequent change wins. Names
are compared word by word, with common synonyms treated as equal: `h_0.attn.weight` and `h.0.attention.kernel`.
"""

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence

from ...tree.leaf_paths import Names
from ..resize import Shape

type Form = tuple[str, str, Shape]
"""Kind, dtype and shape of a leaf."""

_SYNONYMS = {
    **dict.fromkeys(["weight", "w", "scale", "gamma", "embedding"], "kernel"),
    **dict.fromkeys(["beta", "b", "offset"], "bias"),
    **dict.fromkeys(["dense", "fc", "lin"], "linear"),
    **dict.fromkeys(["attn", "attentions"], "attention"),
    **dict.fromkeys(["q"], "query"),
    **dict.fromkeys(["emb", "wte", "embeddings"], "embed"),
    **dict.fromkeys(["variance"], "var"),
    **dict.fromkeys(["moving", "running", "params", "param", "batch", "stats", "proj"], ""),
    **dict.fromkeys(["block", "blocks", "layers", "h"], "layer"),
}
_SLOTS = frozenset(
    {"mu", "nu", "trace", "acc_grads", "nu_max", "sum_of_squares", "v_row", "v_col", "momentum", "slow"}
    | {"grad_mom", "grad_sq", "ema", "average", "fisher"}
)
"""Names of an optimizer's per-parameter values: one is never the source of another, nor of a parameter."""
_CORE_AFFIXES = re.compile(r"^to_|_?proj$|^w_?(?=[qkvo]$)")
"""What the names of projections have besides their core: `to_q`, `q_proj` and `wq` are all `q`."""
_MAX_CANDIDATES = 16
_NUMBER = re.compile(r"\d+")
_MAX_FUZZY = 60
_MIN_RATIO = 0.55
_MIN_MARGIN = 0.1


@functools.lru_cache(maxsize=1 << 15)
def _mask_segment(segment: str) -> str:
    return _NUMBER.sub("#", segment)


@functools.lru_cache(maxsize=1 << 15)
def _find_numbers(segment: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(segment)))


def mask_path(path: Names) -> Names:
    """Replace the numbers in a name by "#"; most segments were seen before, so each is masked once."""
    return tuple(map(_mask_segment, path))


def list_numbers(path: Names) -> tuple[int, ...]:
    """Return all numbers in a name."""
    return tuple(number for part in path for number in _find_numbers(part))


PLACE = "\x00"
"""Stands in a name for the number of a layer, or for the names of pieces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How an array is made of leaves, or taken apart.

    Attributes:
        name: Their name, with `PLACE` for what differs; empty for one leaf.
        axis: The axis along which they are joined.
        pieces: Names of the pieces of a fused array.
        sizes: Sizes of its pieces, if they differ.
        axes: How the result is transposed; empty if it is not.
    """

    name: Names = ()
    axis: int = 0
    pieces: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A leaf, or an array that could be made of several leaves, under the name that it would have.

    Attributes:
        path: The name that is compared.
        form: The form that has to be equal.
        leaves: The leaves that it stands for, in order.
        detail: What would have to be done; None for a leaf as it is.
    """

    path: Names
    form: Form
    leaves: tuple[Names, ...]
    detail: Arrangement | None = None

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """All numbers in its name."""
        return list_numbers(self.path)


@dataclasses.dataclass(eq=False)
class _Kind:
    masked: Names
    form: Form
    members: list[Candidate]

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        return split_words(self.masked)

    @functools.cached_property
    def slots(self) -> frozenset[str]:
        return find_slots(self.masked)


def find_slots(path: Names) -> frozenset[str]:
    """Return the names of an optimizer's slots in a name."""
    return _SLOTS.intersection(path[1:])


type Pair = tuple[Candidate, Candidate]
"""Something on disk and what it is the likely source of."""


@functools.lru_cache(maxsize=1 << 15)
def _split_segment(segment: str) -> tuple[str, ...]:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", segment)
    found = (_SYNONYMS.get(word.lower(), word.lower()) for word in words)
    return tuple(word for word in found if word)


def split_words(path: Names) -> tuple[str, ...]:
    """Return the words of a name without numbers, with one word for all synonyms."""
    return tuple(word for segment in path for word in _split_segment(segment))


def pair_candidates(stored: Iterable[Candidate], wanted: Iterable[Candidate], *, strict: bool = False) -> list[Pair]:
    """Return pairs of equal form whose names correspond; each candidate is in one pair at most.

    Args:
        stored: What is on disk and has no place yet.
        wanted: What the state lacks.
        strict: Whether the names must have the same words: for forms that say little.
    """
    unused, pairs = list(stored), []
    lacking = list(wanted)
    steps = (
        (_find_same_words,)
        if strict
        else (_find_same_words, _find_by_end, _find_by_abbreviation, _find_by_parent, _find_by_likeness)
    )
    for find in steps:
        if not unused or not lacking:
            break
        sources, targets = _group(unused), _group(lacking)
        for source, target in find(sources, targets):
            pairs += _zip_members(source, target)
        used = {id(each) for pair in pairs for each in pair}
        unused = [each for each in unused if id(each) not in used]
        lacking = [each for each in lacking if id(each) not in used]
    return pairs


def _group(candidates: Iterable[Candidate]) -> list[_Kind]:
    kinds: dict[tuple[Names, Form], _Kind] = {}
    for each in candidates:
        key = (mask_path(each.path), each.form)
        kinds.setdefault(key, _Kind(*key, [])).members.append(each)
    for kind in kinds.values():
        kind.members.sort(key=lambda each: each.numbers)
    return list(kinds.values())


def _zip_members(source: _Kind, target: _Kind) -> list[Pair]:
    """Pair the members of two kinds: by their numbers, or in order if there are as many."""
    olds, news = source.members, target.members
    if len(olds) == len(news):
        return list(zip(olds, news))
    for start in (0, -1):
        places = {each.numbers[start:]: each for each in olds}
        found = [(places[new.numbers[start:]], new) for new in news if new.numbers[start:] in places]
        if len(places) == len(olds) and found and len({id(old) for old, _ in found}) == len(found):
            return found
    return []


def _find_same_words(sources: Sequence[_Kind], targets: Sequence[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Pair kinds whose names differ in numbers only, then those whose names have the same words.

    A scalar needs more than that: there are many counters, and the parts around them show which is which.
    """
    done: set[int] = set()
    for name in ("masked", "words"):
        index: dict[tuple[Names, Form], list[_Kind]] = {}
        wanted: dict[tuple[Names, Form], list[_Kind]] = {}
        for side, kinds in ((index, sources), (wanted, targets)):
            for kind in kinds:
                if id(kind) not in done:
                    side.setdefault((getattr(kind, name), kind.form), []).append(kind)
        for key, same in wanted.items():
            found = index.get(key, ())
            if len(same) == len(found) == 1 and key[1][2] != ():
                done |= {id(same[0]), id(found[0])}
                yield found[0], same[0]


def _find_by_end(sources: Sequence[_Kind], targets: Sequence[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Pair kinds by the longest common end of their names; the change of a part above that moves most leaves first."""
    index: dict[tuple[Form, frozenset[str], tuple[str, ...]], list[_Kind]] = {}
    for source in sources:
        for size in range(1, len(source.words) + 1):
            index.setdefault((source.form, source.slots, source.words[-size:]), []).append(source)
    edges: list[_Edge] = []
    votes: collections.Counter[tuple[Names, Names]] = collections.Counter()
    for target in targets:
        for size in range(len(target.words), 0, -1):
            near = index.get((target.form, target.slots, target.words[-size:]), [])
            if near:
                break
        for source in near if len(near) <= _MAX_CANDIDATES else ():
            change = _strip_common_end(source.masked, target.masked)
            common, overlap = _count_common(source.words, target.words), _overlap(source.words, target.words)
            is_whole = len(source.members) == len(target.members)
            edges.append(_Edge(source, target, change, (size, is_whole, common, overlap)))
            votes[change] += min(len(source.members), len(target.members))
    for edge in edges:
        edge.evidence = (votes[edge.change], *edge.evidence)
    # An ambiguous pair is dropped, not chosen by chance.
    edges = _drop_ambiguous(edges, lambda edge: id(edge.target))
    edges = _drop_ambiguous(edges, lambda edge: id(edge.source))
    edges.sort(key=lambda edge: edge.evidence, reverse=True)
    yield from _take_best((edge.source, edge.target) for edge in edges)


@dataclasses.dataclass(eq=False)
class _Edge:
    """A possible pair, and what speaks for it."""

    source: _Kind
    target: _Kind
    change: tuple[Names, Names]
    evidence: tuple[float, ...]


def _drop_ambiguous(edges: Sequence[_Edge], get_side: Callable[[_Edge], int]) -> list[_Edge]:
    """Return the edges without those of a kind for which several others have the same, best evidence."""
    groups: dict[int, list[_Edge]] = {}
    for edge in edges:
        groups.setdefault(get_side(edge), []).append(edge)
    kept = []
    for same in groups.values():
        best = max(edge.evidence for edge in same)
        tied = [edge for edge in same if edge.evidence == best]
        if len(tied) > 1:
            ratios = sorted(
                ((_compare_differing(each.source.words, each.target.words), at) for at, each in enumerate(tied)),
                reverse=True,
            )
            is_clear = ratios[0][0] >= _MIN_RATIO and ratios[0][0] - ratios[1][0] >= _MIN_MARGIN
            kept += [tied[ratios[0][1]]] if is_clear else []
        else:
            kept += same
    return kept


def _find_by_abbreviation(sources: Sequence[_Kind], targets: Sequence[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Pair kinds whose names differ in one segment, which is short for the other and for nothing else: `k`, `key`."""
    index: dict[tuple[Form, Names, Names], list[_Kind]] = {}
    for source in sources:
        for at in range(len(source.masked)):
            index.setdefault((source.form, source.masked[:at], source.masked[at + 1 :]), []).append(source)
    edges: list[tuple[_Kind, _Kind]] = []
    for target in targets:
        for at, segment in enumerate(target.masked):
            near = index.get((target.form, target.masked[:at], target.masked[at + 1 :]), ())
            edges += [
                (source, target)
                for source in (near if len(near) <= _MAX_CANDIDATES else ())
                if source.slots == target.slots and _is_short_for(source.masked[at], segment)
            ]
    sides = [collections.Counter(id(edge[side]) for edge in edges) for side in (0, 1)]
    yield from ((old, new) for old, new in edges if sides[0][id(old)] == sides[1][id(new)] == 1)


def _is_short_for(one: str, other: str) -> bool:
    short, long = sorted((_CORE_AFFIXES.sub("", one.lower()), _CORE_AFFIXES.sub("", other.lower())), key=len)
    return short.isalpha() and long.startswith(short)


def _find_by_parent(sources: Sequence[_Kind], targets: Sequence[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Pair kinds with the same parent and other last names: alone of their form there, or alike."""
    index: dict[tuple[Form, Names], list[_Kind]] = {}
    for source in sources:
        index.setdefault((source.form, source.masked[:-1]), []).append(source)
    wanted = collections.Counter((target.form, target.masked[:-1]) for target in targets)
    edges = []
    for target in targets:
        near = index.get((target.form, target.masked[:-1]), [])[:_MAX_CANDIDATES]
        for source in near:
            alone = len(near) == 1 and wanted[target.form, target.masked[:-1]] == 1
            ratio = difflib.SequenceMatcher(None, source.masked[-1], target.masked[-1]).ratio()
            # The only matrix of its form in a part says more than its name; vectors are often of one form.
            needed = _MIN_RATIO if not alone else 0.0 if len(target.form[2]) > 1 else 0.3
            if ratio >= needed and source.slots == target.slots:
                edges.append((ratio, source, target))
    edges.sort(key=lambda edge: edge[0], reverse=True)
    yield from _take_best((source, target) for _, source, target in edges)


def _find_by_likeness(sources: Sequence[_Kind], targets: Sequence[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Pair the few kinds that are left by the likeness of their names."""
    if max(len(sources), len(targets)) > _MAX_FUZZY:
        return
    edges = []
    for target in targets:
        for source in sources:
            if source.form == target.form and source.slots == target.slots:
                ratio = _compare_differing(source.words, target.words)
                if ratio >= _MIN_RATIO and len(source.members) == len(target.members):
                    edges.append((ratio, source, target))
    edges.sort(key=lambda edge: edge[0], reverse=True)
    yield from _take_best((source, target) for _, source, target in edges)


def _take_best(edges: Iterable[tuple[_Kind, _Kind]]) -> Iterable[tuple[_Kind, _Kind]]:
    done: set[int] = set()
    for source, target in edges:
        if id(source) not in done and id(target) not in done:
            done |= {id(source), id(target)}
            yield source, target


def _strip_common_end(old: Names, new: Names) -> tuple[Names, Names]:
    end = 0
    while end < min(len(old), len(new)) and old[-1 - end] == new[-1 - end]:
        end += 1
    return old[: len(old) - end], new[: len(new) - end]


def _compare_differing(old: tuple[str, ...], new: tuple[str, ...]) -> float:
    """Return the likeness of two names without the words that both begin and end with."""
    begin = _count_common(old, new)
    old, new = old[begin:], new[begin:]
    end = _count_common(old[::-1], new[::-1])
    return difflib.SequenceMatcher(None, ".".join(old[: len(old) - end]), ".".join(new[: len(new) - end])).ratio()


def _count_common(old: Sequence[str], new: Sequence[str]) -> int:
    count = 0
    while count < min(len(old), len(new)) and old[count] == new[count]:
        count += 1
    return count


def _overlap(old: Sequence[str], new: Sequence[str]) -> float:
    return len(set(old) & set(new)) / max(1, len(set(old) | set(new)))

# SPDX-License-Identifier: Apache-2.0
"""Trace each leaf that a state lacks to its likely source among the leaves on disk.

The strongest evidence comes first, and every leaf is used once: the same names with shifted numbers, other names of
equal form, several leaves that are layers of one array and the reverse, fused arrays, transposed ones, then the same
with another dtype, then other sizes. Copies come last: they take nothing away. What no stage finds is new, or of no
use.

A leaf that fits by its name stays where it is, with one exception: a sequence into which something was inserted
(`layers.1` is now `layers.2`, and `layers.2` is `layers.4`) keeps its order, although some of its names fit by chance.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from ...tree.leaf_paths import Names
from ...tree.match import is_transposed
from ...tree.records import Record
from ..plan import RestorePlan, SourceLeaf
from ..resize import Shape
from .kinds import Candidate, Form, find_slots, list_numbers, mask_path, pair_candidates, split_words

PLACE = "\x00"
"""Stands in a name for the number of a layer, or for the names of pieces."""

type How = Literal["rename", "copy", "stack", "unstack", "merge", "split"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Where one leaf of the state comes from, or several that are made of one.

    Attributes:
        how: What gives the leaves their new names.
        old: The name on disk; with `PLACE` in it if several are joined.
        new: The name in the state; with `PLACE` in it if one is taken apart.
        sources: The leaves on disk, in order.
        targets: The leaves of the state, in order.
        axis: The axis along which arrays are joined or taken apart.
        pieces: Names of the pieces of a fused array.
        sizes: Sizes of its pieces, if they differ.
        axes: How the result is transposed; empty if it is not.
    """

    how: How
    old: Names
    new: Names
    sources: tuple[Names, ...]
    targets: tuple[Names, ...]
    axis: int = 0
    pieces: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


_FUSED = (
    *(("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv")),
    *(("to_q", "to_k", "to_v"), ("gate", "up"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3")),
    *(("k", "v"), ("key", "value"), ("k_proj", "v_proj")),
)
"""Names of the pieces that models fuse, in the order in which they do."""
_HEAD_WORDS = frozenset({"head", "logit", "logits", "unembed", "output", "decode", "classifier", "vocab"})
_EMBED_WORDS = frozenset({"embed", "embedder", "embedding", "token", "tok", "word", "vocab", "input"})
_COPY_WORDS = frozenset(
    {"ema", "average", "averaged", "avg", "shadow", "target", "teacher", "slow", "polyak", "reference", "ref", "swa"}
)
_PERMUTATIONS = {2: ((1, 0),), 3: ((0, 2, 1), (2, 1, 0)), 4: ((2, 3, 1, 0), (3, 2, 0, 1), (0, 1, 3, 2))}


def trace_leaves(plan: RestorePlan) -> list[Trace]:
    """Return where the leaves that a plan lacks come from; leaves that fit and stay have no trace.

    Args:
        plan: A plan with differences.
    """
    tracer = _Tracer(plan)
    tracer.restore_order()
    for strict, exact in ((True, True), (True, False), (False, True), (False, False)):
        tracer.strict, tracer.exact = strict, exact
        if not exact and not tracer.has_other_dtypes():
            continue
        if not exact:
            tracer.match_same_names(lambda old, new: old.shape == new.shape)
        if tracer.is_from_torch():
            tracer.transpose()
        for stage in (tracer.rename, tracer.stack, tracer.unstack, tracer.split, tracer.merge, tracer.transpose):
            stage()
    tracer.match_same_names(lambda old, new: _can_resize(old.shape, new.shape))
    tracer.resize()
    tracer.copy()
    return tracer.finish()


def _can_resize(old: Sequence[int], new: Sequence[int]) -> bool:
    return len(old) == len(new) and not is_transposed(old, new)


class _Tracer:
    """The leaves that have no place yet, and the traces found so far."""

    def __init__(self, plan: RestorePlan) -> None:
        self.exact, self.strict = True, True
        unfit = {each.path for each in plan.differences}
        self._records = dict(plan.state_records)
        self._sources = {source.path: source for source in plan.sources if not source.opaque}
        # A whole item that is missing has one difference.
        lacking = {path for path in self._records if path in unfit or path[:1] in unfit}
        placed = {leaf.path: leaf.source for leaf in plan.placed_leaves if leaf.source is not None}
        used = {source.path for path, source in placed.items() if path not in unfit}
        self._fits = {
            path: source.path for path, source in placed.items() if path in self._records and path not in unfit
        }
        self.wanted = {path: record for path, record in self._records.items() if path in lacking}
        self.stored = {path: source for path, source in self._sources.items() if path not in used}
        self._traces: list[Trace] = []

    def _get_form(self, kind: str, dtype: str, shape: Sequence[int]) -> Form:
        return (kind, dtype if self.exact or kind == "key" else "", tuple(shape))

    def _add(self, trace: Trace) -> None:
        if all(path in self.stored for path in trace.sources) and all(path in self.wanted for path in trace.targets):
            for path in trace.sources:
                del self.stored[path]
            for path in trace.targets:
                del self.wanted[path]
            self._traces.append(trace)

    def _list_stored(self) -> Iterator[tuple[Names, Form]]:
        for path, source in self.stored.items():
            yield path, self._get_form(source.record.kind, source.dtype, source.shape)

    def _list_wanted(self) -> Iterator[tuple[Names, Form]]:
        for path, record in self.wanted.items():
            yield path, self._get_form(record.kind, record.dtype, record.shape)

    def restore_order(self) -> None:
        """Pair the members of sequences in order, if the sequence on disk has members that the state does not name."""
        loose = {(mask_path(path), form) for path, form in self._list_stored()}
        loose &= {(mask_path(path), form) for path, form in self._list_wanted()}
        if not loose:
            return
        groups: dict[tuple[Names, Form], tuple[list[Names], list[Names]]] = {key: ([], []) for key in loose}
        for path, source in self._sources.items():
            key = (mask_path(path), self._get_form(source.record.kind, source.dtype, source.shape))
            if key in groups and (path in self.stored or self._fits.get(path) == path):
                groups[key][0].append(path)
        for path, record in self._records.items():
            key = (mask_path(path), self._get_form(record.kind, record.dtype, record.shape))
            if key in groups and (path in self.wanted or self._fits.get(path) == path):
                groups[key][1].append(path)
        for olds, news in groups.values():
            olds.sort(key=list_numbers)
            news.sort(key=list_numbers)
            pairs = list(zip(olds, news))
            if not _is_shifted(olds, news):
                continue
            for path in olds:
                self.stored[path] = self._sources[path]
                self._fits.pop(path, None)
            for path in news:
                self.wanted[path] = self._records[path]
            for old, new in pairs:
                self._add(Trace(how="rename", old=old, new=new, sources=(old,), targets=(new,)))

    def match_same_names(self, is_alike: Callable[[SourceLeaf, Record], bool]) -> None:
        """Pair leaves of equal names that differ in dtype or size."""
        for path in [path for path in self.wanted if path in self.stored]:
            old, new = self.stored[path], self.wanted[path]
            if {old.record.kind, new.kind} <= {"array", "empty"} and is_alike(old, new):
                self._add(Trace(how="rename", old=path, new=path, sources=(path,), targets=(path,)))

    def has_other_dtypes(self) -> bool:
        """Return whether a cast could help: whether what is left has more than one dtype."""
        dtypes = {source.dtype for source in self.stored.values()} | {record.dtype for record in self.wanted.values()}
        return bool(self.stored and self.wanted) and len(dtypes) > 1

    def is_from_torch(self) -> bool:
        """Return whether matrices named as PyTorch names them, which stores them as (out, in), become kernels."""
        names = [
            {path[-1] for path, form in leaves if len(form[2]) == 2}
            for leaves in (self._list_stored(), self._list_wanted())
        ]
        return "weight" in names[0] and "kernel" in names[1]

    def rename(self) -> None:
        """Pair leaves of equal form."""
        stored = [Candidate(path, form, (path,)) for path, form in self._list_stored()]
        self._pair(stored, self._list_plain(), self._make_rename)

    def transpose(self) -> None:
        """Pair leaves with those whose axes are in another order."""
        stored = [
            Candidate(path, _permute(form, axes), (path,), axes)
            for path, form in self._list_stored()
            for axes in _list_permutations(form)
        ]
        self._pair(stored, self._list_plain(), self._make_rename)

    def _list_plain(self) -> list[Candidate]:
        return [Candidate(path, form, (path,)) for path, form in self._list_wanted()]

    def _pair(
        self, stored: list[Candidate], wanted: list[Candidate], make: Callable[[Candidate, Candidate], Trace]
    ) -> None:
        forms = {each.form for each in stored} & {each.form for each in wanted}
        if forms:
            kept = [[each for each in side if each.form in forms] for side in (stored, wanted)]
            for old, new in pair_candidates(kept[0], kept[1], strict=self.strict):
                self._add(make(old, new))

    @staticmethod
    def _make_rename(old: Candidate, new: Candidate) -> Trace:
        axes = old.detail if isinstance(old.detail, tuple) else ()
        return Trace(
            how="rename", old=old.leaves[0], new=new.leaves[0], sources=old.leaves, targets=new.leaves, axes=axes
        )

    def stack(self) -> None:
        """Pair arrays with the layers that they consist of."""
        wanted = self._list_plain()
        found = [
            Candidate(each.path, form, each.leaves, (each.detail, axis, axes))
            for each in _collapse(self._list_stored())
            for axis, axes, form in _list_stacked(each.form, len(each.leaves))
        ]

        def make(old: Candidate, new: Candidate) -> Trace:
            place, axis, axes = old.detail  # type: ignore[misc]
            return Trace(
                how="stack", old=place, new=new.path, sources=old.leaves, targets=new.leaves, axis=axis, axes=axes
            )

        self._pair(found, wanted, make)

    def unstack(self) -> None:
        """Pair layers with the array that they are stored in."""
        stored = [Candidate(path, form, (path,)) for path, form in self._list_stored()]
        found = [
            Candidate(each.path, form, each.leaves, (each.detail, axis, axes))
            for each in _collapse(self._list_wanted())
            if [list_numbers(path)[each.numbers_before] for path in each.leaves] == list(range(len(each.leaves)))
            for axis, axes, form in _list_stacked(each.form, len(each.leaves), inverse=True)
        ]

        def make(old: Candidate, new: Candidate) -> Trace:
            place, axis, axes = new.detail  # type: ignore[misc]
            return Trace(
                how="unstack", old=old.path, new=place, sources=old.leaves, targets=new.leaves, axis=axis, axes=axes
            )

        self._pair(stored, found, make)

    def split(self) -> None:
        """Pair query, key and value with the array that they are fused in."""
        stored = [Candidate(path, form, (path,)) for path, form in self._list_stored()]
        shapes = {path: record.shape for path, record in self.wanted.items()}

        def make(old: Candidate, new: Candidate) -> Trace:
            place, axis, pieces, sizes, axes = new.detail  # type: ignore[misc]
            return Trace(
                how="split",
                old=old.path,
                new=place,
                sources=old.leaves,
                targets=new.leaves,
                axis=axis,
                pieces=pieces,
                sizes=sizes,
                axes=axes,
            )

        self._pair(stored, list(_fuse(dict(self._list_wanted()), shapes, inverse=True)), make)

    def merge(self) -> None:
        """Pair a fused array with the query, key and value that it consists of."""
        shapes = {path: source.shape for path, source in self.stored.items()}

        def make(old: Candidate, new: Candidate) -> Trace:
            place, axis, pieces, _, axes = old.detail  # type: ignore[misc]
            return Trace(
                how="merge",
                old=place,
                new=new.path,
                sources=old.leaves,
                targets=new.leaves,
                axis=axis,
                pieces=pieces,
                axes=axes,
            )

        self._pair(list(_fuse(dict(self._list_stored()), shapes)), self._list_plain(), make)

    def resize(self) -> None:
        """Pair leaves of other sizes where a part above them was renamed with its other leaves."""
        changes = {_get_change(trace.old, trace.new) for trace in self._traces if trace.how == "rename"}

        def make_candidates(leaves: Iterable[tuple[Names, Form]]) -> list[Candidate]:
            return [Candidate(path, (kind, "", (len(shape),)), (path,)) for path, (kind, _, shape) in leaves if shape]

        for old, new in pair_candidates(make_candidates(self._list_stored()), make_candidates(self._list_wanted())):
            shapes = self._sources[old.path].shape, self._records[new.path].shape
            if _get_change(old.path, new.path) in changes and _can_resize(*shapes):
                self._add(self._make_rename(old, new))

    def copy(self) -> None:
        """Find leaves of which the state has one more than the disk: averages, untied heads, counters of updates."""
        final = dict(self._fits)
        final |= {
            trace.targets[0]: trace.sources[0] for trace in self._traces if trace.how == "rename" and not trace.axes
        }
        self._copy_items(final)
        heads, counts = [], []
        for path, record in self.wanted.items():
            if record.kind == "array" and len(record.shape) == 2 and _HEAD_WORDS.intersection(split_words(path)):
                heads.append(path)
            elif (record.dtype, record.shape, path[-1]) == ("int32", (), "count"):
                counts.append(path)
        if heads:
            tied = [path for path in final if _EMBED_WORDS.intersection(split_words(path))]
            for path in heads:
                self._copy_nearest(path, [each for each in tied if len(self._records[each].shape) == 2], final)
        if counts:
            same = [path for path in final if path[-1] == "count"]
            for path in counts:
                self._copy_nearest(path, same[:64], final)

    def _copy_nearest(self, path: Names, sources: Iterable[Names], final: dict[Names, Names]) -> None:
        new = self.wanted[path]
        slots = find_slots(path)
        best: tuple[int, Names, tuple[int, ...]] | None = None
        for each in sources:
            old = self._records[each]
            axes: tuple[int, ...] = ()
            if old.dtype != new.dtype or each[0] != path[0] or find_slots(each) != slots:
                continue
            if old.shape != new.shape:
                if old.shape != new.shape[::-1]:
                    continue
                axes = (1, 0)
            near = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(each, path)))
            if best is None or near > best[0]:
                best = (near, each, axes)
        if best is not None:
            self._add_copy(best[1], path, final, best[2])

    def _add_copy(self, old: Names, new: Names, final: dict[Names, Names], axes: tuple[int, ...] = ()) -> None:
        del self.wanted[new]
        self._traces.append(Trace(how="copy", old=old, new=new, sources=(final[old],), targets=(new,), axes=axes))

    def _copy_items(self, final: dict[Names, Names]) -> None:
        by_part: dict[Names, dict[Names, Names]] = collections.defaultdict(dict)
        for path in self._records:
            for depth in (1, 2):
                if len(path) > depth:
                    by_part[path[:depth]][path[depth:]] = path
        for part, leaves in by_part.items():
            if not _COPY_WORDS.intersection(split_words(part[-1:])) or not all(
                path in self.wanted for path in leaves.values()
            ):
                continue
            for other, theirs in by_part.items():
                if other != part and all(
                    rest in theirs and theirs[rest] in final and self._is_same_form(theirs[rest], path)
                    for rest, path in leaves.items()
                ):
                    for rest, path in leaves.items():
                        self._add_copy(theirs[rest], path, final)
                    break

    def _is_same_form(self, one: Names, other: Names) -> bool:
        a, b = self._records[one], self._records[other]
        return (a.kind, a.dtype, a.shape) == (b.kind, b.dtype, b.shape)

    def finish(self) -> list[Trace]:
        """Return the traces; square arrays are transposed with the others of their names."""
        turned, plain = set(), set()
        for trace in self._traces:
            if (shape := self._get_matrix_shape(trace)) is not None:
                key = (trace.old[-1], trace.new[-1])
                if trace.axes:
                    turned.add(key)
                elif shape[0] != shape[1]:
                    plain.add(key)
        squares = turned - plain
        return [
            dataclasses.replace(trace, axes=(0, 2, 1) if trace.how == "stack" else (1, 0))
            if (trace.old[-1], trace.new[-1]) in squares and self._get_matrix_shape(trace) is not None
            else trace
            for trace in self._traces
        ]

    def _get_matrix_shape(self, trace: Trace) -> tuple[int, ...] | None:
        """Return the shape of the matrices that a trace moves; None if it moves something else."""
        if trace.how in ("copy", "merge"):
            return None
        shape = self._sources[trace.sources[0]].shape
        if trace.how in ("split", "unstack"):
            shape = self._records[trace.targets[0]].shape
        return shape if len(shape) == 2 else None


def _is_shifted(olds: Sequence[Names], news: Sequence[Names]) -> bool:
    """Return whether a sequence may have kept its order while its numbers changed."""
    numbers = [[list_numbers(path) for path in side] for side in (olds, news)]
    varying = [at for at, column in enumerate(zip(*numbers[0], *numbers[1])) if len(set(column)) > 1]
    if len(olds) != len(news) and len(varying) > 1:
        return False
    # What begins at a large number is not a sequence of layers but a choice of names.
    is_sequence = all(side[0][at] <= 1 for side in numbers for at in varying[-1:])
    moves_fits = any(old != new and (old in news or new in olds) for old, new in zip(olds, news))
    return is_sequence or not moves_fits


def _get_change(old: Names, new: Names) -> tuple[Names, Names]:
    end = 0
    while end < min(len(old), len(new)) and old[-1 - end] == new[-1 - end]:
        end += 1
    return mask_path(old[: len(old) - end]), mask_path(new[: len(new) - end])


def _permute(form: Form, axes: Sequence[int]) -> Form:
    kind, dtype, shape = form
    return (kind, dtype, tuple(shape[axis] for axis in axes)) if kind in ("array", "empty") else form


def _list_permutations(form: Form) -> list[tuple[int, ...]]:
    """Return one permutation for each form that is not the same."""
    found = {_permute(form, axes): axes for axes in reversed(_PERMUTATIONS.get(len(form[2]), ()))}
    found.pop(form, None)
    return list(found.values())


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers(Candidate):
    """Leaves whose names differ in one number, in its order; `detail` is their name with `PLACE` for the number."""

    numbers_before: int = 0


def _collapse(leaves: Iterable[tuple[Names, Form]]) -> Iterator[_Layers]:
    """Yield each group of leaves of one form whose names differ in one number."""
    groups: dict[tuple[Names, Form, int], list[tuple[int, Names]]] = {}
    for path, form in leaves:
        place = 0
        for at, part in enumerate(path):
            for number in re.finditer(r"\d+", part):
                marked = part[: number.start()] + PLACE + part[number.end() :]
                groups.setdefault(((*path[:at], marked, *path[at + 1 :]), form, place), []).append(
                    (int(number[0]), path)
                )
                place += 1
    for (name, form, place), members in groups.items():
        if len(members) < 2:
            continue
        members.sort()
        plain = tuple(part.replace(PLACE, "").strip("_-.") if PLACE in part else part for part in name if part != PLACE)
        if all(plain):
            yield _Layers(plain, form, tuple(path for _, path in members), name, place)


def _list_stacked(form: Form, count: int, *, inverse: bool = False) -> Iterator[tuple[int, tuple[int, ...], Form]]:
    """Yield axis, permutation of the result and form for each way in which arrays of a form may be stacked."""
    kind, dtype, shape = form
    rank = len(shape)
    seen = set()
    for axis in range(rank + 1 if kind != "value" else 0):
        stacked = (*shape[:axis], count, *shape[axis:])
        if stacked not in seen:
            seen.add(stacked)
            yield axis, (), (kind, dtype, stacked)
    if rank == 2 and kind == "array" and shape[0] != shape[1]:
        turned = (0, 2, 1) if not inverse else (1, 0)
        yield 0, turned, (kind, dtype, (count, shape[1], shape[0]))


def _fuse(
    leaves: dict[Names, Form], shapes: dict[Names, tuple[int, ...]], *, inverse: bool = False
) -> Iterator[Candidate]:
    """Yield each array that could be fused of several leaves, for each axis and orientation.

    `detail` is the name with `PLACE`, the axis, the names of the pieces, their sizes if they differ, and a permutation.
    """
    first: dict[str, list[tuple[str, ...]]] = {}
    for pieces in _FUSED:
        first.setdefault(pieces[0], []).append(pieces)
    for path, (kind, dtype, shape) in leaves.items():
        if kind != "array" or not 1 <= len(shape) <= 2:
            continue
        for at in range(max(1, len(path) - 3), len(path)):
            for pieces in first.get(path[at], ()):
                members = [(*path[:at], name, *path[at + 1 :]) for name in pieces]
                if not all(each in leaves and leaves[each][:2] == (kind, dtype) for each in members):
                    continue
                sizes = [shapes[each] for each in members]
                yield from _fuse_members(path, at, pieces, sizes, tuple(members), (kind, dtype), inverse)


def _fuse_members(
    path: Names,
    at: int,
    pieces: tuple[str, ...],
    shapes: Sequence[Shape],
    members: tuple[Names, ...],
    kind_and_dtype: tuple[str, str],
    inverse: bool,
) -> Iterator[Candidate]:
    rank, seen = len(shapes[0]), set[Shape]()
    if any(len(each) != rank for each in shapes):
        return
    name, plain = (*path[:at], PLACE, *path[at + 1 :]), (*path[:at], "_".join(pieces), *path[at + 1 :])
    for transposed in (False, True) if rank == 2 else (False,):
        for axis in range(rank):
            if len({each[:axis] + each[axis + 1 :] for each in shapes}) > 1:
                continue
            sizes = tuple(each[axis] for each in shapes)
            shown = () if len(set(sizes)) == 1 else sizes
            total = (*shapes[0][:axis], sum(sizes), *shapes[0][axis + 1 :])
            total = total[::-1] if transposed else total
            if total in seen:
                continue
            seen.add(total)
            # The pieces are transposed after the split, but the fused array after the merge.
            place = (1 - axis if transposed and inverse else axis) - rank
            detail = (name, place, pieces, shown, (1, 0) if transposed else ())
            yield Candidate(plain, (*kind_and_dtype, total), members, detail)

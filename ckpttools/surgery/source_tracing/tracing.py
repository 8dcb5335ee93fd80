# SPDX-License-Identifier: Apache-2.0
"""Trace each leaf of the state that does not fit to its likely source among the leaves on disk.

The strongest evidence comes first, and every leaf is used once: the same names with shifted numbers, other names of
equal form, leaves that are layers of one array and the reverse, fused arrays, transposed ones, then the same stages
with another dtype, then other sizes. Copies come last, since they use up no source. A leaf of the state that no stage
finds is new; a leaf on disk that no stage uses is dropped.

A leaf that fits by its name keeps its place, with one exception: a sequence into which something was inserted
(`layers.1` is now `layers.2`, and `layers.2` is `layers.4`) keeps its order, although some of its names fit by chance.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from ...tree.leaf_paths import Names
from ...tree.match import is_transposed
from ...tree.records import Record, get_host_shape
from ..plan import RestorePlan, SourceLeaf
from ..resize import Shape
from .arrangements import find_order, list_fused, list_plain, list_stacked, list_transposed
from .kinds import Arrangement, Candidate, Form, find_slots, list_numbers, mask_path, pair_candidates, split_words

type How = Literal["rename", "copy", "stack", "unstack", "merge", "split"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The source of one leaf of the state, or of several that come from one source.

    Attributes:
        how: The operation that moves the leaves.
        old: The name on disk, containing `PLACE` if several are joined.
        new: The name in the state, containing `PLACE` if one is split or unstacked.
        sources: The leaves on disk, in order.
        targets: The leaves of the state, in order.
        axis: The axis along which arrays are joined, split or unstacked.
        pieces: Names of the pieces of a fused array.
        sizes: Sizes of its pieces, if they differ.
        axes: The permutation of the result's axes; empty without one.
        assumption: What the names do not say and has to be checked: "order" of the pieces of a fused array, or "square"
            for a matrix that would have to be transposed if PyTorch has written it; "" if nothing.
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
    assumption: Literal["", "order", "square"] = ""


_HEAD_WORDS = frozenset({"head", "logit", "logits", "unembed", "output", "decode", "classifier", "vocab"})
_EMBED_WORDS = frozenset({"embed", "embedder", "embedding", "token", "tok", "word", "vocab", "input"})
_COPY_WORDS = frozenset(
    {"ema", "average", "averaged", "avg", "shadow", "target", "teacher", "slow", "polyak", "reference", "ref", "swa"}
)


def trace_leaves(plan: RestorePlan) -> list[Trace]:
    """Return the traces of the leaves that do not fit; leaves that fit and stay have none.

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
    tracer.convert_keys()
    tracer.match_same_names(lambda old, new: _can_resize(old.shape, new.shape))
    tracer.resize()
    tracer.copy()
    return tracer.finish()


def _get_data_form(record: Record, shape: Shape) -> Form:
    """Return the form of an array, or of the data of typed keys, which is stored in that of an array."""
    host_shape, dtype = get_host_shape(dataclasses.replace(record, shape=shape))
    return ("array", dtype.name, host_shape)


def _can_resize(old: Sequence[int], new: Sequence[int]) -> bool:
    return len(old) == len(new) and not is_transposed(old, new)


class _Tracer:
    """The leaves without a match yet, and the traces found so far."""

    def __init__(self, plan: RestorePlan) -> None:
        self.exact, self.strict = True, True
        unfit = {each.path for each in plan.differences}
        self._records = dict(plan.state_records)
        self._sources = {
            source.path: source
            for source in plan.sources
            if not source.opaque and source.path not in plan.recomputed_paths
        }
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
        # No cast takes the imaginary part away.
        if any(self._sources[path].dtype.startswith("complex") for path in trace.sources) and not all(
            self._records[path].dtype.startswith("complex") for path in trace.targets
        ):
            return
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
        # Scalars are too alike; the parts around them identify them.
        loose = {(mask_path(path), form) for path, form in self._list_stored() if form[2]}
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
            are_arrays = {old.record.kind, new.kind} <= {"array", "empty"}
            are_keys = old.record.kind == new.kind == "key" and old.dtype == new.dtype
            if (are_arrays or are_keys) and is_alike(old, new):
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
        self._pair("rename", list_plain(self._list_stored()), list_plain(self._list_wanted()))

    def transpose(self) -> None:
        """Pair leaves with those whose axes are in another order."""
        self._pair("rename", list_transposed(self._list_stored()), list_plain(self._list_wanted()))

    def convert_keys(self) -> None:
        """Pair typed keys with arrays of their data, and the reverse: `compare` accepts both."""
        for stored_kind, wanted_kind in (("array", "key"), ("key", "array")):
            stored = [
                Candidate(path, _get_data_form(source.record, source.shape), (path,))
                for path, source in self.stored.items()
                if source.record.kind == stored_kind and source.dtype == source.record.dtype
            ]
            wanted = [
                Candidate(path, _get_data_form(record, record.shape), (path,))
                for path, record in self.wanted.items()
                if record.kind == wanted_kind
            ]
            self._pair("rename", stored, wanted)

    def stack(self) -> None:
        """Pair arrays with the layers that they consist of."""
        stacked = list_stacked(self._list_stored(), are_wanted=False)
        self._pair("stack", stacked, list_plain(self._list_wanted()))

    def unstack(self) -> None:
        """Pair layers with the array that they are stored in."""
        self._pair("unstack", list_plain(self._list_stored()), list_stacked(self._list_wanted(), are_wanted=True))

    def split(self) -> None:
        """Pair query, key and value with the array that they are fused in."""
        fused = list_fused(dict(self._list_wanted()), are_wanted=True)
        self._pair("split", list_plain(self._list_stored()), list(fused))

    def merge(self) -> None:
        """Pair a fused array with the query, key and value that it consists of."""
        fused = list_fused(dict(self._list_stored()), are_wanted=False)
        self._pair("merge", list(fused), list_plain(self._list_wanted()))

    def _pair(self, how: How, stored: list[Candidate], wanted: list[Candidate]) -> None:
        forms = {each.form for each in stored} & {each.form for each in wanted}
        if forms:
            kept = [[each for each in side if each.form in forms] for side in (stored, wanted)]
            for old, new in pair_candidates(kept[0], kept[1], strict=self.strict):
                self._add(_make_trace(how, old, new))

    def resize(self) -> None:
        """Pair leaves of other sizes where a part above them was renamed with its other leaves."""
        changes = {_get_change(trace.old, trace.new) for trace in self._traces if trace.how == "rename"}

        def make_candidates(leaves: Iterable[tuple[Names, Form]]) -> list[Candidate]:
            return [
                Candidate(path, (kind, dtype if kind == "key" else "", (len(shape),)), (path,))
                for path, (kind, dtype, shape) in leaves
                if shape
            ]

        for old, new in pair_candidates(make_candidates(self._list_stored()), make_candidates(self._list_wanted())):
            shapes = self._sources[old.path].shape, self._records[new.path].shape
            if _get_change(old.path, new.path) in changes and _can_resize(*shapes):
                self._add(_make_trace("rename", old, new))

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
        found = []
        for trace in self._traces:
            key, shape = (trace.old[-1], trace.new[-1]), self._get_matrix_shape(trace)
            if shape is not None and key in squares:
                trace = dataclasses.replace(trace, axes=(0, 2, 1) if trace.how == "stack" else (1, 0))
            elif shape is not None and key == ("weight", "kernel") and key not in plain and not trace.axes:
                trace = dataclasses.replace(trace, assumption="square")
            found.append(trace)
        return found

    def _get_matrix_shape(self, trace: Trace) -> tuple[int, ...] | None:
        """Return the shape of the matrices that a trace moves; None if it moves something else."""
        if trace.how in ("copy", "merge"):
            return None
        shape = self._sources[trace.sources[0]].shape
        if trace.how in ("split", "unstack"):
            shape = self._records[trace.targets[0]].shape
        return shape if len(shape) == 2 else None


def _make_trace(how: How, old: Candidate, new: Candidate) -> Trace:
    arrangement = old.detail or new.detail or Arrangement()
    trace = Trace(
        how=how,
        old=old.detail.name if old.detail and old.detail.name else old.path,
        new=new.detail.name if new.detail and new.detail.name else new.path,
        sources=old.leaves,
        targets=new.leaves,
        axis=arrangement.axis,
        pieces=arrangement.pieces,
        sizes=arrangement.sizes,
        axes=arrangement.axes,
    )
    return _order_pieces(trace) if how in ("merge", "split") else trace


def _order_pieces(trace: Trace) -> Trace:
    """Return a trace with the pieces of its fused array in the order that the array's name says, if it says one."""
    order = find_order(trace.new if trace.how == "merge" else trace.old, trace.pieces)
    if not order:
        return dataclasses.replace(trace, assumption="order")
    is_merge = trace.how == "merge"
    ordered = tuple((trace.sources if is_merge else trace.targets)[at] for at in order)
    return dataclasses.replace(
        trace,
        pieces=tuple(trace.pieces[at] for at in order),
        sizes=tuple(trace.sizes[at] for at in order) if trace.sizes else (),
        sources=ordered if is_merge else trace.sources,
        targets=trace.targets if is_merge else ordered,
    )


def _is_shifted(olds: Sequence[Names], news: Sequence[Names]) -> bool:
    """Return whether a sequence may have kept its order while its numbers changed."""
    numbers = [[list_numbers(path) for path in side] for side in (olds, news)]
    varying = [at for at, column in enumerate(zip(*numbers[0], *numbers[1])) if len(set(column)) > 1]
    if len(olds) != len(news) and len(varying) > 1:
        return False
    # What begins at a large number is not a sequence of layers but a choice of names.
    is_sequence = all(side[0][at] <= 1 for side in numbers for at in varying[-1:])
    both = set(olds) & set(news)
    moves_fits = any(old != new and (old in both or new in both) for old, new in zip(olds, news))
    return is_sequence or not moves_fits


def _get_change(old: Names, new: Names) -> tuple[Names, Names]:
    end = 0
    while end < min(len(old), len(new)) and old[-1 - end] == new[-1 - end]:
        end += 1
    return mask_path(old[: len(old) - end]), mask_path(new[: len(new) - end])

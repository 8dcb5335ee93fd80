# SPDX-License-Identifier: Apache-2.0
"""Arrays that could be made from leaves, or split into leaves: transposed, stacked, fused.

Each is a candidate with the name and form that it would have, which are compared with the leaves on the other side.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...tree.leaf_paths import Names
from ..resize import Shape
from .kinds import PLACE, Arrangement, Candidate, Form

_FUSED: tuple[tuple[str, ...], ...] = (
    *(("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv")),
    *(("to_q", "to_k", "to_v"), ("gate", "up"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3")),
    *(("k", "v"), ("key", "value"), ("k_proj", "v_proj")),
)
"""Names of the pieces that models fuse, in the order of the fused array."""
_PERMUTATIONS = {2: ((1, 0),), 3: ((0, 2, 1), (2, 1, 0)), 4: ((2, 3, 1, 0), (3, 2, 0, 1), (0, 1, 3, 2))}


def list_plain(leaves: Iterable[tuple[Names, Form]]) -> list[Candidate]:
    """Return the leaves as they are."""
    return [Candidate(path, form, (path,)) for path, form in leaves]


def list_transposed(leaves: Iterable[tuple[Names, Form]]) -> list[Candidate]:
    """Return the leaves with their axes in each of the other common orders."""
    return [
        Candidate(path, _permute(form, axes), (path,), Arrangement(axes=axes))
        for path, form in leaves
        for axes in _list_permutations(form)
    ]


def list_stacked(leaves: Iterable[tuple[Names, Form]], *, are_wanted: bool) -> list[Candidate]:
    """Return each array that could be stacked from leaves whose names differ in one number.

    Args:
        leaves: The leaves.
        are_wanted: Whether they are leaves of the state, numbered from 0, and the array is on disk.
    """
    return [
        Candidate(each.plain, form, each.leaves, Arrangement(name=each.name, axis=axis, axes=axes))
        for each in _collapse(leaves)
        if not are_wanted or each.indices == tuple(range(len(each.leaves)))
        for axis, axes, form in _list_stacked_forms(each.form, len(each.leaves), are_wanted=are_wanted)
    ]


def _permute(form: Form, axes: Sequence[int]) -> Form:
    kind, dtype, shape = form
    return (kind, dtype, tuple(shape[axis] for axis in axes)) if kind in ("array", "empty") else form


def _list_permutations(form: Form) -> list[tuple[int, ...]]:
    """Return one permutation for each different form that permuting the axes gives."""
    found = {_permute(form, axes): axes for axes in reversed(_PERMUTATIONS.get(len(form[2]), ()))}
    found.pop(form, None)
    return list(found.values())


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers:
    """Leaves whose names differ in one number, in its order.

    Attributes:
        name: Their name with `PLACE` for the number.
        plain: Their name without the number.
        form: Their form.
        leaves: The leaves.
        indices: Their numbers.
    """

    name: Names
    plain: Names
    form: Form
    leaves: tuple[Names, ...]
    indices: tuple[int, ...]


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
    for (name, form, _), members in groups.items():
        if len(members) < 2:
            continue
        members.sort()
        plain = tuple(part.replace(PLACE, "").strip("_-.") if PLACE in part else part for part in name if part != PLACE)
        if all(plain):
            yield _Layers(name, plain, form, tuple(path for _, path in members), tuple(index for index, _ in members))


def _list_stacked_forms(form: Form, count: int, *, are_wanted: bool) -> Iterator[tuple[int, tuple[int, ...], Form]]:
    """Yield axis, permutation of the result and form for each way in which arrays of a form may be stacked."""
    kind, dtype, shape = form
    rank = len(shape)
    seen = set[Shape]()
    for axis in range(rank + 1 if kind != "value" else 0):
        stacked = (*shape[:axis], count, *shape[axis:])
        if stacked not in seen:
            seen.add(stacked)
            yield axis, (), (kind, dtype, stacked)
    if rank == 2 and kind == "array" and shape[0] != shape[1]:
        turned = (1, 0) if are_wanted else (0, 2, 1)
        yield 0, turned, (kind, dtype, (count, shape[1], shape[0]))


def list_fused(leaves: Mapping[Names, Form], *, are_wanted: bool) -> Iterator[Candidate]:
    """Yield each array that could be fused of several leaves, for each axis and orientation.

    Args:
        leaves: The leaves.
        are_wanted: Whether they are leaves of the state, and the array on disk.
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
                shapes = [leaves[each][2] for each in members]
                yield from _fuse_members(path, at, pieces, shapes, tuple(members), (kind, dtype), are_wanted)


def find_order(path: Names, pieces: Sequence[str]) -> tuple[int, ...]:
    """Return the order in which the name of a fused array says its pieces; () if it does not name all of them.

    Args:
        path: Name of the fused array, such as ("m", "kqv").
        pieces: Names of the pieces, such as ("q_proj", "k_proj", "v_proj").
    """
    begin, end = _count_shared(pieces), _count_shared([piece[::-1] for piece in pieces])
    cores = [piece[begin : len(piece) - end].lower() for piece in pieces]
    if not all(cores):
        return ()
    names = [f"(?:{'|'.join(map(re.escape, _list_spellings(core)))})" for core in cores]
    for order in itertools.permutations(range(len(pieces))):
        pattern = re.compile("(?:^|[^a-z]|w)" + "[_-]?".join(names[at] for at in order) + "(?:$|[^a-z])", re.IGNORECASE)
        if any(pattern.search(segment) for segment in path):
            return order
    return ()


def _count_shared(words: Sequence[str]) -> int:
    """Return how many characters all words begin with."""
    return sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*words)))


def _list_spellings(core: str) -> list[str]:
    longer = [word for word in ("query", "key", "value") if core == word[0]]
    return [core, core[0], *longer]


def _fuse_members(
    path: Names,
    at: int,
    pieces: tuple[str, ...],
    shapes: Sequence[Shape],
    members: tuple[Names, ...],
    kind_and_dtype: tuple[str, str],
    are_wanted: bool,
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
            place = (1 - axis if transposed and are_wanted else axis) - rank
            detail = Arrangement(name=name, axis=place, pieces=pieces, sizes=shown, axes=(1, 0) if transposed else ())
            yield Candidate(plain, (*kind_and_dtype, total), members, detail)

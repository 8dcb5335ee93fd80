# SPDX-License-Identifier: Apache-2.0
"""Report differences by leaf path, and suggest the surgery that would remove them, with what it would lose.

The suggestion is a guess and is never applied without a request. Each leaf of the state without a match on disk is
traced to its likely source (`source_tracing.tracing`), and the traces are written as few operations. A leaf without a
source keeps its value in the state, a leaf on disk without a target is dropped, and the first line of the suggestion
counts both.

Before it is shown, a suggestion is tested on names and shapes: it must leave no difference, and every leaf must come
from its traced source. A suggestion that would keep nothing of an item is not shown.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import CheckpointError, StructureError
from ..spec.operations import DTYPES, Cast, Drop, Operation, Pad, Reinit, Slice, Transpose, as_code
from ..tree.leaf_paths import Names
from ..tree.match import Difference, mask_numbers
from ..tree.records import Kind, Record, count_host_bytes
from .plan import PlacedLeaf, RestorePlan, SourceLeaf
from .resize import needs_pad, needs_slice
from .source_tracing.patterns import find_covering_patterns, make_patterns
from .source_tracing.tracing import Trace, trace_leaves
from .source_tracing.write_moves import MAX_OPERATIONS, TooManyOperationsError, write_moves
from .suggestion import Suggestion, list_leaf_names

type Replan = Callable[[Sequence[Operation]], RestorePlan]
"""Returns the plan with more operations after the requested ones."""

_MAX_LINES = 100
"""Above this number, leaves are grouped by kind."""


def require_match(step: int, plan: RestorePlan, replan: Replan, requested_operations: Sequence[Operation] = ()) -> None:
    """Raise `StructureError` if there are differences.

    Args:
        step: The step's number.
        plan: What the restore would do.
        replan: Makes the plan with more operations.
        requested_operations: The requested operations; the suggestion begins with them.
    """
    differences = plan.differences
    if not differences:
        return
    suggestion = find_suggestion(plan, replan)
    operations = (*requested_operations, *suggestion.operations) if suggestion else ()
    shown = "".join(f"\n    {line}" for line in format_differences(differences))
    surgery = "".join(f"\n    {as_code(each)}," for each in operations)
    offer = (
        f"this surgery {suggestion.verdict}, if that is what you mean:\n  surgery=[{surgery}\n  ]\n  Or "
        if operations
        else ""
    )
    note = f" No surgery is suggested: {suggestion.reason}." if suggestion.reason else ""
    error = StructureError(
        what=f"step {step} does not fit the state passed in, in {len(differences)} place(s):{shown}",
        why="restoring part of it, or casting, would silently change the model. Nothing was restored or lost.",
        fix=f"{offer}build the state as it was when the step was saved, or leave the item out of the state.{note}",
    )
    error.mismatches = tuple(map(str, differences))
    error.surgery = operations
    raise error


def format_differences(differences: Sequence[Difference]) -> list[str]:
    """Return one line for each difference, or for each kind if there are more than `_MAX_LINES`."""
    if len(differences) <= _MAX_LINES:
        return list(map(str, differences))
    kinds: dict[tuple[Names, str], list[Difference]] = {}
    for each in differences:
        kinds.setdefault((mask_numbers(each.path), each.text.partition(";")[0]), []).append(each)
    shown = []
    for (_, text), same in kinds.items():
        first = ".".join(same[0].path)
        more = f" (and {len(same) - 1} more of its kind, to {'.'.join(same[-1].path)})" if len(same) > 1 else ""
        shown.append(f"{first}: {text}{more}")
    rest = len(shown) - _MAX_LINES
    tail = [f"... and {rest} more kinds; all are in the error's mismatches"] if rest > 0 else []
    return [*shown[:_MAX_LINES], *tail]


def find_suggestion(plan: RestorePlan, replan: Replan) -> Suggestion:
    """Return operations that remove all differences, and what they lose.

    Args:
        plan: What the restore would do.
        replan: Makes the plan with more operations.
    """
    traces = trace_leaves(plan)
    for allow_parts in (True, False):
        try:
            operations = write_operations(plan, traces, allow_parts=allow_parts)
            after = replan(operations)
        except TooManyOperationsError:
            return Suggestion(reason=f"it would take more than {MAX_OPERATIONS} operations")
        except CheckpointError:
            continue
        if operations and not after.differences and _is_as_traced(plan, after, traces):
            suggestion = _weigh(plan, after, operations)
            return dataclasses.replace(suggestion, assumptions=_list_assumptions(traces)) if suggestion else suggestion
    return Suggestion(reason="no patterns were found that select the leaves to move")


def _list_assumptions(traces: Sequence[Trace]) -> tuple[str, ...]:
    """Return what has to be checked before the operations are used."""
    found = []
    fused = [trace for trace in traces if trace.assumption == "order"]
    if fused:
        names = [
            ".".join(path) for trace in fused for path in (trace.targets if trace.how == "merge" else trace.sources)
        ]
        pieces = "{" + ",".join(fused[0].pieces) + "}"
        found.append(f"that {pieces} is the order of the pieces in {list_leaf_names(names)}: the name does not say it")
    squares = [".".join(path) for trace in traces if trace.assumption == "square" for path in trace.sources]
    if squares:
        found.append(
            f"whether {list_leaf_names(squares)} must be transposed: PyTorch stores a weight as (out, in), and a "
            f"square one fits either way"
        )
    return tuple(found)


def write_operations(plan: RestorePlan, traces: Sequence[Trace], *, allow_parts: bool) -> tuple[Operation, ...]:
    """Return operations that put every leaf where the traces say.

    Args:
        plan: What the restore would do without them.
        traces: Where the leaves come from.
        allow_parts: Whether whole parts may be renamed, and not only leaves.
    """
    sources = {source.path: source for source in plan.sources}
    unfit = {each.path for each in plan.differences}
    used = {path for trace in traces for path in trace.sources}
    placed = {leaf.source.path for leaf in plan.placed_leaves if leaf.source is not None and leaf.path not in unfit}
    items = {path[0] for path in (*used, *plan.state_records)}
    found = {path for trace in traces for path in trace.targets}
    moved = {path for trace in traces if trace.how != "copy" for path in trace.sources}
    fresh = [
        path
        for path in plan.state_records
        if path not in found and (path in unfit or path[:1] in unfit or path in moved)
    ]
    taken = used | placed | set(fresh)
    # A leaf on disk whose name is reinitialised needs no `Drop`.
    dropped = [path for path, source in sources.items() if not source.opaque and path[0] in items and path not in taken]
    gone = set(dropped)
    stored = [path for path in sources if path not in gone]
    drops = find_covering_patterns(dropped, stored) if dropped else []
    _require_few(drops)
    operations: list[Operation] = [Drop(each) for each in drops]
    operations += write_moves(traces, stored, allow_parts=allow_parts)
    operations += _write_array_operations(traces, sources, plan.state_records)
    if fresh:
        others = _list_others(plan.state_records, fresh)
        reinits = find_covering_patterns(fresh, others)
        _require_few(reinits)
        operations += [Reinit(each) for each in reinits]
    _require_few(operations)
    return tuple(operations)


def _require_few(found: Sequence[object]) -> None:
    if len(found) > MAX_OPERATIONS:
        raise TooManyOperationsError


def _write_array_operations(
    traces: Sequence[Trace], sources: Mapping[Names, SourceLeaf], records: Mapping[Names, Record]
) -> list[Operation]:
    transposed: dict[tuple[int, ...], list[Names]] = {}
    cast: dict[tuple[str, str], list[Names]] = {}
    padded: list[Names] = []
    sliced: list[Names] = []
    for trace in traces:
        source = sources[trace.sources[0]]
        for path in trace.targets:
            record, shape = records[path], source.shape
            if trace.axes:
                transposed.setdefault(trace.axes if len(trace.axes) > 2 else (), []).append(path)
            if record.kind == "value":
                continue
            if record.dtype != source.dtype and {record.dtype, source.dtype} <= set(DTYPES):
                cast.setdefault((source.dtype, record.dtype), []).append(path)
            if trace.how in ("rename", "copy") and len(shape) == len(record.shape):
                shape = tuple(shape[axis] for axis in trace.axes) if trace.axes else shape
                padded += [path] if needs_pad(shape, record.shape) else []
                sliced += [path] if needs_slice(shape, record.shape) else []
    found: list[Operation] = []
    for axes, paths in transposed.items():
        found += [Transpose(each, axes) for each in make_patterns(paths, _list_others(records, paths))]
    for dtypes, paths in cast.items():
        # A cast applies to leaves of its own dtype only, so its pattern may name a whole part.
        found += [Cast(each, *dtypes) for each in find_covering_patterns(paths, _list_others(records, paths))]
    found += [Pad(each) for each in make_patterns(padded, _list_others(records, padded))] if padded else []
    found += [Slice(each) for each in make_patterns(sliced, _list_others(records, sliced))] if sliced else []
    return found


def _list_others(records: Iterable[Names], paths: Iterable[Names]) -> list[Names]:
    taken = set(paths)
    return [path for path in records if path not in taken]


def _is_as_traced(plan: RestorePlan, after: RestorePlan, traces: Sequence[Trace]) -> bool:
    """Return whether every traced leaf comes from its source, and every other leaf is unchanged."""
    names = {source.path: source.stored_path for source in plan.sources}
    unfit = {each.path for each in plan.differences}
    expected = {
        leaf.path: [leaf.source.stored_path]
        for leaf in plan.placed_leaves
        if leaf.source is not None and leaf.path not in unfit
    }
    moved = {path for trace in traces if trace.how != "copy" for path in trace.sources}
    expected = {path: stored for path, stored in expected.items() if path not in moved}
    for trace in traces:
        expected |= {path: [names[each] for each in trace.sources] for path in trace.targets}
    return expected == {
        leaf.path: [each.stored_path for each in leaf.source.iterate_stored()]
        for leaf in after.placed_leaves
        if leaf.source is not None
    }


def _weigh(plan: RestorePlan, after: RestorePlan, operations: tuple[Operation, ...]) -> Suggestion:
    """Return the suggestion with its losses; empty if it keeps nothing of an item."""
    unfit = {each.path for each in plan.differences}
    # Losses that the caller requested are not counted.
    settled = {
        leaf.path: leaf.source and leaf.source.stored_path for leaf in plan.placed_leaves if leaf.path not in unfit
    }
    given_up = {source.stored_path for source in plan.dropped_leaves}
    used = [each for leaf in after.placed_leaves if leaf.source is not None for each in leaf.source.iterate_stored()]
    digests = {each.record.digest for each in used} - {""}
    fresh, fresh_bytes, lost, lost_bytes = [], 0, [], 0
    for leaf in after.placed_leaves:
        record = plan.state_records.get(leaf.path)
        stored_path = leaf.source and leaf.source.stored_path
        if record is None or (leaf.path in settled and settled[leaf.path] == stored_path):
            continue
        new_bytes, old_bytes = _weigh_leaf(leaf, record)
        if leaf.source is None or new_bytes:
            fresh.append(".".join(leaf.path))
            fresh_bytes += new_bytes
        if leaf.source is not None and old_bytes:
            lost.append(".".join(leaf.source.stored_path))
            lost_bytes += old_bytes
    recomputed = {source.stored_path for source in plan.sources if source.path in plan.recomputed_paths}
    ignored = [source for source in after.dropped_leaves if source.stored_path in recomputed]
    for source in after.dropped_leaves:
        if source.stored_path not in given_up | recomputed and source.record.digest not in digests:
            lost.append(".".join(source.stored_path))
            lost_bytes += count_host_bytes([source.record])
    kept = {leaf.path[0] for leaf in after.placed_leaves if leaf.source is not None}
    emptied = {name.partition(".")[0] for name in fresh} & {name.partition(".")[0] for name in lost} - kept
    if emptied:
        reason = f"no leaf on disk is a likely source of {' or '.join(map(repr, sorted(emptied)))}"
        return Suggestion(reason=reason)
    keys = {".".join(path) for path, record in plan.state_records.items() if record.kind == "key"}
    stored = {
        each.stored_path: each.record for each in (*used, *after.dropped_leaves) if each.stored_path not in recomputed
    }
    return Suggestion(
        operations=operations,
        fresh_leaves=tuple(fresh),
        fresh_bytes=fresh_bytes,
        fresh_keys=tuple(name for name in fresh if name in keys),
        lost_leaves=tuple(lost),
        lost_bytes=lost_bytes,
        stored_bytes=count_host_bytes(stored.values()),
        ignored_leaves=tuple(".".join(source.stored_path) for source in ignored),
    )


def _weigh_leaf(leaf: PlacedLeaf, record: Record) -> tuple[int, int]:
    """Return the bytes of a leaf that keep their values, and the bytes of its source that are not used."""
    if leaf.source is None or leaf.target is None:
        return count_host_bytes([record]), 0
    old, new = leaf.source.shape, leaf.target.shape
    if old == new or len(old) != len(new):
        return 0, 0
    shared = math.prod(map(min, old, new))
    return (
        _scale(record, math.prod(new) - shared),
        _scale(leaf.source.record, math.prod(old) - shared),
    )


def _scale(record: Record, count: int) -> int:
    kind: Kind = "key" if record.kind == "key" else "array"
    return count * count_host_bytes([dataclasses.replace(record, kind=kind, shape=(1,), value=None)])

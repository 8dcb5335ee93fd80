# SPDX-License-Identifier: Apache-2.0
"""`group=k`: k consecutive modules of a sequence in one region.

Sits on `capture`, `naming` and `jaxprs`. A region around several calls must include the code that makes them. So the
method of the module that holds the sequence is traced with module paths on its operations; the program is cut where
the first module of each group begins, and every segment is checkpointed, including the code between the blocks. A
sequence that is one stacked module run by a scan of length L becomes an outer scan of floor(L / k) iterations over
checkpointed inner scans of length k, and a remainder; only every k-th carry is saved. With `nested=True` each module is
a region again inside its group's: `remat(scan(remat(layer)))` for a scan.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import RuleError
from ..jaxpr import jaxprs
from ..rules.paths import Path, format_path
from ..rules.rule import Remat
from . import region
from .capture import effects
from .capture.rebuild import rebuild
from .capture.walk import capture
from .naming import marking, names, scopes


@dataclasses.dataclass(frozen=True)
class Group:
    """The modules of one sequence under an action with `group`; a static attribute of the module that holds it.

    Attributes:
        sequence: Path of the sequence, or of the stacked module, relative to the holder.
        members: Indices of the modules under the action; empty for a stacked module.
        action: The action, with `group` other than 1.
    """

    sequence: Path
    members: tuple[int, ...]
    action: Remat

    def get_size(self, length: int) -> int:
        """Return the number of modules per region in a sequence of `length`."""
        if isinstance(self.action.group, int):
            return self.action.group
        # Balances the saved boundaries against the modules recomputed at once.
        return max(1, round(math.sqrt(length))) if self.members else find_balanced_size(length)

    def find_chunk(self, path: Path) -> int | None:
        """Return the number of the region that an operation at `path` belongs to, or None."""
        depth = len(self.sequence)
        if path[:depth] != self.sequence or len(path) == depth:
            return None
        return self._chunks.get(path[depth])

    @functools.cached_property
    def _chunks(self) -> dict[Any, int]:
        size, chunk, chunks = self.get_size(len(self.members)), -1, dict[Any, int]()
        filled, previous = size, None
        for index in sorted(self.members):
            # A module that a rule excludes splits a group: regions have no gaps.
            if filled == size or previous is None or index != previous + 1:
                chunk, filled = chunk + 1, 0
            chunks[index] = chunk
            filled, previous = filled + 1, index
        return chunks


def find_balanced_size(length: int) -> int:
    """Return the divisor of a loop's length nearest its square root; the rounded root if no divisor is near.

    A remainder would be a region of its own after the loop, with its own memory.
    """
    root = math.sqrt(length)
    divisors = [size for size in range(2, length // 2 + 1) if length % size == 0 and root / 2 <= size <= 2 * root]
    return min(divisors, key=lambda size: (max(size, length // size), size), default=max(1, round(root)))


def call(target: Callable[..., Any], groups: Sequence[Group], module: Any, args: Any, kwargs: Any) -> Any:
    """Run `target(module, *args, **kwargs)` with the groups as regions."""
    captured = capture(((module, *args), kwargs))
    if region.is_disabled() or not any(isinstance(leaf, jax.core.Tracer) for leaf in captured.leaves):
        return target(module, *args, **kwargs)
    recorded: list[Any] = []

    def run_target(leaves: list[Any]) -> list[Any]:
        objects: list[Any] = []
        inner_args, inner_kwargs = rebuild(captured.spec, leaves, objects)
        before = effects.snapshot(objects)
        with scopes.record_paths([((), inner_args[0])]):
            out = target(*inner_args, **inner_kwargs)
        results, call_effects = effects.collect_effects(objects, before, out)
        recorded.append(call_effects)
        return results

    program = jax.make_jaxpr(run_target)(captured.leaves)
    results = _run(program, groups, captured.leaves)
    return effects.replay(recorded[0], results, captured.objects)


def _run(jaxpr: Any, groups: Sequence[Group], leaves: list[Any]) -> list[Any]:
    results: list[Any] = jaxprs.run_segments(jaxpr, leaves, _split_segments(jaxpr, groups, _make_region))
    return results


def _split_segments(
    jaxpr: Any, groups: Sequence[Group], make_region: Callable[[Group, Any], Any]
) -> list[tuple[range, Callable[[Any], Any]]]:
    """Cut all equations, in order, into regions and the code between them."""
    equations = jaxprs.open_jaxpr(jaxpr).eqns
    labels = [_label_equation(equation, groups) for equation in equations]
    first: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], int] = {}
    for number, label in enumerate(labels):
        if label is not None:
            first.setdefault(label, number)
            last[label] = number
    _require_found(groups, first)
    order = sorted(first, key=first.__getitem__)
    pieces: list[tuple[range, Callable[[Any], Any]]] = []
    done = 0
    for position, label in enumerate(order):
        group = groups[label[0]]
        start = first[label]
        following = order[position + 1] if position + 1 < len(order) else None
        # Up to the next region of the same sequence, so that the code between the blocks belongs to a region.
        stop = first[following] if following and following[0] == label[0] else last[label] + 1
        if following:
            stop = min(stop, first[following])
        pieces += [(range(done, start), _make_plain_call), (range(start, stop), functools.partial(make_region, group))]
        done = stop
    return [*pieces, (range(done, len(equations)), _make_plain_call)]


def _label_equation(equation: Any, groups: Sequence[Group]) -> tuple[int, int] | None:
    """Group and region number of an equation, or None."""
    path = scopes.find_path(str(equation.source_info.name_stack))
    for number, group in enumerate(groups):
        if group.members:
            chunk = None if path is None else group.find_chunk(path)
            if chunk is not None:
                return number, chunk
        elif jaxprs.parse_scan(equation) is not None and _has_sequence(equation, group.sequence):
            return number, id(equation)
    return None


def _has_sequence(equation: Any, sequence: Path) -> bool:
    """Whether a scan's body runs operations of the stacked module at `sequence`."""
    scan = jaxprs.parse_scan(equation)
    if scan is None:
        return False
    values = names.find_named_values(scan.body)
    return any(value.path[: len(sequence)] == sequence for value in values)


def _require_found(groups: Sequence[Group], first: dict[tuple[int, int], int]) -> None:
    for number, group in enumerate(groups):
        if not any(label[0] == number for label in first) and not group.members:
            raise RuleError(
                what=f"a rule has group={group.action.group!r} for {format_path(group.sequence)}, which is neither "
                "in a list of modules nor run by a scan.",
                why="there would be no consecutive modules to put into one region.",
                fix="match the modules of a list (layers.*), or remove group.",
            )


def _make_plain_call(piece: Any) -> Callable[..., Any]:
    return lambda *leaves: _run_with_mark(scopes.RELATIVE, marking.mark_equations(piece, {}), leaves)


def _begin_scope(mark: str) -> contextlib.AbstractContextManager[Any]:
    """Mark, while paths are recorded, that the paths inside start at the holder."""
    return jax.named_scope(mark) if region.is_recording_paths() else contextlib.nullcontext()


def _run_with_mark(mark: str, jaxpr: Any, leaves: Sequence[Any]) -> list[Any]:
    with _begin_scope(mark):
        return jaxprs.run(jaxpr, list(leaves))


def _make_region(group: Group, piece: Any) -> Callable[..., Any]:
    if not group.members:
        return _make_grouped_scan(group, piece)
    return _checkpoint_piece(group, piece)


def _checkpoint_piece(group: Group, piece: Any) -> Callable[..., Any]:
    """Make a piece one region; names in `save` and `offload` are relative to each of its modules."""
    action, marked = group.action, _mark(group, piece)
    run = functools.partial(_run_nested if action.nested else _run_marked, group, marked)
    policy = names.lower_policy(action, holds_tiles=marking.has_tiles(piece))
    return jax.checkpoint(run, policy=policy, prevent_cse=action.prevent_cse)


def _mark(group: Group, program: Any) -> Any:
    """Return a program with the values marked that its group saves or offloads."""
    find_values = functools.partial(_find_relative_values, group, program)
    holds_tiles = marking.has_tiles(program)
    if not names.is_naming_needed(group.action, holds_tiles=holds_tiles):
        return marking.mark_equations(program, {})
    return marking.mark_program(program, group.action, holds_tiles=holds_tiles, find_values=find_values)


def _run_marked(group: Group, marked: Any, *leaves: Any) -> list[Any]:
    del group
    return _run_with_mark(scopes.REGION, marked, leaves)


def _run_nested(group: Group, marked: Any, *leaves: Any) -> list[Any]:
    """Run the piece of a group with each of its modules as a region."""
    single = dataclasses.replace(group, action=dataclasses.replace(group.action, group=1, nested=False))
    results: list[Any] = jaxprs.run_segments(marked, leaves, _split_segments(marked, [single], _make_inner_region))
    return results


def _make_inner_region(group: Group, piece: Any) -> Callable[..., Any]:
    """Make a piece, whose values have their names already, one region."""
    run = functools.partial(_run_marked, group, piece)
    policy = names.lower_policy(group.action, holds_tiles=marking.has_tiles(piece))
    return jax.checkpoint(run, policy=policy, prevent_cse=group.action.prevent_cse)


def _find_relative_values(group: Group, piece: Any, *, deeper: bool = False) -> Iterator[names.NamedValue]:
    depth = len(group.sequence) + (1 if group.members else 0)
    for value in names.find_named_values(piece, deeper=deeper):
        if value.path[: len(group.sequence)] == group.sequence and len(value.path) >= depth:
            yield dataclasses.replace(value, path=value.path[depth:])


def _make_grouped_scan(group: Group, piece: Any) -> Callable[..., Any]:
    """Make a piece that is one scan into a scan over checkpointed scans."""
    (equation,) = jaxprs.open_jaxpr(piece).eqns
    scan = jaxprs.parse_scan(equation)
    assert scan is not None  # as its label says
    size = group.get_size(scan.length)
    body = _make_checkpointed_body(group, scan)

    def run(*leaves: Any) -> list[Any]:
        # The piece's arguments are the scan's operands without literals, each variable once.
        values = dict(zip(jaxprs.open_jaxpr(piece).invars, leaves, strict=True))
        operands = [jaxprs.read_atom(atom, values) for atom in equation.invars]
        consts, rest = operands[: scan.num_consts], operands[scan.num_consts :]
        carry, xs = rest[: scan.num_carry], rest[scan.num_carry :]
        policy = names.lower_policy(group.action, holds_tiles=marking.has_tiles(scan.body))
        step: Callable[..., Any] = functools.partial(body, consts)
        if group.action.nested:
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        carry, ys = _run_nested_scan(step, carry, xs, scan, size, policy)
        produced = dict(zip(equation.outvars, [*carry, *ys], strict=True))
        return [produced[var] for var in jaxprs.open_jaxpr(piece).outvars]

    return run


def _make_checkpointed_body(group: Group, scan: jaxprs.Scan) -> Callable[..., Any]:
    marked = _mark(group, scan.body)

    def run_body(consts: list[Any], carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = jaxprs.run(marked, [*consts, *carry, *x])
        return list(out[: scan.num_carry]), list(out[scan.num_carry :])

    return run_body


def _run_nested_scan(
    body: Any, carry: list[Any], xs: list[Any], scan: jaxprs.Scan, size: int, policy: Any
) -> tuple[Any, Any]:
    """Run `scan` in regions of `size` iterations; a remainder runs last."""
    whole = scan.length // size
    split = whole * size

    def run_chunk(carry: Any, part: Any) -> Any:
        length = None if part else size
        with _begin_scope(scopes.REGION):
            return jax.lax.scan(body, carry, part, length=length, reverse=scan.reverse, unroll=scan.unroll)

    # Inside a scan the compiler cannot merge the recomputation with the first computation.
    inner = jax.checkpoint(run_chunk, policy=policy, prevent_cse=False)
    start = scan.length - split if scan.reverse else 0
    main = [x[start : start + split].reshape(whole, size, *x.shape[1:]) for x in xs]
    rest = [x[:start] if scan.reverse else x[split:] for x in xs]
    carry, ys = jax.lax.scan(inner, carry, main, length=whole, reverse=scan.reverse)
    ys = [y.reshape(split, *y.shape[2:]) for y in ys]
    if split < scan.length:
        tail = jax.checkpoint(functools.partial(_run_remainder, body, scan, scan.length - split), policy=policy)
        carry, more = tail(carry, rest)
        pairs = zip(more, ys, strict=True) if scan.reverse else zip(ys, more, strict=True)
        ys = [jnp.concatenate(pair) for pair in pairs]
    return carry, ys


def _run_remainder(body: Any, scan: jaxprs.Scan, length: int, carry: Any, part: Any) -> Any:
    with _begin_scope(scopes.REGION):
        return jax.lax.scan(body, carry, part, length=length, reverse=scan.reverse, unroll=scan.unroll)

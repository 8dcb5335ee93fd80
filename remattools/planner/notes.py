# SPDX-License-Identifier: Apache-2.0
"""What a plan says besides its points: where its search had to keep dropout masks, and why.

Sits on `analysis.random_cost` and the outline.
"""

from collections.abc import Callable, Iterable, Iterator

from ..analysis.random_cost import CHANGE_KEYS, Redrawn, describe_cost, may_be_costly
from ..rules.fold_paths import format_paths, mask_path
from ..rules.paths import format_path
from ..text import format_bytes
from .model.outline import Outline
from .result import Point


def collect_notes(
    outline: Outline, points: Iterable[Point], find_redrawn: Callable[[Point], tuple[Redrawn, ...]]
) -> tuple[str, ...]:
    """Return sentences on a plan's points.

    Args:
        outline: Of the program.
        points: What was compiled.
        find_redrawn: Returns the random bits that a point's regions draw again.
    """
    return (*_note_saved_masks(outline), *_note_redrawn(points, find_redrawn))


def _note_saved_masks(outline: Outline) -> Iterator[str]:
    masked = {kind: problem for kind, problem in enumerate(outline.problems) if problem.saved_masks}
    if not masked:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in dict.fromkeys(format_path(path) for path, kind in outline.visits if kind in masked):
        groups.setdefault(mask_path(path), []).append(path)
    size = max(sum(problem.bytes[name] for name in problem.saved_masks) for problem in masked.values())
    paths = ", ".join(map(format_paths, groups.values()))
    yield (
        f"regions of {paths} that save the dropout masks ({format_bytes(size)} a "
        "block, policy dropout_masks_saveable) do not draw their random bits again, which from threefry keys may take "
        f"many times as much on a TPU. Other keys make masks cheap to draw again: {CHANGE_KEYS}."
    )


def _note_redrawn(points: Iterable[Point], find_redrawn: Callable[[Point], tuple[Redrawn, ...]]) -> Iterator[str]:
    costly = [point for point in points if len(point.rules) and may_be_costly(point.measured)]
    if costly:
        worst = max(costly, key=lambda point: point.bytes)
        message = describe_cost(worst.measured, find_redrawn(worst))
        if message:
            yield f"in the point of {format_bytes(worst.bytes)}, {message}"

# SPDX-License-Identifier: Apache-2.0
"""Which assignment is compiled next: the one whose measurement is expected to improve the result most.

Pure functions of what is expected (`Posterior`) and what was compiled (`Point`s); `exploration` calls them. The score
is the expected improvement (Mockus 1975) times the probability of staying within the limits.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import scipy

from ..result import Point

# A smaller expected gain, as a share of what was reached, is not worth a compile. Standard deviations are themselves
# uncertain, so it is small.
_MIN_GAIN = 1e-4
# Where nothing is within the limits yet: an assignment with this probability is taken to be.
_MIN_PROBABILITY = 0.5
# The budgets at which a frontier may improve, and the time at a budget not reached yet, as a multiple of the
# slowest point.
_BUDGETS, _UNREACHED = 24, 1.2
# The lowest budget lies this many standard deviations below the lowest expectation, but not below this share of the
# minimum measured. Without the former the curve of benchmarks/remat_groups.py ends at 41.5 MB instead of 32.8.
_BELOW_EXPECTED_STDS, _BELOW_MEASURED = 1.5, 0.8


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """What is expected of each assignment, shape (assignments,) each.

    Attributes:
        bytes: Mean of the bytes that the budget is about.
        bytes_std: Standard deviation of the bytes.
        cycles: Mean of the cycles of a whole step.
        cycles_std: Standard deviation of the cycles; 0 where cycles are the planner's time model alone.
    """

    bytes: np.ndarray
    bytes_std: np.ndarray
    cycles: np.ndarray
    cycles_std: np.ndarray


def choose_for_limits(
    expected: Posterior,
    is_open: np.ndarray,
    points: Iterable[Point],
    *,
    max_bytes: int | None,
    max_cycles: float | None,
) -> int | None:
    """Return the assignment to compile next for these limits, or None if none promises an improvement.

    Args:
        expected: What is expected of each assignment.
        is_open: Whether an assignment may be compiled, shape (assignments,).
        points: What was compiled.
        max_bytes: The budget; None for none.
        max_cycles: The time limit; with one, bytes are minimised instead of cycles. None for none.
    """
    points = tuple(points)
    size, time = (expected.bytes, expected.bytes_std), (expected.cycles, expected.cycles_std)
    goal = time if max_cycles is None else size
    probability = is_open.astype(float)
    for quantity, limit in ((size, max_bytes), (time, max_cycles)):
        if limit is not None:
            probability *= _compute_feasibility(*quantity, limit)
    best = find_best_point(points, max_bytes, max_cycles)
    if best is not None:
        reached = best.cycles if max_cycles is None else best.bytes
        return _select_most_promising(probability * _compute_expected_improvement(*goal, max(float(reached), 1.0)))
    if not is_open.any():
        return None
    likely = np.flatnonzero(probability > _MIN_PROBABILITY)
    if len(likely):  # the best of those that are probably within the limits
        return int(likely[goal[0][likely].argmin()])
    compiled = [point for point in points if point.measured.fits]
    if not compiled:  # everything so far ran out of memory: the smallest
        return int(np.where(is_open, expected.bytes, np.inf).argmin())
    # Nothing is expected to be within the limits: come nearer to the one that is missed.
    is_late = max_cycles is not None and all(point.cycles > max_cycles for point in compiled)
    nearest = min(point.cycles if is_late else point.bytes for point in compiled)
    return _select_most_promising(
        is_open * _compute_expected_improvement(*(time if is_late else size), max(float(nearest), 1.0))
    )


def choose_for_frontier(
    expected: Posterior, is_open: np.ndarray, points: Iterable[Point], *, full_remat: int
) -> int | None:
    """Return the assignment that promises most over all budgets, or None if none promises an improvement.

    Args:
        expected: What is expected of each assignment.
        is_open: Whether an assignment may be compiled, shape (assignments,).
        points: What was compiled, the plain model first.
        full_remat: The assignment that saves nothing.
    """
    points = tuple(points)
    candidates = np.flatnonzero(is_open)
    compiled = [point for point in points if point.measured.fits]
    if not len(candidates):
        return None
    sizes, cycles = expected.bytes[candidates], expected.cycles[candidates]
    if is_open[full_remat]:  # both ends are measured before anything between them
        return full_remat
    if not compiled:  # everything so far ran out of memory: the smallest
        return int(candidates[sizes.argmin()])
    most = max([1, *(point.bytes for point in compiled)])
    slowest = max(point.cycles for point in compiled)
    # Budgets below all expectations are worth a compile as well, as far as the expectations are uncertain.
    lowest = float((sizes - _BELOW_EXPECTED_STDS * expected.bytes_std[candidates]).min())
    lowest = max(lowest, _BELOW_MEASURED * min(point.bytes for point in compiled), 1.0)
    limits = np.geomspace(min(lowest, most), most, _BUDGETS)
    reached = [find_best_point(compiled, limit, None) for limit in limits]
    best = np.array([_UNREACHED * slowest if point is None else point.cycles for point in reached])
    probability = _compute_feasibility(sizes[:, None], expected.bytes_std[candidates][:, None], limits)
    # The area under the curve that each is expected to gain: a gain at many budgets is worth more than at one.
    gains = probability * _compute_expected_improvement(cycles[:, None], expected.cycles_std[candidates][:, None], best)
    chosen = _select_most_promising(gains.mean(axis=1))
    return None if chosen is None else int(candidates[chosen])


def find_best_point(points: Iterable[Point], max_bytes: float | None, max_cycles: float | None) -> Point | None:
    """Return the best compiled point within the limits, or None if there is none.

    Args:
        points: The compiled points.
        max_bytes: The budget; None for none.
        max_cycles: The time limit; with one the smallest point is the best, without one the fastest.
    """
    within = [
        point
        for point in points
        if point.measured.fits
        and (max_bytes is None or point.bytes <= max_bytes)
        and (max_cycles is None or point.cycles <= max_cycles)
    ]
    if max_cycles is None:
        return min(within, key=lambda point: (point.cycles, point.bytes), default=None)
    return min(within, key=lambda point: (point.bytes, point.cycles), default=None)


def _select_most_promising(gains: np.ndarray) -> int | None:
    """Return where the expected gain is largest, or None if it is not worth a compile."""
    return int(gains.argmax()) if gains.max() > _MIN_GAIN else None


def _compute_feasibility(mean: np.ndarray, std: np.ndarray, limit: float | np.ndarray) -> np.ndarray:
    """Return the probability that each stays within a limit."""
    return np.asarray(scipy.special.ndtr((limit - mean) / np.maximum(std, 1e-6 * np.maximum(limit, 1.0))))


def _compute_expected_improvement(mean: np.ndarray, std: np.ndarray, best: float | np.ndarray) -> np.ndarray:
    """Return how much less than `best` is expected of each, as a share of `best`: the mean of a normal distribution.

    Without uncertainty it is the difference, or 0.
    """
    spread = np.maximum(std, 1e-9 * best)
    z = (best - mean) / spread
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(((best - mean) * scipy.special.ndtr(z) + spread * density) / best)

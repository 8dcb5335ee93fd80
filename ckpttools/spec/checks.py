# SPDX-License-Identifier: Apache-2.0
"""Checks that the values of a spec share, so that equal mistakes give equal errors."""

import math

from ..errors import SpecError


def require_count(owner: str, field: str, value: object, *, minimum: int = 1) -> None:
    """Raise `SpecError` unless `value` is an int of at least `minimum`; a bool does not count."""
    if type(value) is not int or value < minimum:
        raise SpecError(
            what=f"{owner}({field}={value!r}) cannot be honoured.",
            why=f"{field} counts whole things and must be an int of {minimum} or more.",
            fix=f"{owner}({field}={minimum})",
        )


def require_positive(owner: str, field: str, value: object) -> None:
    """Raise `SpecError` unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SpecError(
            what=f"{owner}({field}={value!r}) cannot be honoured.",
            why=f"{field} must be a finite number above zero.",
            fix=f"{owner}({field}=900)",
        )


def require_name(owner: str, field: str, value: object) -> None:
    """Raise `SpecError` unless `value` is a metric's name."""
    if not isinstance(value, str) or not value.strip():
        raise SpecError(
            what=f"{owner}({field}={value!r}) does not name a metric.",
            why="a metric is looked up by this name in the `metrics` that are passed along with a step.",
            fix=f'{owner}({field}="val_loss")',
        )


def require_mode(owner: str, mode: object) -> None:
    """Raise `SpecError` unless `mode` says which direction of a metric is better."""
    if mode not in ("min", "max"):
        raise SpecError(
            what=f"{owner}(mode={mode!r}) has no direction.",
            why="guessing it wrong would keep the worst checkpoints and delete the best.",
            fix='mode="min" for a loss, mode="max" for an accuracy.',
        )


def require_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `SpecError` unless `value` is one of `choices`."""
    if value not in choices:
        raise SpecError(
            what=f"{owner}({field}={value!r}) is not known.",
            why=f"{field} is one of {', '.join(map(repr, choices))}.",
            fix=f"{owner}({field}={choices[0]!r})",
        )


def require_steps(owner: str, value: object, *, minimum: int = 0) -> None:
    """Raise `SpecError` unless `value` is a tuple of at least `minimum` step numbers, increasing, without repeats."""
    if (
        not isinstance(value, tuple)
        or len(value) < minimum
        or any(type(step) is not int or step < 1 for step in value)
        or list(value) != sorted(set(value))
    ):
        raise SpecError(
            what=f"{owner}(steps={value!r}) cannot be honoured.",
            why="steps are ints of 1 or more, in increasing order, without repeats.",
            fix=f"{owner}(steps=(1_000, 10_000))",
        )

# SPDX-License-Identifier: Apache-2.0
"""The outermost layer of a state: items by name, and the numbers that go with a step."""

from collections.abc import Mapping
from typing import Any

from ..errors import LeafError

_RESERVED_NAMES = frozenset({"metrics", "descriptor", "_CHECKPOINT_METADATA"})
"""Names that Orbax gives a meaning of its own."""
_MAX_NAME_LENGTH = 200
"""File systems stop at 255 bytes for a name, and Orbax appends to it while it writes."""


def require_items(state: Mapping[str, Any]) -> None:
    """Raise `LeafError` unless the state is a mapping of names that can be folders."""
    if not isinstance(state, Mapping):
        raise LeafError(
            what=f"the state is a {type(state).__name__}.",
            why="items are stored by name, so that single ones can be restored.",
            fix='{"model": model, "optimizer": optimizer}',
        )
    for name in state:
        legal = isinstance(name, str) and name.isidentifier() and name.isascii() and name not in _RESERVED_NAMES
        legal = legal and len(name) <= _MAX_NAME_LENGTH
        if not legal:
            raise LeafError(
                what=f"an item of the state is named {name!r}.",
                why="the name becomes a folder of the step, beside the files of Orbax.",
                fix='a plain word such as "model".',
            )


def require_metrics(metrics: Any) -> None:
    """Raise `LeafError` unless the metrics are a mapping by name."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise LeafError(
            what=f"the metrics are {metrics!r:.80}.",
            why="each has a name, by which the spec and ct.best ask for it.",
            fix='metrics={"loss": loss}',
        )


def as_metric(name: str, value: Any) -> float:
    """A metric as a float; this is where a device is waited for, if the metric is an array."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # An array that was deleted raises when it is printed, too.
        shown = "a deleted array" if isinstance(error, RuntimeError) else f"{value!r:.80}"
        raise LeafError(
            what=f"the metric {name!r} is {shown}.",
            why="metrics are compared, so each must be a number.",
            fix=f"{{{name!r}: float(loss)}}",
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""The outermost level of a state, items by name, and the metrics of a step."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import LeafError

_RESERVED_NAMES = frozenset({"metrics", "descriptor", "_CHECKPOINT_METADATA"})
"""Names that Orbax uses itself."""
_MAX_NAME_LENGTH = 200
"""File systems allow names of 255 bytes, and Orbax appends to the name while it writes."""


def require_items(state: Mapping[str, Any]) -> None:
    """Raise `LeafError` unless the state is a mapping whose names can be directories."""
    if not isinstance(state, Mapping):
        raise LeafError(
            what=f"the state is a {type(state).__name__}.",
            why="items are stored by name, so that each can be restored on its own.",
            fix='{"model": model, "optimizer": optimizer}',
        )
    for name in state:
        legal = isinstance(name, str) and name.isidentifier() and name.isascii() and name not in _RESERVED_NAMES
        legal = legal and len(name) <= _MAX_NAME_LENGTH
        if not legal:
            raise LeafError(
                what=f"an item of the state is named {name!r}.",
                why="the name becomes a directory of the step, beside the files of Orbax.",
                fix='use a plain word such as "model".',
            )


def require_metrics(metrics: Any) -> None:
    """Raise `LeafError` unless the metrics are numbers by name; reads no values, so it never waits for the device."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise LeafError(
            what=f"the metrics are {metrics!r:.80}.",
            why="the spec and ct.best refer to a metric by its name.",
            fix='metrics={"loss": loss}',
        )
    for name, value in metrics.items():
        if not 0 < len(name) <= _MAX_NAME_LENGTH:
            raise LeafError(
                what=f"a metric is named {name!r:.80}, which has {len(name)} characters.",
                why="a name is shown in tables and typed at a shell; nothing was recorded.",
                fix=f'use a name of 1 to {_MAX_NAME_LENGTH} characters, such as "val_loss".',
            )
        is_real = getattr(getattr(value, "dtype", None), "kind", "f") not in "cSUOMm"
        if not (is_real and hasattr(value, "__float__") and math.prod(getattr(value, "shape", ())) == 1):
            raise _make_metric_error(name, f"{value!r:.80}")


def as_metric(name: str, value: Any) -> float:
    """Return a metric as a float; if it is an array, this waits for the device.

    Raises:
        LeafError: If it is not a number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # Printing a deleted array raises, too.
        shown = "a deleted array" if isinstance(error, RuntimeError) else f"{value!r:.80}"
        raise _make_metric_error(name, shown) from error


def _make_metric_error(name: str, shown: str) -> LeafError:
    return LeafError(
        what=f"the metric {name!r} is {shown}.",
        why="metrics are compared, so each must be a number.",
        fix=f"{{{name!r}: float(loss)}}",
    )

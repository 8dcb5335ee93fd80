# SPDX-License-Identifier: Apache-2.0
"""Check that a restored model still computes what the saved one did.

The function passed as `ct.open(spec, validate=...)` receives a fresh copy of the state, never the live one, so it may
change anything in it. Its outputs are stored with the step and compared when the step is restored; outputs that are not
finite fail both the save and the restore.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import CorruptStepError, StepRejectedError, ValidationError
from ..tree.records import parse_dtype
from ..tree.write_back import HostItem, copy_state

type Validate = Callable[[dict[str, Any]], Any]
"""Given a copy of the state, returns an array or a pytree of arrays, such as the logits of a fixed batch."""

_MAX_BYTES = 1 << 20
_TOLERANCE = 1e-4
"""Relative to the largest output: another machine may fuse and round in another order."""


def compute_outputs(validate: Validate, state: Mapping[str, Any], *, step: int) -> list[dict[str, Any]]:
    """Run the function on a copy of the live state, and return its outputs as JSON for the manifest.

    Raises:
        ValidationError: If outputs are not finite, or too large to be stored with every step.
    """
    outputs = _compute_arrays(validate, copy_state(state))
    if not _is_finite(outputs):
        raise ValidationError(
            what=f"the validation outputs at step {step} are not finite.",
            why="a diverged model would be saved as the newest good one.",
            fix="restore an earlier step, or check the learning rate.",
        )
    total = sum(array.nbytes for array in outputs)
    if total > _MAX_BYTES:
        raise ValidationError(
            what=f"the validation function returns {total:,} bytes.",
            why=f"they are stored with every step, up to {_MAX_BYTES:,} bytes.",
            fix="return a few rows or a mean of the outputs.",
        )
    return [
        {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        for array in outputs
    ]


def check(
    validate: Validate, state: Mapping[str, Any], items: Mapping[str, HostItem], stored: Any, *, step: int
) -> None:
    """Run the function on a copy filled from a loaded step and compare its outputs with the stored ones.

    Raises:
        StepRejectedError: If they are not finite, or differ from what the model computed when it was saved.
        CorruptStepError: If the stored outputs cannot be read.
    """
    outputs = _compute_arrays(validate, copy_state(state, items))
    if not _is_finite(outputs):
        error = StepRejectedError(
            what=f"step {step} fails validation: its outputs are not finite.",
            why="training would continue from NaN or infinity. The step's bytes are as they were saved.",
            fix="check the function and the model on this batch, or restore an older step: restore(state, step=...).",
        )
        error.step = step
        raise error
    if stored is None:
        return
    before = [_decode_output(entry) for entry in stored]
    same_form = [(a.shape, a.dtype) for a in outputs] == [(a.shape, a.dtype) for a in before]
    if not same_form or not all(map(_is_close, outputs, before)):
        error = StepRejectedError(
            what=f"step {step} fails validation: the model does not compute what it did when it was saved."
        )
        error.step = step
        raise error


def _compute_arrays(validate: Validate, state: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    outputs = jax.tree.leaves(validate(state))
    with jax.transfer_guard("allow"):
        return [np.asarray(leaf) for leaf in outputs]


def _is_finite(arrays: list[np.ndarray[Any, Any]]) -> bool:
    return all(bool(np.isfinite(array.astype(np.float64)).all()) for array in arrays)


def _is_close(after: np.ndarray[Any, Any], before: np.ndarray[Any, Any]) -> bool:
    left, right = after.astype(np.float64), before.astype(np.float64)
    scale = float(np.abs(right).max(initial=0.0))
    return bool((np.abs(left - right) <= _TOLERANCE * scale).all())


def _decode_output(entry: Any) -> np.ndarray[Any, Any]:
    try:
        data = base64.b64decode(entry["data"], validate=True)
        return np.frombuffer(data, parse_dtype(entry["dtype"])).reshape(entry["shape"])
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptStepError(
            what=f"the stored validation outputs cannot be read: {error}.",
            why="the restored model cannot be compared with the saved one.",
            fix="open the run without validate=, or restore another step.",
        ) from error

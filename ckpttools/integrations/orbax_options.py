# SPDX-License-Identifier: Apache-2.0
"""Translate a spec to Orbax's `CheckpointManagerOptions`, for trainers that build Orbax's manager themselves.

Whatever Orbax cannot express raises, with the reason. Facts that shaped it:

-   Orbax calls its save policy before the metrics exist, so no trigger that uses a metric can be expressed;
-   with a `preservation_policy` and without `best_fn`, metrics are never written to disk, so both are set;
-   its best step may be one whose metric is NaN, and may be the only one kept, so NaN ranks last and the two latest
    steps are kept with every policy.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..errors import SpecError
from ..spec import retention, triggers
from ..spec.spec import CheckpointSpec
from ..spec.state import StateVersion, as_state_version
from ..spec.storage import Integrity, Storage
from ..store import orbax


def orbax_options(spec: CheckpointSpec) -> Any:
    """Return Orbax's `CheckpointManagerOptions` for a spec; pass its directory to the trainer separately.

    Orbax's manager itself writes no digests, verifies nothing on restore, compresses arrays, reserves no disk space,
    and does not save the final step. Its `best_step()` uses the first metric whose mode the spec names. If the
    trainer lets you replace its manager, do that instead.

    Args:
        spec: The spec to translate.

    Raises:
        SpecError: If these options cannot express the spec.

    Example:
        >>> import ckpttools as ct
        >>> type(ct.orbax_options(ct.CheckpointSpec(directory="runs/a"))).__name__
        'CheckpointManagerOptions'
    """
    _require_expressible(spec)
    fields: dict[str, Any] = {
        # A save at the preemption notice is part of every spec; Orbax honours it after jax.distributed.initialize.
        "save_decision_policy": orbax.policies.AnySavePolicy(
            [_make_save_policy(spec.save), orbax.policies.PreemptionCheckpointingPolicy()]
        ),
        "preservation_policy": orbax.policies.AnyPreservationPolicy(
            [_make_preservation_policy(spec.keep), orbax.policies.LatestN(retention.MIN_KEPT_STEPS)]
        ),
        "enable_async_checkpointing": spec.storage.asynchronous,
        "timeout_s": math.ceil(spec.storage.timeout_s),
    }
    directed = spec.get_metric_modes()
    if directed:
        metric, mode = next(iter(directed.items()))
        fields |= {"best_fn": _make_metric_fn(metric, mode), "best_mode": mode}
    return orbax.make_manager_options(**fields)


def _require_expressible(spec: CheckpointSpec) -> None:
    requested = {
        "mirror": (spec.mirror is not None, "Orbax's manager writes to one place"),
        "state_version": (
            as_state_version(spec.state_version) != StateVersion(),
            "Orbax neither records a version nor migrates a step",
        ),
        "integrity.verify": (spec.integrity.verify != "digest", "Orbax does not read back what it wrote"),
        "integrity.digest": (spec.integrity.digest != Integrity().digest, "Orbax writes no digests"),
        "storage.min_free": (spec.storage.min_free != Storage().min_free, "Orbax does not check the free space"),
        "storage.when_full": (spec.storage.when_full != "raise", "Orbax does not check the free space"),
    }
    for field, (is_requested, why) in requested.items():
        if is_requested:
            raise _make_inexpressible_error(field, why)


def _make_inexpressible_error(what: str, why: str) -> SpecError:
    return SpecError(
        what=f"{what} cannot be expressed in Orbax's options.",
        why=f"{why}; without it the run would not follow the spec.",
        fix="use a session (ct.open, ct.train, ct.peft_trainer), or leave it out of this trainer's spec.",
    )


def _make_save_policy(trigger: triggers.Trigger) -> Any:
    match trigger:
        case triggers.EverySteps(n):
            return orbax.policies.FixedIntervalPolicy(n)
        case triggers.EverySeconds(seconds):
            return orbax.policies.ContinuousCheckpointingPolicy(minimum_interval_secs=seconds)
        case triggers.AtSteps(steps):
            return orbax.policies.SpecificStepsPolicy(frozenset(steps))
        case triggers.AnyOf():
            return orbax.policies.AnySavePolicy([_make_save_policy(part) for part in trigger.parts])
        case triggers.AllOf():
            raise _make_inexpressible_error(repr(trigger), "Orbax combines its policies by 'or' only")
        case _:
            why = (
                "Orbax decides before it gets the metrics"
                if trigger.get_metric_names()
                else "Orbax has no policy like it"
            )
            raise _make_inexpressible_error(repr(trigger), why)


def _make_preservation_policy(keep: retention.Retention) -> Any:
    match keep:
        case retention.Latest(n):
            return orbax.policies.LatestN(n)
        case retention.Best(metric, mode=mode, n=n):
            sign = 1.0 if mode == "max" else -1.0
            value = _make_metric_fn(metric, mode)
            return orbax.policies.BestN(
                get_metric_fn=lambda metrics: sign * value(metrics), n=n, keep_checkpoints_without_metrics=False
            )
        case retention.EveryNSteps(n):
            return orbax.policies.EveryNSteps(n)
        case retention.EveryNSeconds(seconds):
            return orbax.policies.EveryNSeconds(seconds)
        case retention.Pinned(steps):
            return orbax.policies.CustomSteps(steps)
        case retention.All():
            return orbax.policies.LatestN(None)
        case retention.Union():
            return orbax.policies.AnyPreservationPolicy([_make_preservation_policy(part) for part in keep.parts])
        case _:
            raise _make_inexpressible_error(repr(keep), "Orbax has no policy like it")


def _make_metric_fn(metric: str, mode: Literal["min", "max"]) -> Callable[[Mapping[str, Any]], float]:
    """Return a function that looks a metric up; NaN and a missing metric rank worst."""
    worst = math.inf if mode == "min" else -math.inf

    def get_value(metrics: Mapping[str, Any]) -> float:
        found = float(metrics.get(metric, worst))
        return worst if math.isnan(found) else found

    return get_value

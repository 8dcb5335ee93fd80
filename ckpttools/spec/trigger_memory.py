# SPDX-License-Identifier: Apache-2.0
"""What triggers remember, as it is written down: each trigger's own, under the trigger's own description.

A spec may change between two runs. Memory that was stored by position was handed to whatever stood there next, and
the seconds of an `EverySeconds` became the best loss of an `OnImprovement`, which then never saved again. By
description, a trigger that is still in the spec goes on with what it knew wherever it stands, and a new or changed one
starts afresh.
"""

import dataclasses
from typing import Any

from .triggers import AllOf, AnyOf, Memory, Trigger


def encode_memory(trigger: Trigger, memory: Memory) -> dict[str, Any]:
    """The memories of a trigger and its parts by their descriptions, for the manifest."""
    if not isinstance(trigger, AnyOf | AllOf):
        return {} if memory is None else {_describe_trigger(trigger): memory}
    parts: dict[str, Any] = {}
    for part, own in zip(trigger.parts, memory or [None] * len(trigger.parts), strict=True):
        # Equal parts have seen the same moments, so they have the same memory.
        parts |= encode_memory(part, own)
    return parts


def decode_memory(trigger: Trigger, encoded: Any) -> Memory:
    """The memory of a trigger out of what `written` gave; what does not fit is forgotten."""
    if isinstance(trigger, AnyOf | AllOf):
        return [decode_memory(part, encoded) for part in trigger.parts]
    memory = encoded.get(_describe_trigger(trigger)) if isinstance(encoded, dict) else None
    return memory if trigger.is_valid_memory(memory) else None


def _describe_trigger(trigger: Trigger) -> str:
    # The plain `repr` of an object holds its address, which no other process has.
    return repr(trigger) if dataclasses.is_dataclass(trigger) else type(trigger).__qualname__

# SPDX-License-Identifier: Apache-2.0
"""The memories of triggers in the form that manifests store: each under the description of its trigger.

A spec can change between two runs. Stored by position, the seconds of an `EverySeconds` would become the best loss of
an `OnImprovement` that takes its place, which then would never save again. Stored by description, a trigger that is
still in the spec resumes with its memory wherever it is, and a new or changed one starts without.
"""

import dataclasses
from typing import Any

from .triggers import AllOf, AnyOf, Memory, Trigger


def encode_memory(trigger: Trigger, memory: Memory) -> dict[str, Any]:
    """Return the memories of a trigger and its parts by their descriptions.

    Args:
        trigger: The trigger of the spec.
        memory: Its memory.

    Returns:
        A JSON value, for the manifest of a step.
    """
    if not isinstance(trigger, AnyOf | AllOf):
        return {} if memory is None else {_describe_trigger(trigger): memory}
    parts: dict[str, Any] = {}
    for part, part_memory in zip(trigger.parts, memory or [None] * len(trigger.parts), strict=True):
        # Equal parts observed the same steps, so they have the same memory.
        parts |= encode_memory(part, part_memory)
    return parts


def decode_memory(trigger: Trigger, encoded: Any) -> Memory:
    """Return the memory of a trigger from what `encode_memory` returned; what does not fit is dropped.

    Args:
        trigger: The trigger of the spec, which may have changed.
        encoded: The stored memories; any JSON value, since it comes from a file.
    """
    if isinstance(trigger, AnyOf | AllOf):
        return [decode_memory(part, encoded) for part in trigger.parts]
    memory = encoded.get(_describe_trigger(trigger)) if isinstance(encoded, dict) else None
    return memory if trigger.is_valid_memory(memory) else None


def _describe_trigger(trigger: Trigger) -> str:
    # The default `repr` of an object contains its address, which differs in every process.
    return repr(trigger) if dataclasses.is_dataclass(trigger) else type(trigger).__qualname__

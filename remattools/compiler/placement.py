# SPDX-License-Identifier: Apache-2.0
"""Which devices hold the arguments of a call, and whether a program can be run there.

JAX moves an array that was not put on a device (uncommitted) to the others' devices, and
refuses arrays that were put on different devices. The same rules are applied here, before
anything is compiled.
"""

import dataclasses
from collections.abc import Sequence

import jax

from ..errors import MeasureError
from ..tracing import pure_call
from .targets import Target, find_target


def choose_target(call: pure_call.Call, target: str | Target | jax.Device | None) -> Target:
    """Return the target asked for, or for None the devices that hold the arguments, or JAX's default devices.

    Raises:
        MeasureError: If arguments were put on different devices.
        TargetError: If the target does not exist.
    """
    placements = _find_placements(call)
    _check_same_devices(placements)
    where = find_target(target)
    if not placements:
        return where
    devices = placements[0][0]
    if target is None and devices[0].platform != where.devices[0].platform:
        return dataclasses.replace(find_target(devices[0]), devices=devices)
    if len(devices) == 1 and devices[0] in where.devices:
        return dataclasses.replace(where, devices=devices)
    return where


def check_placement(call: pure_call.Call, target: Target) -> None:
    """Check that no argument was put on a device outside the target.

    Raises:
        MeasureError: With the argument, its devices and the target's.
    """
    for devices, label in _find_placements(call):
        if set(devices) - set(target.devices):
            here, there = _format_devices(target.devices), _format_devices(devices)
            raise MeasureError(
                what=f"run=True on {here}, but {label} was put on {there}.",
                why="measure does not copy arguments to other devices, so it can time a step only where they are.",
                fix="leave target out to run it there, or move the model and the batch with jax.device_put.",
            )


def _check_same_devices(placements: list[tuple[tuple[jax.Device, ...], str]]) -> None:
    for devices, label in placements[1:]:
        first_devices, first_label = placements[0]
        if set(devices) != set(first_devices):
            here, there = _format_devices(first_devices), _format_devices(devices)
            raise MeasureError(
                what=f"{first_label} was put on {here}, {label} on {there}.",
                why="one program runs on one set of devices, and JAX refuses such a call.",
                fix="put the model and the batch on the same devices with jax.device_put, or on one mesh.",
            )


def _find_placements(call: pure_call.Call) -> list[tuple[tuple[jax.Device, ...], str]]:
    """Return devices (by id) and label of every argument that was put on devices."""
    return [
        (tuple(sorted(leaf.sharding.device_set, key=lambda device: device.id)), info.label)
        for leaf, info in zip(call.leaves, call.leaf_infos, strict=True)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed
    ]


def _format_devices(devices: Sequence[jax.Device]) -> str:
    names = [f"{device.platform}:{device.id}" for device in devices]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"

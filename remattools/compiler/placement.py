# SPDX-License-Identifier: Apache-2.0
"""On which devices the arguments of a call lie, and whether a program can be run there.

JAX moves an array that was never put anywhere (uncommitted) to where the others are; arrays that
were put on different devices it refuses. The same holds here, before anything is compiled.
"""

import dataclasses
from typing import Any

import jax

from ..errors import MeasureError
from ..tracing import pure_call
from .targets import Target, find_target


def choose_target(call: pure_call.Call, target: Any) -> Target:
    """The target that was asked for; without one, where the arguments were put, or JAX's default devices.

    Raises:
        MeasureError: If arguments were put on different devices.
        TargetError: If there is no such target.
    """
    homes = _find_placements(call)
    _check_same_devices(homes)
    where = find_target(target)
    if not homes:
        return where
    devices = homes[0][0]
    if target is None and devices[0].platform != where.devices[0].platform:
        return dataclasses.replace(find_target(devices[0]), devices=devices)
    if len(devices) == 1 and devices[0] in where.devices:
        return dataclasses.replace(where, devices=devices)
    return where


def check_placement(call: pure_call.Call, target: Target) -> None:
    """Refuse to run where the arguments were not put.

    Raises:
        MeasureError: With the argument, its devices and the target's.
    """
    for devices, text in _find_placements(call):
        if set(devices) - set(target.devices):
            raise MeasureError(
                what=f"run=True on {_format_devices(target.devices)}, but {text} was put on {_format_devices(devices)}.",
                why="a step is timed where its arguments are; a copy of them would be a run that nobody asked for.",
                fix="leave target out to run it there, or move the model and the batch with jax.device_put.",
            )


def _check_same_devices(placements: list[tuple[tuple[Any, ...], str]]) -> None:
    for devices, text in placements[1:]:
        if set(devices) != set(placements[0][0]):
            raise MeasureError(
                what=f"{placements[0][1]} was put on {_format_devices(placements[0][0])}, {text} on {_format_devices(devices)}.",
                why="one program runs on one set of devices, and JAX refuses such a call.",
                fix="put the model and the batch on the same devices with jax.device_put, or on one mesh.",
            )


def _find_placements(call: pure_call.Call) -> list[tuple[tuple[Any, ...], str]]:
    """Devices, in the order of their ids, and name of every argument that was put somewhere."""
    return [
        (tuple(sorted(leaf.sharding.device_set, key=lambda device: device.id)), info.label)
        for leaf, info in zip(call.leaves, call.leaf_infos, strict=True)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed
    ]


def _format_devices(devices: Any) -> str:
    """As few words as tell them apart."""
    names = [f"{device.platform}:{device.id}" for device in devices]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"

# SPDX-License-Identifier: Apache-2.0
"""The list of pinned steps: it is stored twice, and either copy suffices."""

import json
import pathlib

from .. import commit, digest, layout

_PIN_FILES = ("pins.json", "pins.second.json")
"""Stored twice: if the only list were damaged, retention would delete pinned steps."""


def read_pins(root: pathlib.Path) -> frozenset[int]:
    """Return the pinned steps, from whichever of the two lists is intact; none if neither is."""
    found = (_read_pin_file(layout.get_control_path(root, name)) for name in _PIN_FILES)
    return next((pins for pins in found if pins is not None), frozenset())


def _read_pin_file(path: pathlib.Path) -> frozenset[int] | None:
    """Return the steps of one list of pins; None if it is missing or damaged."""
    try:
        data = json.loads(path.read_bytes())
        steps = data["steps"]
        whole = digest.hash_bytes("xxh3", json.dumps(steps).encode()) == data["digest"]
        return frozenset(steps) if whole and all(type(step) is int for step in steps) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def has_intact_pins(root: pathlib.Path) -> bool:
    """Return whether both lists of pins are intact and equal, or neither exists."""
    paths = [layout.get_control_path(root, name) for name in _PIN_FILES]
    first, second = map(_read_pin_file, paths)
    return first == second and (first is not None or not any(path.exists() for path in paths))


def write_pins(root: pathlib.Path, pins: frozenset[int]) -> None:
    """Replace the list of pinned steps, durably, and then its second copy."""
    commit.require_confined(root)
    steps = sorted(pins)
    mark = digest.hash_bytes("xxh3", json.dumps(steps).encode())
    for name in _PIN_FILES:
        commit.write_file(layout.get_control_path(root, name), json.dumps({"steps": steps, "digest": mark}).encode())

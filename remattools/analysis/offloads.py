# SPDX-License-Identifier: Apache-2.0
"""Which names of `offload=` put nothing into host memory.

Sits on `transform`; `check` reports what is found. JAX moves a named value to the host only if the backward pass would
read it from there. What a region returns is not read in its own backward pass: it is the input of the next region, and
inputs are saved on the device unless their own name, `.:input`, is offloaded.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ..rules.paths import format_path
from ..rules.rule import Remat
from ..transform import apply as application
from ..transform import swap
from ..transform.modules import find_modules


@dataclasses.dataclass(frozen=True)
class IdleOffload:
    """A name that offloads nothing.

    Attributes:
        path: Path of the first module whose action has it.
        name: The name, as in `offload=`.
        has_others: Whether other names of the same action do offload.
    """

    path: str
    name: str
    has_others: bool = False


def find_idle_offloads(model: Any, host_bytes: int, count_host_bytes: Callable[[], int]) -> list[IdleOffload]:
    """Return the names in the actions in force that offload nothing.

    Args:
        model: The model, with its rules applied.
        host_bytes: What all rules together put into host memory.
        count_host_bytes: Counts the same again, with the actions that are in force when it is called.
    """
    entries = find_modules(model)
    paths: dict[Remat, str] = {}
    for entry, action in zip(entries, application.get_active_actions(entries), strict=True):
        if action is not None and action.offload:
            paths.setdefault(action, format_path(entry.path))
    found = [IdleOffload(path, name) for action, path in paths.items() for name in action.offload]
    if not host_bytes or len(found) < 2:
        return found if not host_bytes else []
    found = []
    for action, path in paths.items():
        idle = []
        for name in action.offload:
            with _replace_actions(model, functools.partial(_remove_name, action, name)):
                if count_host_bytes() >= host_bytes:
                    idle.append(name)
        found += [IdleOffload(path, name, has_others=len(idle) < len(action.offload)) for name in idle]
    return found


def describe_idle_offload(idle: IdleOffload) -> str:
    """Return what a name that offloads nothing does, and what to do, as a sentence for a reader."""
    return (
        f"{idle.name!r} is offloaded in {idle.path}, but puts nothing into host memory: the backward pass "
        "reads no such value. What a region returns is the input of the next one, and inputs are saved on the device: "
        'offload=(".:input",) offloads them. explain(..., names=True) lists the names inside a region.'
    )


def _remove_name(action: Remat, name: str, current: Remat) -> Remat:
    others = tuple(other for other in action.offload if other != name)
    return dataclasses.replace(action, offload=others) if current == action else current


@contextlib.contextmanager
def save_instead(model: Any) -> Iterator[None]:
    """Save on the device, for the duration of a block, what the actions of a model offload."""
    with _replace_actions(model, lambda action: dataclasses.replace(action, save=_join_names(action), offload=())):
        yield


def _join_names(action: Remat) -> tuple[str, ...]:
    return (*action.save, *action.offload)


@contextlib.contextmanager
def _replace_actions(model: Any, change: Callable[[Remat], Remat]) -> Iterator[None]:
    """Change the actions of a model, also those of groups, for the duration of a block."""
    before = [(e.module, swap.get_action(e.module), swap.get_groups(e.module)) for e in find_modules(model)]
    try:
        for module, action, groups in before:
            changed = tuple(dataclasses.replace(group, action=change(group.action)) for group in groups)
            swap.swap(module, None if action is None else change(action), changed)
        yield
    finally:
        for module, action, groups in before:
            swap.swap(module, action, groups)

# SPDX-License-Identifier: Apache-2.0
"""Names inside a region (being built)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..rules.rule import Remat


def needed(action: Remat) -> bool:
    return bool(action.save or action.offload)


def lowered_policy(action: Remat) -> Callable[..., Any] | None:
    return None if action.policy is None else action.policy.lower()


@contextlib.contextmanager
def recorded(args: Any, kwargs: Any) -> Iterator[None]:
    yield


def evaluate(fn: Any, leaves: list[Any], action: Remat) -> list[Any]:
    return fn(leaves)

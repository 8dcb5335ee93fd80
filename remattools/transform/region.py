# SPDX-License-Identifier: Apache-2.0
"""One rematerialised call: any arguments in, the plain call's effects out.

Sits on `capture`; `swap` and `decorator` call it. Facts that shaped it:

-   JAX caches the trace of a checkpointed function by the function object, the
    tree structure and the avals of its arguments. So one function object serves
    all blocks, and everything static (spec of the module, method, strings, bools)
    rides in the tree structure: 96 equal layers are traced once. It serves within
    one trace around the blocks only: attributes of classes, globals and replaced
    methods may change before the next, and no key sees those.
-   `nnx.remat` writes a model back that it closed over, which destroys it under
    every other transform. Here only edits come back; an untouched model is not
    written to.
-   Without a tracer among the arguments nothing is differentiated, and the plain
    method runs: eager decoding may look at concrete values as it always could.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from .. import compat
from ..rules.paths import Path, parse_path
from ..rules.policy import Policy
from ..rules.rule import Remat
from .capture import effects
from .capture import walk as cap
from .naming import names, scopes

# A target is how a region finds the code to run: `target(*args, **kwargs)`, where the first of `args` may be the
# rebuilt module. It must be hashable and compare by value.
Target = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a trace depends on besides the arrays' shapes; the aux data of `_Inputs`."""

    target: Target
    action: Remat
    spec: Any
    # A fresh object where the trace may not be shared, else None.
    token: object

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.target, self.action, self.spec, self.token))

    def __hash__(self) -> int:
        return self._hash


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Inputs:
    """Arrays of a call, with all else as the tree structure."""

    leaves: list[Any]
    static: _Static

    def tree_flatten(self) -> tuple[list[Any], _Static]:
        return self.leaves, self.static

    @classmethod
    def tree_unflatten(cls, static: _Static, leaves: Any) -> "_Inputs":
        return cls(list(leaves), static)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Outputs:
    leaves: list[Any]
    done: effects.Done

    def tree_flatten(self) -> tuple[list[Any], effects.Done]:
        return self.leaves, self.done

    @classmethod
    def tree_unflatten(cls, done: effects.Done, leaves: Any) -> "_Outputs":
        return cls(list(leaves), done)


# What takes a region's place: `stand_in(run, inputs, path)` returns what `run(inputs)` would, for the module at `path`.
StandIn = Callable[[Callable[[Any], Any], Any, Path], Any]


class _Mode(threading.local):
    disabled = False
    named = False
    stand_in: tuple[Policy, StandIn] | None = None


_mode = _Mode()


class _Shared(threading.local):
    """The function objects whose traces equal blocks share, one for each trace around them."""

    def __init__(self) -> None:
        self.runs: dict[tuple[Any, Any], Callable[[_Inputs], _Outputs]] = {}

    def get(self, body: Callable[[_Inputs], _Outputs]) -> Callable[[_Inputs], _Outputs]:
        """The object for `body` in the trace that is on."""
        key = (body, compat.current_trace())
        run = self.runs.pop(key, None)
        if run is None:
            run = functools.partial(body)
            # What JAX cached for an object may hold values of its trace, which then never ends by itself: keep few.
            alive = [(known, kept) for known, kept in self.runs.items() if known[1]() is not None]
            self.runs = dict(alive[-_MAX_SHARED:])
        self.runs[key] = run  # the last used comes last
        return run

    def forget(self, body: Callable[[_Inputs], _Outputs]) -> None:
        """Let the next block of the trace that is on be traced by itself."""
        self.runs.pop((body, compat.current_trace()), None)


# Traces that stand around each other: a model's, and one for each level of regions in regions.
_MAX_SHARED = 64
_shared = _Shared()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside, regions run plainly: for looking at what a model computes."""
    before, _mode.disabled = _mode.disabled, True
    try:
        yield
    finally:
        _mode.disabled = before


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Inside, the operations of regions carry module paths: for looking at what regions keep."""
    before, _mode.named = _mode.named, True
    try:
        yield
    finally:
        _mode.named = before


@contextlib.contextmanager
def replaced(policy: Policy, stand_in: StandIn) -> Iterator[None]:
    """Inside, `stand_in` computes each region under `policy`: for looking at the program around them.

    JAX keeps what it traces of inner jits for later calls, so the policy must be nobody else's: a callable of its own.
    """
    before, _mode.stand_in = _mode.stand_in, (policy, stand_in)
    try:
        yield
    finally:
        _mode.stand_in = before


def is_disabled() -> bool:
    """Whether regions run plainly just now."""
    return _mode.disabled


def is_named() -> bool:
    """Whether the operations of regions carry module paths just now."""
    return _mode.named


def call(target: Target, action: Remat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `target(*args, **kwargs)` as one rematerialised region.

    Args:
        target: Hashable callable; what it returns and changes is what the plain
            call would.
        action: What is saved, offloaded and recomputed.
        args: Any values; arrays and nnx objects inside are traced, everything
            else stays what it is.
        kwargs: Likewise.
    """
    if is_disabled():
        return target(*args, **kwargs)
    captured = cap.capture((args, kwargs))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in captured.leaves):
        return target(*args, **kwargs)
    body: Callable[[_Inputs], _Outputs] = _run_named if _mode.named else _run
    run: Callable[[_Inputs], _Outputs]
    token = None
    if captured.unshareable is not None:
        # Own function object: JAX's cache holds it weakly, so that its entry, which may hold arrays, dies with it.
        run, token = functools.partial(body), object()
    else:
        run = _shared.get(body)
    static = _Static(target, action, captured.spec, token)
    inputs = _Inputs(captured.leaves, static)
    if _mode.stand_in is not None and _mode.stand_in[0] == action.policy:
        outputs = _mode.stand_in[1](run, inputs, _path_of(args))
    else:
        outputs = _checkpointed(run, action)(inputs)
    if outputs.done.once:
        _shared.forget(body)
    return effects.replay(outputs.done, outputs.leaves, captured.objects)


def _checkpointed(run: Callable[[_Inputs], _Outputs], action: Remat) -> Callable[[_Inputs], _Outputs]:
    policy = names.lowered_policy(action)
    return jax.checkpoint(run, policy=policy, prevent_cse=action.prevent_cse)


def _path_of(args: tuple[Any, ...]) -> Path:
    """Where the module that is called lies, while paths are recorded."""
    return parse_path(vars(args[0]).get(cap.SCOPE_KEY, "."))


def _run(inputs: _Inputs) -> _Outputs:
    """The body of every region; JAX traces it once per distinct structure."""
    return _traced(inputs, named=names.needed(inputs.static.action))


def _run_named(inputs: _Inputs) -> _Outputs:
    """The same with module paths; another function, since JAX's cache of traces goes by it."""
    with jax.named_scope(scopes.REGION):
        return _traced(inputs, named=True)


def _traced(inputs: _Inputs, *, named: bool) -> _Outputs:
    static = inputs.static
    if not named:
        return _body(inputs.leaves, static, named=False)
    # The names are put onto the traced operations, where a pattern can see them all.
    found: list[effects.Done] = []

    def traced(leaves: list[Any]) -> list[Any]:
        outputs = _body(leaves, static, named=True)
        found.append(outputs.done)
        return outputs.leaves

    leaves = names.evaluate(traced, inputs.leaves, static.action)
    return _Outputs(leaves, found[0])


def _body(leaves: list[Any], static: _Static, *, named: bool) -> _Outputs:
    objects: list[Any] = []
    args, kwargs = cap.rebuild(static.spec, leaves, objects)
    before = effects.snapshot(objects)
    if named:
        with scopes.recorded(_roots(args, kwargs)):
            out = static.target(*args, **kwargs)
    else:
        out = static.target(*args, **kwargs)
    return _Outputs(*effects.changes(objects, before, out))


def _roots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Where names start: at the region's own module, or at the first argument of a function."""
    for index, value in enumerate(args):
        yield (() if index == 0 else (f"arg{index}",)), value
    for key, value in kwargs.items():
        yield (key,), value

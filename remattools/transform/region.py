# SPDX-License-Identifier: Apache-2.0
"""One rematerialised call: any arguments in, the plain call's effects out.

Sits on `capture`; `swap` and `decorator` call it. Facts that shaped it:

-   JAX caches the trace of a checkpointed function by the function object and the tree structure and avals of its
    arguments. So one function object serves all blocks, and everything static (spec of the module, method, strings,
    bools) is part of the tree structure: 96 equal layers are traced once. The object is shared only within one
    enclosing trace, since class attributes, globals and replaced methods may change before the next one and are not
    part of any key.
-   `nnx.remat` writes back a model that it closes over, which destroys the model under every other transform. Here
    only edits come back; an unchanged model is not written to.
-   Without a tracer among the arguments nothing is differentiated, so the plain method runs, and eager decoding can
    read concrete values.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from .. import compat
from ..jaxpr import jaxprs
from ..rules.paths import Path, format_path, parse_path
from ..rules.policy_types import Policy
from ..rules.rule import Remat
from ..rules.ruleset import LOSS
from .capture import effects
from .capture.rebuild import rebuild
from .capture.walk import SCOPE_KEY, Capture, capture
from .naming import marking, names, scopes
from .tiling import evaluate as tiling

# The code that a region runs, as `target(*args, **kwargs)`; the first of `args` may be the rebuilt module. It must be
# hashable and compare by value.
RegionTarget = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _StaticInputs:
    """All that a trace depends on except the arrays; the aux data of `_Inputs`."""

    target: RegionTarget
    action: Remat
    holds_tiles: bool
    is_loss: bool
    batch: tuple[int, ...]
    spec: Any
    # A new object if the trace must not be shared, else None.
    token: object

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.target, self.action, self.holds_tiles, self.is_loss, self.batch, self.spec, self.token))

    def __hash__(self) -> int:
        return self._hash


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Inputs:
    """The arrays of a call as leaves, and everything else as tree structure."""

    leaves: list[Any]
    static: _StaticInputs

    def tree_flatten(self) -> tuple[list[Any], _StaticInputs]:
        return self.leaves, self.static

    @classmethod
    def tree_unflatten(cls, static: _StaticInputs, leaves: Any) -> "_Inputs":
        return cls(list(leaves), static)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Outputs:
    leaves: list[Any]
    call_effects: effects.CallEffects

    def tree_flatten(self) -> tuple[list[Any], effects.CallEffects]:
        return self.leaves, self.call_effects

    @classmethod
    def tree_unflatten(cls, call_effects: effects.CallEffects, leaves: Any) -> "_Outputs":
        return cls(list(leaves), call_effects)


# Computes a region in another way: `replacement(run, inputs, path)` returns what `run(inputs)` would, for the module at
# `path`.
Replacement = Callable[[Callable[[Any], Any], Any, Path], Any]


class _Mode(threading.local):
    disabled = False
    with_paths = False
    with_scopes = False
    replacement: tuple[Policy, Replacement] | None = None


_mode = _Mode()


class _SharedBodies(threading.local):
    """The function objects whose traces equal blocks share, one for each enclosing trace."""

    def __init__(self) -> None:
        self.runs: dict[tuple[Any, Any], Callable[[_Inputs], _Outputs]] = {}

    def get(self, body: Callable[[_Inputs], _Outputs]) -> Callable[[_Inputs], _Outputs]:
        """Return the function object for `body` in the current trace."""
        key = (body, compat.get_current_trace())
        run = self.runs.pop(key, None)
        if run is None:
            run = functools.partial(body)
            # JAX's cache entry for an object may hold tracers, which keep their trace alive: limit the number.
            live = [(other, value) for other, value in self.runs.items() if other[1]() is not None]
            self.runs = dict(live[-_MAX_SHARED:])
        self.runs[key] = run  # the most recently used comes last
        return run

    def forget(self, body: Callable[[_Inputs], _Outputs]) -> None:
        """Stop sharing: the next block of the current trace is traced again."""
        self.runs.pop((body, compat.get_current_trace()), None)


# Nested traces: the model's, and one for each level of regions inside regions.
_MAX_SHARED = 64
_shared = _SharedBodies()


@contextlib.contextmanager
def disable_regions() -> Iterator[None]:
    """Run regions as plain calls inside the block, to look at what a model computes."""
    before, _mode.disabled = _mode.disabled, True
    try:
        yield
    finally:
        _mode.disabled = before


@contextlib.contextmanager
def record_region_paths() -> Iterator[None]:
    """Put module paths on the operations of regions inside the block, to look at what regions save."""
    before, _mode.with_paths = _mode.with_paths, True
    try:
        yield
    finally:
        _mode.with_paths = before


@contextlib.contextmanager
def record_region_scopes() -> Iterator[None]:
    """Put module paths on the operations of regions inside the block, and change nothing else in their programs."""
    before, _mode.with_scopes = _mode.with_scopes, True
    try:
        yield
    finally:
        _mode.with_scopes = before


@contextlib.contextmanager
def replace_regions(policy: Policy, replacement: Replacement) -> Iterator[None]:
    """Compute each region under `policy` by `replacement` inside the block, to look at the program around them.

    JAX caches the traces of inner jits for later calls, so no other code may use the same policy object.
    """
    before, _mode.replacement = _mode.replacement, (policy, replacement)
    try:
        yield
    finally:
        _mode.replacement = before


def is_disabled() -> bool:
    """Whether regions run as plain calls in this thread."""
    return _mode.disabled


def is_recording_paths() -> bool:
    """Whether operations of regions get module paths in this thread."""
    return _mode.with_paths or _mode.with_scopes


def call(
    target: RegionTarget,
    action: Remat,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    holds_tiles: bool = False,
    is_loss: bool = False,
) -> Any:
    """Run `target(*args, **kwargs)` as one rematerialised region.

    Args:
        target: Hashable callable that compares by value.
        action: What is saved, offloaded, recomputed and computed in pieces.
        args: Any values; arrays and nnx objects in them are traced, everything else is static.
        kwargs: Any values, treated like `args`.
        holds_tiles: Whether modules inside are computed in pieces by actions of their own.
        is_loss: Whether stretches that lie in modules altogether stay whole.

    Returns:
        What the plain call would return; objects that it changes are changed in the same way.
    """
    if is_disabled():
        return target(*args, **kwargs)
    captured = capture((args, kwargs))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in captured.leaves):
        return target(*args, **kwargs)
    body: Callable[[_Inputs], _Outputs] = _run_with_scopes if _mode.with_scopes else _run
    body = _run_with_paths if _mode.with_paths else body
    run: Callable[[_Inputs], _Outputs]
    token = None
    if captured.unshareable is not None:
        # A new function object: JAX's cache holds it weakly, so its entry, which may hold arrays, dies with it.
        run, token = functools.partial(body), object()
    else:
        run = _shared.get(body)
    batch = _find_batch(args, captured) if action.tile is not None and action.tile.axis == "batch" else ()
    is_around_pieces = (holds_tiles or action.tile is not None) and not action.is_tile_alone
    static = _StaticInputs(target, action, is_around_pieces, is_loss, batch, captured.spec, token)
    inputs = _Inputs(captured.leaves, static)
    if _mode.replacement is not None and _is_replaced(action):
        outputs = _mode.replacement[1](run, inputs, _find_path(args))
    else:
        with tiling.name_program(LOSS if is_loss else format_path(_find_path(args))):
            outputs = _make_region(run, static)(inputs)
    if outputs.call_effects.is_single_use:
        _shared.forget(body)
    return effects.replay(outputs.call_effects, outputs.leaves, captured.objects)


def _is_replaced(action: Remat) -> bool:
    return _mode.replacement is not None and _mode.replacement[0] == action.policy


def _make_region(run: Callable[[_Inputs], _Outputs], static: _StaticInputs) -> Callable[[_Inputs], _Outputs]:
    action = static.action
    if action.is_tile_alone:  # the pieces are regions; a jit gives equal blocks one trace
        return jax.jit(run)
    policy = names.lower_policy(action, holds_tiles=static.holds_tiles)
    return jax.checkpoint(run, policy=policy, prevent_cse=action.prevent_cse)


def _find_batch(args: tuple[Any, ...], captured: Capture) -> tuple[int, ...]:
    """Indices of the arrays outside of nnx objects; without such objects, of those outside of the first argument."""
    held = {id(item.get_raw_value()) for item in captured.objects if isinstance(item, nnx.Variable)}
    if not held and args:
        held = set(map(id, capture(args[0]).leaves))
    return tuple(index for index, leaf in enumerate(captured.leaves) if id(leaf) not in held)


def _find_path(args: tuple[Any, ...]) -> Path:
    """The path of the called module while paths are recorded, else the root."""
    return parse_path(getattr(args[0], SCOPE_KEY, ".") if args and isinstance(args[0], nnx.Module) else ".")


def _run(inputs: _Inputs) -> _Outputs:
    """The body of every region; JAX traces it once for each distinct structure."""
    static = inputs.static
    return _trace_body(inputs, with_paths=names.is_naming_needed(static.action, holds_tiles=static.holds_tiles))


def _run_with_paths(inputs: _Inputs) -> _Outputs:
    """`_run` with module paths; a separate function, since the function is the key of JAX's trace cache."""
    with jax.named_scope(scopes.REGION):
        if _is_replaced(inputs.static.action):  # its program is looked at, with the marks of `scopes`, and never run
            return _run_body(inputs.leaves, inputs.static, with_paths=True)
        return _trace_body(inputs, with_paths=True)


def _run_with_scopes(inputs: _Inputs) -> _Outputs:
    """`_run` with module paths in the scopes alone, so that its program is the same."""
    with jax.named_scope(scopes.REGION):
        static = inputs.static
        is_naming_needed = names.is_naming_needed(static.action, holds_tiles=static.holds_tiles)
        if is_naming_needed or static.action.tile is not None:
            return _trace_body(inputs, with_paths=True)
        return _run_body(inputs.leaves, static, with_paths=True, mark_outputs=False)


def _trace_body(inputs: _Inputs, *, with_paths: bool) -> _Outputs:
    static = inputs.static
    if not with_paths and static.action.tile is None:
        return _run_body(inputs.leaves, static, with_paths=False)
    # Names are added to the traced program, where patterns see all operations.
    recorded: list[effects.CallEffects] = []

    # Whether a stretch lies in modules is read from the scopes of its equations.
    with_scopes = with_paths or (static.is_loss and static.action.tile is not None)

    def run_body(leaves: list[Any]) -> list[Any]:
        outputs = _run_body(leaves, static, with_paths=with_scopes, mark_outputs=with_paths)
        recorded.append(outputs.call_effects)
        return outputs.leaves

    program = jax.make_jaxpr(run_body)(inputs.leaves)
    if with_paths:
        program = marking.mark_program(program, static.action, holds_tiles=static.holds_tiles)
    if static.action.tile is None:
        return _Outputs(jaxprs.run(program, inputs.leaves), recorded[0])
    leaves = tiling.run_tiled(program, inputs.leaves, static.action.tile, is_loss=static.is_loss, batch=static.batch)
    return _Outputs(leaves, recorded[0])


def _run_body(leaves: list[Any], static: _StaticInputs, *, with_paths: bool, mark_outputs: bool = True) -> _Outputs:
    objects: list[Any] = []
    args, kwargs = rebuild(static.spec, leaves, objects)
    before = effects.snapshot(objects)
    if with_paths:
        if mark_outputs:
            args, kwargs = scopes.name_inputs(args, kwargs, ".")
        with scopes.record_paths(_find_roots(args, kwargs), mark_outputs=mark_outputs):
            out = static.target(*args, **kwargs)
    else:
        out = static.target(*args, **kwargs)
    return _Outputs(*effects.collect_effects(objects, before, out))


def _find_roots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Where names start: at the region's module, or at the first argument of a function."""
    for index, value in enumerate(args):
        yield (() if index == 0 else (f"arg{index}",)), value
    for key, value in kwargs.items():
        yield (key,), value

# SPDX-License-Identifier: Apache-2.0
"""Record what a call changes in its objects, and replay the changes on the caller's.

Sits on `walk` and `rebuild`. A region runs on rebuilt copies; only what the call changes leaves it, as edits: the value
of a Variable, an attribute, the items of a dict. Unchanged objects are never written to, so that a model that a
transform closes over is safe.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from flax import errors as flax_errors
from flax import nnx
from flax.nnx import graphlib

from . import plain_objects
from .rebuild import Builder, init_node
from .walk import STATE_KEY, Walk, flatten_one_level, get_node_content, run_walk


@dataclasses.dataclass(frozen=True)
class Edit:
    """One object that a call changed.

    Attributes:
        index: Index of the object among the captured ones.
        content: Spec of its new content: raw value and metadata of a Variable, the changed attributes of a module,
            all items of a container.
        deleted: Names of deleted attributes; modules and plain objects only.
    """

    index: int
    content: Any
    deleted: tuple[Any, ...] = ()


def snapshot(objects: Iterable[Any]) -> list[Any]:
    """Return the shallow content of every object, to find later which ones a call changed."""
    return [_copy_shallow(item) for item in objects]


def _copy_shallow(item: Any) -> Any:
    if isinstance(item, nnx.Variable):
        return (item.get_raw_value(), item.get_metadata())
    if isinstance(graphlib.get_node_impl(item), graphlib.GraphNodeImpl):
        return get_node_content(item)
    if type(item) is list:
        return list(item)
    if type(item) is dict:
        return dict(item)
    if type(item) in (set, collections.deque):
        return list(item)
    if graphlib.is_node(item):
        return flatten_one_level(item)
    return plain_objects.get_content(item)


@dataclasses.dataclass(frozen=True, eq=False)
class CallEffects:
    """What a call changed and returned, except the arrays; hashes by identity, since JAX never compares it.

    Attributes:
        edits: The objects that it changed.
        out: Spec of what it returned.
        is_single_use: Whether the trace must not be reused, since it leaves behind an object that is not rebuilt for
            each call, such as a plain object without arrays: every call would return the same object.
    """

    edits: tuple[Edit, ...]
    out: Any
    is_single_use: bool


def collect_effects(objects: list[Any], before: list[Any], out: Any) -> tuple[list[Any], CallEffects]:
    """Find what a call changed.

    Args:
        objects: The captured objects, after the call.
        before: Their `snapshot` from before the call.
        out: What the call returned; may contain any of the objects.

    Returns:
        The arrays that the call returned or wrote into objects, and everything else.
    """
    # What leaves the region must not contain tracers of its trace.
    walk, (edits, spec) = run_walk(
        lambda walk: (_collect_edits(walk, objects, before), walk.visit(out)),
        is_whole=lambda item: not plain_objects.has_arrays(item),
        objects=objects,
    )
    new = walk.objects[len(objects) :]
    is_single_use = any(plain_objects.is_mutable(item) and id(item) not in walk.copied_ids for item in new)
    return walk.leaves, CallEffects(edits, spec, is_single_use)


def _collect_edits(walk: Walk, objects: list[Any], before: list[Any]) -> tuple[Edit, ...]:
    edits = []
    for index, (item, old) in enumerate(zip(objects, before, strict=True)):
        new = _copy_shallow(item)
        if old is None or _is_same(old, new):
            continue
        if isinstance(old, plain_objects.Content):
            edits.append(_make_plain_edit(walk, index, old, new))
        elif isinstance(old, dict) and type(item) is not dict:
            changed = {key: value for key, value in new.items() if key not in old or value is not old[key]}
            changed.pop(STATE_KEY, None)
            deleted = tuple(key for key in old if key not in new)
            edits.append(Edit(index, walk.visit_attributes(changed), deleted))
        else:
            edits.append(Edit(index, walk.visit_content(item)))
    return tuple(edits)


def _make_plain_edit(walk: Walk, index: int, old: plain_objects.Content, new: plain_objects.Content) -> Edit:
    changed = {
        key: value
        for key, value in new.attributes.items()
        if key not in old.attributes or value is not old.attributes[key]
    }
    items = None if new.items is None or _is_same(old.items, new.items) else new.items
    deleted = tuple(key for key in old.attributes if key not in new.attributes)
    return Edit(index, walk.visit_plain_content(plain_objects.Content(changed, items)), deleted)


def _is_same(old: Any, new: Any) -> bool:
    """Whether all children are identical; an array that was not replaced is the same object."""
    if isinstance(old, plain_objects.Content):
        return _is_same(old.attributes, new.attributes) and (old.items is None or _is_same(old.items, new.items))
    if isinstance(old, dict):
        return list(old) == list(new) and all(old[key] is new[key] for key in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
    value, extra = old  # a Variable's raw value and metadata, or a pytree's children and treedef
    if isinstance(value, list):
        return _is_same(value, new[0]) and bool(extra == new[1])
    return value is new[0] and _is_same(extra, new[1])


def replay(call_effects: CallEffects, leaves: Iterable[Any], objects: list[Any]) -> Any:
    """Change the caller's `objects` as the call changed its copies, and return the call's output."""
    build = Builder(iter(leaves), objects)
    for edit in call_effects.edits:
        _apply_edit(edit, objects[edit.index], build)
    return build.build(call_effects.out)


def _apply_edit(edit: Edit, target: Any, build: Builder) -> None:
    if isinstance(target, nnx.Variable):
        raw, metadata = edit.content
        value = build.build(raw)
        if value is not target.get_raw_value():
            target.set_raw_value(value)
        if metadata.value != target.get_metadata():
            target.set_metadata(dict(metadata.value))
    elif isinstance(graphlib.get_node_impl(target), graphlib.GraphNodeImpl):
        _check_mutable(target)
        init_node(target, {key: build.build(item) for key, item in edit.content})
        for key in edit.deleted:
            object.__delattr__(target, str(key))
    elif type(target) is list:
        target[:] = [build.build(item) for item in edit.content]
    elif type(target) is dict:
        _refill(target, build.build_items(edit.content))
    elif type(target) in (set, collections.deque):
        plain_objects.set_items(target, [build.build(item) for item in edit.content])
    elif not graphlib.is_node(target):
        attributes, items = edit.content
        plain_objects.set_attributes(target, build.build_attributes(attributes), edit.deleted)
        if items is not None:
            plain_objects.set_items(target, build.build_plain_items(type(target), items))
    else:
        _replace_content(target, build.build_pytree(edit.content))


@contextlib.contextmanager
def restore_objects(objects: Iterable[Any]) -> Iterator[None]:
    """Undo, after the block, what a trace inside it wrote into the caller's lists, dicts and plain objects."""
    items = list(objects)
    before = snapshot(items)
    try:
        yield
    finally:
        for item, old in zip(items, before, strict=True):
            if old is not None and not _is_same(old, _copy_shallow(item)):
                _restore(item, old)


def _restore(item: Any, old: Any) -> None:
    if isinstance(old, plain_objects.Content):
        now = plain_objects.get_content(item)
        new = now.attributes if now is not None else {}
        plain_objects.set_attributes(item, old.attributes, [name for name in new if name not in old.attributes])
        if old.items is not None:
            plain_objects.set_items(item, old.items)
    elif isinstance(item, list | dict | set | collections.deque):
        plain_objects.set_items(item, old)


def _check_mutable(node: Any) -> None:
    """Raise nnx's error for a change across trace levels, as the plain call would."""
    state = vars(node).get(STATE_KEY)
    if state is not None and not state.trace_state.is_valid():
        raise flax_errors.TraceContextError(f"Cannot mutate '{type(node).__name__}' from different trace level")


def _refill(target: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    target.clear()
    target.update(content)


def _replace_content(target: Any, new: Any) -> None:
    """Replace the content of a mutable pytree (an OrderedDict, a dataclass) by that of another."""
    if isinstance(target, MutableMapping):
        _refill(target, dict(new))
    else:
        for key, value in vars(new).items():
            object.__setattr__(target, key, value)

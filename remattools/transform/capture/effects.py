# SPDX-License-Identifier: Apache-2.0
"""What a call did to the objects it was given, and the same done to the caller's.

Sits on `capture` and `plain`. A region runs on rebuilt copies; only what a call changed leaves
it, as edits: the value of a Variable, an attribute, the items of a dict. Untouched
objects are never written to, so that a model closed over by a transform is safe.
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
from .walk import STATE_KEY, Builder, Walk, flatten_one_level, get_node_content, init_node, run_walk


@dataclasses.dataclass(frozen=True)
class Edit:
    """One object that a call changed.

    Attributes:
        index: Which of the captured objects.
        content: Spec of its new content: the raw value and the metadata of a
            Variable, the changed attributes of a module, all items of a container.
        deleted: Attributes that are gone; modules and plain objects only.
    """

    index: int
    content: Any
    deleted: tuple[Any, ...] = ()


def snapshot(objects: Iterable[Any]) -> list[Any]:
    """Shallow content of every object, to tell later which ones a call changed."""
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
    """What a call did and returned but for the arrays; hashes by identity, JAX never compares it.

    Attributes:
        edits: What it changed.
        out: Spec of what it returned.
        is_single_use: Whether it leaves an object behind that is not built anew for each call of the trace, such as a plain
            object without arrays: a second call would hand out the same one.
    """

    edits: tuple[Edit, ...]
    out: Any
    is_single_use: bool


def collect_effects(objects: list[Any], before: list[Any], out: Any) -> tuple[list[Any], CallEffects]:
    """What a call did: the arrays it leaves behind, and all else.

    Args:
        objects: The captured objects as the call saw them.
        before: Their `snapshot` from before the call.
        out: What the call returned; may be or hold any of the objects.
    """
    # What leaves the region must not hold values of its trace.
    walk, (edits, spec) = run_walk(
        lambda walk: (_collect_edits(walk, objects, before), walk.visit(out)),
        is_whole=lambda item: not plain_objects.has_arrays(item),
        objects=objects,
    )
    new = walk.objects[len(objects) :]
    once = any(plain_objects.is_mutable(item) and id(item) not in walk.copied_ids for item in new)
    return walk.leaves, CallEffects(edits, spec, once)


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
    """Identity of every child; an array that was not replaced is the same object."""
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
    """Do to the caller's `objects` what the call did to its copies; returns the output."""
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
    """Afterwards what a call wrote into lists, dicts and plain objects themselves is undone: for looking at a trace."""
    kept = list(objects)
    before = snapshot(kept)
    try:
        yield
    finally:
        for item, old in zip(kept, before, strict=True):
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
    """nnx's own error where plain code would have met it: a change across trace levels."""
    state = vars(node).get(STATE_KEY)
    if state is not None and not state.trace_state.is_valid():
        raise flax_errors.TraceContextError(f"Cannot mutate '{type(node).__name__}' from different trace level")


def _refill(target: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    target.clear()
    target.update(content)


def _replace_content(target: Any, new: Any) -> None:
    """Give a mutable pytree (an OrderedDict, a dataclass) the content of another."""
    if isinstance(target, MutableMapping):
        _refill(target, dict(new))
    else:
        for key, value in vars(new).items():
            object.__setattr__(target, key, value)

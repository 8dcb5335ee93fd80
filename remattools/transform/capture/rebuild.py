# SPDX-License-Identifier: Apache-2.0
"""Rebuild a call's objects from their spec.

Sits on `plain_objects`; `walk` makes the specs. A spec is a nested tuple whose first item is a tag. It is hashable, and
equal for calls that may share one trace.
"""

from collections.abc import Iterable
from typing import Any

import jax

from . import plain_objects

# Tags of specs.
LEAF, REF, STATIC, VARIABLE, NODE, LIST, DICT, TUPLE, PYTREE, STATE, OBJECT = range(11)


class Static:
    """A value that is not traced; compares by its frozen key.

    `objects` are the value and those it refers to that a call may change or return.
    """

    __slots__ = ("key", "objects", "value")

    def __init__(self, key: Any, value: Any, objects: tuple[Any, ...] = ()) -> None:
        self.key, self.value, self.objects = key, value, objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def rebuild(spec: Any, leaves: Iterable[Any], objects: list[Any]) -> Any:
    """Rebuild a value from its spec and its arrays.

    Args:
        spec: From `capture`.
        leaves: Arrays in the order of the walk.
        objects: Objects that the spec refers to by index; new ones are appended.
    """
    return Builder(iter(leaves), objects).build(spec)


class Builder:
    """Inverse of `Walk`."""

    def __init__(self, leaves: Any, objects: list[Any]) -> None:
        self.leaves = leaves
        self.objects = objects

    def build(self, spec: Any) -> Any:
        """Return the value that a spec describes."""
        tag = spec[0]
        if tag == LEAF:
            return next(self.leaves)
        if tag == REF:
            return self.objects[spec[1]]
        if tag == STATIC:
            self.objects.extend(spec[1].objects)
            return spec[1].value
        if tag == TUPLE:
            items = [self.build(item) for item in spec[2]]
            return tuple(items) if spec[1] is tuple else spec[1](*items)
        if tag == STATE:
            return jax.tree.unflatten(spec[1].value, ())
        return self.build_object(spec)

    def build_object(self, spec: Any) -> Any:
        """Build a value with an identity; it gets its index before its children."""
        tag = spec[0]
        index = len(self.objects)
        self.objects.append(None)  # reserves the index while the children are built
        result: Any
        if tag == VARIABLE:
            raw = self.build(spec[2])
            result = spec[1].from_metadata(raw, dict(spec[3].value))
        elif tag == NODE:
            # Before its attributes, since they may refer to it.
            self.objects[index] = result = object.__new__(spec[1])
            init_node(result, {key: self.build(item) for key, item in spec[2]})
        elif tag == LIST:
            self.objects[index] = result = []
            result.extend(self.build(item) for item in spec[1])
        elif tag == DICT:
            self.objects[index] = result = {}
            result.update(self.build_items(spec[1]))
        elif tag == OBJECT:
            result = self.build_plain_object(index, *spec[1:])
        else:
            result = self.build_pytree(spec[1:])
        self.objects[index] = result
        return result

    def build_plain_object(self, index: int, kind: Any, attributes: Any, items: Any) -> Any:
        """Build a plain Python object without calling its constructor."""
        if issubclass(kind, tuple):
            content = self.build_attributes(attributes)
            result = tuple.__new__(kind, self.build_plain_items(kind, items))
        else:
            # Before its content, which may refer to it.
            self.objects[index] = result = plain_objects.create(kind)
            content = self.build_attributes(attributes)
            if items is not None:
                plain_objects.set_items(result, self.build_plain_items(kind, items))
        plain_objects.set_attributes(result, content)
        return result

    def build_attributes(self, content: Any) -> dict[Any, Any]:
        """Build attributes by name, from `Walk.visit_attributes`."""
        return {key: self.build(item) for key, item in content}

    def build_plain_items(self, kind: type, content: Any) -> Any:
        """Build the items of a plain container, from `Walk.visit_plain_content` or `Walk.visit_content`."""
        return self.build_items(content) if issubclass(kind, dict) else [self.build(item) for item in content]

    def build_items(self, content: Any) -> dict[Any, Any]:
        """Build a dict, from `Walk.visit_items`."""
        return {key.value: self.build(item) for key, item in content}

    def build_pytree(self, content: Any) -> Any:
        """Build a pytree, from `Walk.visit_pytree`."""
        treedef, children = content
        return jax.tree.unflatten(treedef.value, [self.build(child) for child in children])


def init_node(node: Any, attributes: dict[Any, Any]) -> None:
    """Set attributes without calling nnx's `__setattr__`, which would classify them again."""
    for key, value in attributes.items():
        object.__setattr__(node, str(key), value)

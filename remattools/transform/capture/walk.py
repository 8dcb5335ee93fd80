# SPDX-License-Identifier: Apache-2.0
"""A call's objects as arrays and a hashable spec, and back, with what changed.

Sits on `freeze` and `plain`; knows nothing of policies or rules. A region has to hand
modules, caches, arrays, strings and callables through `jax.checkpoint`, which
takes arrays only. `capture` walks everything a call can reach and splits it in

-   leaves: the arrays, in a fixed order;
-   a spec: nested tuples that say how to rebuild the rest, hashable and equal
    for calls that may share one trace;
-   objects: everything with an identity (modules, Variables, lists, dicts), by
    index, so that sharing, tied weights and returned arguments stay what they
    are. A plain Python object that holds arrays is taken apart like a module; one
    that holds none stays itself, and it and what it refers to are objects, since
    the call may write arrays into it.

`nnx.split` and `nnx.merge` do not serve here: they write every Variable back,
also the untouched ones (which destroys a model closed over by a transform), lose
in-place changes of plain dicts, and give graphdefs that cannot be hashed when a
static attribute is a list.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import graphlib

from . import plain_objects
from .cache_key import Freezer

# Specs are tuples whose first item is one of these tags.
_LEAF, _REF, _STATIC, _VARIABLE, _NODE, _LIST, _DICT, _TUPLE, _PYTREE, _STATE, _OBJECT = range(11)

STATE_KEY = "_pytree__state"  # nnx's record of the trace level an object was made at

# While operations are being named (`scopes`), modules carry a subclass and an attribute that no trace may depend on.
SCOPE_KEY = "_pytree__remattools_scope"
SCOPE_OF = "_remattools_scope_of"


def get_own_class(value: Any) -> type:
    """The class of `value` but for the temporary one that names its operations."""
    kind = type(value)
    own: type = kind.__dict__.get(SCOPE_OF, kind)
    return own


class _Static:
    """A value that is not traced; compares by its frozen key.

    `objects` are the value and what it refers to, so far as a call may change or return them.
    """

    __slots__ = ("key", "objects", "value")

    def __init__(self, key: Any, value: Any, objects: tuple[Any, ...] = ()) -> None:
        self.key, self.value, self.objects = key, value, objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass
class Capture:
    """What `capture` found.

    Attributes:
        leaves: Arrays in order of the walk.
        objects: Objects with an identity, by index.
        spec: How to rebuild the value; hashable.
        unshareable: A value that forbids sharing the trace, or None.
    """

    leaves: list[Any]
    objects: list[Any]
    spec: Any
    unshareable: Any


def capture(value: Any) -> Capture:
    """Split `value` (any nest of nnx objects, pytrees and statics) into arrays and a spec."""
    # What a hook writes into is the caller's own, arrays included; modules are always the region's.
    walk, spec = run_walk(
        lambda walk: walk.visit(value),
        is_whole=lambda item: not plain_objects.has_instances(item, plain_objects.NNX_TYPES),
    )
    return Capture(walk.leaves, walk.objects, spec, walk.freezer.unshareable)


def rebuild(spec: Any, leaves: Iterable[Any], objects: list[Any]) -> Any:
    """Build a value from its spec; objects already in `objects` are used, new ones appended."""
    return Builder(iter(leaves), objects).build(spec)


def run_walk[R](
    visit: Callable[["Walk"], R], *, is_whole: Callable[[Any], bool], objects: Sequence[Any] = ()
) -> tuple["Walk", R]:
    """A walk and what `visit` makes of it, once more where a list would be one object here and another there.

    A static value stays itself, and so does what it refers to. A list that is also
    met by itself would be copied; it is kept then, if `is_whole` says so.
    """
    kept: frozenset[int] = frozenset()
    while True:
        walk = Walk(objects, kept)
        result = visit(walk)
        found = frozenset(id(item) for item in walk.split_containers if is_whole(item))
        if found <= kept:
            return walk, result
        kept |= found


class Walk:
    """Depth-first walk; `indices` maps the id of an object to its index.

    `whole_ids` are the ids of containers that are not taken apart; `split_containers` are those that were,
    though a static value refers to them.
    """

    def __init__(self, objects: Iterable[Any] = (), whole_ids: frozenset[int] = frozenset()) -> None:
        self.whole_ids = whole_ids
        self.copied_ids: set[int] = set()
        self.split_containers: list[Any] = []
        self.objects: list[Any] = list(objects)
        self.indices = {id(item): index for index, item in enumerate(self.objects)}
        self.leaves: list[Any] = []
        self.freezer = Freezer()

    def visit(self, value: Any) -> Any:
        """Spec of a value and of all it reaches."""
        index = self.indices.get(id(value))
        if index is not None:
            return (_REF, index)
        kind = type(value)
        if kind is tuple:
            return (_TUPLE, tuple, tuple(map(self.visit, value)))
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            self.leaves.append(value)
            return (_LEAF,)
        if isinstance(value, nnx.Variable):
            self.register(value)
            return (_VARIABLE, value.var_type, *self.visit_variable(value))
        impl = graphlib.get_node_impl(value)
        if isinstance(impl, graphlib.GraphNodeImpl):
            self.register(value)
            return (_NODE, get_own_class(value), self.visit_attributes(get_node_content(value)))
        if id(value) in self.whole_ids:
            return self.visit_static(value)
        if kind is list:
            self.take_apart(value)
            return (_LIST, tuple(map(self.visit, value)))
        if kind is dict:
            self.take_apart(value)
            return (_DICT, self.visit_items(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return (_TUPLE, kind, tuple(map(self.visit, value)))
        if impl is not None and value is not None:
            self.take_apart(value)
            return (_PYTREE, *self.visit_pytree(value))
        if nnx.variablelib.is_array_ref(value):
            self.leaves.append(value)
            return (_LEAF,)
        if plain_objects.is_plain(value) and plain_objects.has_arrays(value):
            content = plain_objects.get_content(value)
            assert content is not None  # it is plain
            self.take_apart(value)
            return (_OBJECT, kind, *self.visit_plain_content(content))
        return self.visit_static(value)

    def register(self, value: Any) -> int:
        """Give an object the next index."""
        index = len(self.objects)
        self.objects.append(value)
        self.indices[id(value)] = index
        return index

    def take_apart(self, value: Any) -> None:
        """Register an object of which there will be a copy."""
        self.register(value)
        self.copied_ids.add(id(value))

    def visit_static(self, value: Any) -> Any:
        """Spec of a value that is not traced."""
        key = self.freezer.freeze(value)
        if isinstance(value, (*_VALUE_TYPES, type)):
            return (_STATIC, _Static(key, value), ())
        # By index, so that a returned argument is the caller's own object.
        first = self.register(value)
        shape = self.visit_references(value)
        return (_STATIC, _Static(key, value, tuple(self.objects[first:])), shape)

    def visit_references(self, value: Any, depth: int = 0) -> Any:
        """Give all that a static value refers to, and that a call may change, an index; returns which are which."""
        if depth > _MAX_DEPTH or isinstance(value, _VALUE_TYPES):
            return ()
        shape: list[Any] = []
        for child in plain_objects.get_children(value):
            index = self.indices.get(id(child))
            if index is not None:
                shape.append(index)
                if id(child) in self.copied_ids:
                    self.split_containers.append(child)
                continue
            if plain_objects.is_mutable(child):
                self.register(child)
            below = self.visit_references(child, depth + 1)
            if below:
                shape.append(below)
        return tuple(shape)

    def visit_plain_content(self, content: plain_objects.Content) -> tuple[Any, Any]:
        """Specs of the attributes and the items of a plain object."""
        items = content.items
        return self.visit_attributes(content.attributes), (
            None
            if items is None
            else self.visit_items(items)
            if isinstance(items, dict)
            else tuple(map(self.visit, items))
        )

    def visit_variable(self, variable: Any) -> tuple[Any, Any]:
        """Spec of a Variable's raw value, and its metadata."""
        raw = variable.get_raw_value()
        if isinstance(raw, np.ndarray | np.generic) and not raw.dtype.hasobject:
            # Weights loaded as numpy arrays are data; numpy arrays elsewhere are constants.
            self.leaves.append(raw)
            spec: Any = (_LEAF,)
        else:
            spec = self.visit(raw)
        metadata = variable.get_metadata()
        return spec, _Static(self.freezer.freeze(metadata), metadata)

    def visit_attributes(self, content: dict[Any, Any]) -> Any:
        """Specs of an nnx object's attributes."""
        return tuple(
            (key, (_STATE, _make_static_treedef(value)) if key == STATE_KEY else self.visit(value))
            for key, value in content.items()
        )

    def visit_items(self, value: Any) -> Any:
        """Specs of a dict's items, in its order."""
        return tuple((_Static(self.freezer.freeze(key), key), self.visit(item)) for key, item in value.items())

    def visit_pytree(self, value: Any) -> tuple[Any, Any]:
        """Treedef and specs of the children of any other pytree."""
        children, treedef = flatten_one_level(value)
        try:
            hash(treedef)
            static = _Static(treedef, treedef)
        except TypeError:  # unhashable auxiliary data
            self.freezer.unshareable = value
            static = _Static(id(treedef), treedef)
        return static, tuple(map(self.visit, children))

    def visit_content(self, value: Any) -> Any:
        """Spec of what an object holds now; for edits."""
        if isinstance(value, nnx.Variable):
            return self.visit_variable(value)
        if type(value) is list:
            return tuple(map(self.visit, value))
        if type(value) is dict:
            return self.visit_items(value)
        if isinstance(value, set | collections.deque):
            return tuple(map(self.visit, value))
        return self.visit_pytree(value)


_MAX_DEPTH = 24
# Values without an identity of their own that a caller could miss.
_VALUE_TYPES = (type(None), bool, int, float, complex, str, bytes)


def flatten_one_level(value: Any) -> tuple[list[Any], Any]:
    """Children and treedef of a pytree, without going deeper."""
    return jax.tree_util.tree_flatten(value, is_leaf=lambda item: item is not value)


def get_node_content(node: Any) -> dict[Any, Any]:
    """Attributes of an nnx object, static ones included, in nnx's order."""
    impl = graphlib.get_node_impl(node)
    assert impl is not None  # only called on registered nodes
    items, _ = impl.flatten(node)
    wrapped = (graphlib.DataElem, graphlib.StaticElem)
    content = {key: item.value if isinstance(item, wrapped) else item for key, item in items}
    content.pop(SCOPE_KEY, None)
    return content


def _make_static_treedef(state: Any) -> _Static:
    treedef = jax.tree.structure(state)
    return _Static(treedef, treedef)


class Builder:
    """Inverse of `Walk`."""

    def __init__(self, leaves: Any, objects: list[Any]) -> None:
        self.leaves = leaves
        self.objects = objects

    def build(self, spec: Any) -> Any:
        """The value a spec stands for."""
        tag = spec[0]
        if tag == _LEAF:
            return next(self.leaves)
        if tag == _REF:
            return self.objects[spec[1]]
        if tag == _STATIC:
            self.objects.extend(spec[1].objects)
            return spec[1].value
        if tag == _TUPLE:
            items = [self.build(item) for item in spec[2]]
            return tuple(items) if spec[1] is tuple else spec[1](*items)
        if tag == _STATE:
            return jax.tree.unflatten(spec[1].value, ())
        return self.build_object(spec)

    def build_object(self, spec: Any) -> Any:
        """A value with an identity; takes its index before its children take theirs."""
        tag = spec[0]
        index = len(self.objects)
        self.objects.append(None)  # children may come first, the index may not move
        result: Any
        if tag == _VARIABLE:
            raw = self.build(spec[2])
            result = spec[1].from_metadata(raw, dict(spec[3].value))
        elif tag == _NODE:
            # Before its attributes, since they may refer to it.
            self.objects[index] = result = object.__new__(spec[1])
            init_node(result, {key: self.build(item) for key, item in spec[2]})
        elif tag == _LIST:
            self.objects[index] = result = []
            result.extend(self.build(item) for item in spec[1])
        elif tag == _DICT:
            self.objects[index] = result = {}
            result.update(self.build_items(spec[1]))
        elif tag == _OBJECT:
            result = self.build_plain_object(index, *spec[1:])
        else:
            result = self.build_pytree(spec[1:])
        self.objects[index] = result
        return result

    def build_plain_object(self, index: int, kind: Any, attributes: Any, items: Any) -> Any:
        """A plain Python object, past its constructor."""
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
        """Attributes by name, from `Walk.attributes`."""
        return {key: self.build(item) for key, item in content}

    def build_plain_items(self, kind: type, content: Any) -> Any:
        """Items of a plain container, from `Walk.plain_content` or `Walk.content`."""
        return self.build_items(content) if issubclass(kind, dict) else [self.build(item) for item in content]

    def build_items(self, content: Any) -> dict[Any, Any]:
        """A dict from `Walk.items`."""
        return {key.value: self.build(item) for key, item in content}

    def build_pytree(self, content: Any) -> Any:
        """A pytree from `Walk.pytree_content`."""
        treedef, children = content
        return jax.tree.unflatten(treedef.value, [self.build(child) for child in children])


def init_node(node: Any, attributes: dict[Any, Any]) -> None:
    """Set attributes past `__setattr__`, which would classify them anew."""
    for key, value in attributes.items():
        object.__setattr__(node, str(key), value)

# SPDX-License-Identifier: Apache-2.0
"""A call's objects as arrays and a hashable spec, and back, with what changed.

Sits on `freeze`; knows nothing of policies or rules. A region has to hand
modules, caches, arrays, strings and callables through `jax.checkpoint`, which
takes arrays only. `capture` walks everything a call can reach and splits it in

-   leaves: the arrays, in a fixed order;
-   a spec: nested tuples that say how to rebuild the rest, hashable and equal
    for calls that may share one trace;
-   objects: everything with an identity (modules, Variables, lists, dicts), by
    index, so that sharing, tied weights and returned arguments stay what they
    are.

`nnx.split` and `nnx.merge` do not serve here: they write every Variable back,
also the untouched ones (which destroys a model closed over by a transform), lose
in-place changes of plain dicts, and give graphdefs that cannot be hashed when a
static attribute is a list. Only what a call changed leaves it as an `Edit`.
"""

import dataclasses
from collections.abc import Iterable, MutableMapping
from typing import Any

import jax
import numpy as np
from flax import errors as flax_errors
from flax import nnx
from flax.nnx import graphlib

from .freeze import Freezer

# Specs are tuples whose first item is one of these tags.
_LEAF, _REF, _STATIC, _VARIABLE, _NODE, _LIST, _DICT, _TUPLE, _PYTREE, _STATE = range(10)

_STATE_KEY = "_pytree__state"  # nnx's record of the trace level an object was made at

# While operations are being named (`scopes`), modules carry a subclass and an attribute that no trace may depend on.
SCOPE_KEY = "_pytree__remattools_scope"
SCOPE_OF = "_remattools_scope_of"


def own_class(value: Any) -> type:
    """The class of `value` but for the temporary one that names its operations."""
    kind = type(value)
    own: type = kind.__dict__.get(SCOPE_OF, kind)
    return own


class _Static:
    """A value that is not traced; compares by its frozen key."""

    __slots__ = ("key", "value")

    def __init__(self, key: Any, value: Any) -> None:
        self.key, self.value = key, value

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


@dataclasses.dataclass(frozen=True)
class Edit:
    """One object that a call changed.

    Attributes:
        index: Which of the captured objects.
        content: Spec of its new content: the raw value and the metadata of a
            Variable, the changed attributes of a module, all items of a container.
        deleted: Attributes that are gone; modules only.
    """

    index: int
    content: Any
    deleted: tuple[Any, ...] = ()


def capture(value: Any) -> Capture:
    """Split `value` (any nest of nnx objects, pytrees and statics) into arrays and a spec."""
    walk = _Walk()
    spec = walk.visit(value)
    return Capture(walk.leaves, walk.objects, spec, walk.freezer.unshareable)


def rebuild(spec: Any, leaves: Iterable[Any], objects: list[Any]) -> Any:
    """Build a value from its spec; objects already in `objects` are used, new ones appended."""
    return _Build(iter(leaves), objects).build(spec)


class _Walk:
    """Depth-first walk; `known` maps the id of an object to its index."""

    def __init__(self, objects: Iterable[Any] = ()) -> None:
        self.objects: list[Any] = list(objects)
        self.known = {id(item): index for index, item in enumerate(self.objects)}
        self.leaves: list[Any] = []
        self.freezer = Freezer()

    def visit(self, value: Any) -> Any:
        index = self.known.get(id(value))
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
            return (_VARIABLE, value.var_type, *self.variable_content(value))
        impl = graphlib.get_node_impl(value)
        if isinstance(impl, graphlib.GraphNodeImpl):
            self.register(value)
            return (_NODE, own_class(value), self.attributes(node_content(value)))
        if kind is list:
            self.register(value)
            return (_LIST, tuple(map(self.visit, value)))
        if kind is dict:
            self.register(value)
            return (_DICT, self.items(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return (_TUPLE, kind, tuple(map(self.visit, value)))
        if impl is not None and value is not None:
            self.register(value)
            return (_PYTREE, *self.pytree_content(value))
        if nnx.variablelib.is_array_ref(value):
            self.leaves.append(value)
            return (_LEAF,)
        return self.static(value)

    def register(self, value: Any) -> int:
        index = len(self.objects)
        self.objects.append(value)
        self.known[id(value)] = index
        return index

    def static(self, value: Any) -> Any:
        key = self.freezer.freeze(value)
        if not isinstance(value, (*_UNIQUE, type)):
            # By index, so that a returned argument is the caller's own object.
            self.register(value)
        return (_STATIC, _Static(key, value))

    def variable_content(self, variable: Any) -> tuple[Any, Any]:
        raw = variable.get_raw_value()
        if isinstance(raw, np.ndarray | np.generic) and not raw.dtype.hasobject:
            # Weights loaded as numpy arrays are data; numpy arrays elsewhere are constants.
            self.leaves.append(raw)
            spec: Any = (_LEAF,)
        else:
            spec = self.visit(raw)
        metadata = variable.get_metadata()
        return spec, _Static(self.freezer.freeze(metadata), metadata)

    def attributes(self, content: dict[Any, Any]) -> Any:
        return tuple(
            (key, (_STATE, _static_treedef(value)) if key == _STATE_KEY else self.visit(value))
            for key, value in content.items()
        )

    def items(self, value: Any) -> Any:
        return tuple((_Static(self.freezer.freeze(key), key), self.visit(item)) for key, item in value.items())

    def pytree_content(self, value: Any) -> tuple[Any, Any]:
        children, treedef = one_level(value)
        try:
            hash(treedef)
            static = _Static(treedef, treedef)
        except TypeError:  # unhashable auxiliary data
            self.freezer.unshareable = value
            static = _Static(id(treedef), treedef)
        return static, tuple(map(self.visit, children))

    def content(self, value: Any) -> Any:
        """Spec of what an object holds now; for edits."""
        if isinstance(value, nnx.Variable):
            return self.variable_content(value)
        if type(value) is list:
            return tuple(map(self.visit, value))
        if type(value) is dict:
            return self.items(value)
        return self.pytree_content(value)


# Values without an identity of their own that a caller could miss.
_UNIQUE = (type(None), bool, int, float, complex, str, bytes)


def one_level(value: Any) -> tuple[list[Any], Any]:
    """Children and treedef of a pytree, without going deeper."""
    return jax.tree_util.tree_flatten(value, is_leaf=lambda item: item is not value)


def node_content(node: Any) -> dict[Any, Any]:
    """Attributes of an nnx object, static ones included, in nnx's order."""
    impl = graphlib.get_node_impl(node)
    assert impl is not None  # only called on registered nodes
    items, _ = impl.flatten(node)
    wrapped = (graphlib.DataElem, graphlib.StaticElem)
    content = {key: item.value if isinstance(item, wrapped) else item for key, item in items}
    content.pop(SCOPE_KEY, None)
    return content


def _static_treedef(state: Any) -> _Static:
    treedef = jax.tree.structure(state)
    return _Static(treedef, treedef)


class _Build:
    """Inverse of `_Walk`."""

    def __init__(self, leaves: Any, objects: list[Any]) -> None:
        self.leaves = leaves
        self.objects = objects

    def build(self, spec: Any) -> Any:
        tag = spec[0]
        if tag == _LEAF:
            return next(self.leaves)
        if tag == _REF:
            return self.objects[spec[1]]
        if tag == _STATIC:
            value = spec[1].value
            if not isinstance(value, (*_UNIQUE, type)):
                self.objects.append(value)
            return value
        if tag == _TUPLE:
            items = [self.build(item) for item in spec[2]]
            return tuple(items) if spec[1] is tuple else spec[1](*items)
        if tag == _STATE:
            return jax.tree.unflatten(spec[1].value, ())
        return self.build_object(spec)

    def build_object(self, spec: Any) -> Any:
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
            result.update(self.items(spec[1]))
        else:
            result = self.pytree(spec[1:])
        self.objects[index] = result
        return result

    def items(self, content: Any) -> dict[Any, Any]:
        return {key.value: self.build(item) for key, item in content}

    def pytree(self, content: Any) -> Any:
        treedef, children = content
        return jax.tree.unflatten(treedef.value, [self.build(child) for child in children])


def init_node(node: Any, attributes: dict[Any, Any]) -> None:
    """Set attributes past `__setattr__`, which would classify them anew."""
    for key, value in attributes.items():
        object.__setattr__(node, str(key), value)


def snapshot(objects: Iterable[Any]) -> list[Any]:
    """Shallow content of every object, to tell later which ones a call changed."""
    return [_shallow(item) for item in objects]


def _shallow(item: Any) -> Any:
    if isinstance(item, nnx.Variable):
        return (item.get_raw_value(), item.get_metadata())
    if isinstance(graphlib.get_node_impl(item), graphlib.GraphNodeImpl):
        return node_content(item)
    if type(item) is list:
        return list(item)
    if type(item) is dict:
        return dict(item)
    if graphlib.is_node(item):
        return one_level(item)
    return None


def changes(objects: list[Any], before: list[Any], out: Any) -> tuple[list[Any], tuple[Edit, ...], Any]:
    """What a call did: `(leaves, edits, spec of the output)`.

    Args:
        objects: The captured objects as the call saw them.
        before: Their `snapshot` from before the call.
        out: What the call returned; may be or hold any of the objects.
    """
    walk = _Walk(objects)
    edits = []
    for index, (item, old) in enumerate(zip(objects, before, strict=True)):
        new = _shallow(item)
        if old is None or _same(old, new):
            continue
        if isinstance(old, dict) and type(item) is not dict:
            changed = {key: value for key, value in new.items() if key not in old or value is not old[key]}
            changed.pop(_STATE_KEY, None)
            deleted = tuple(key for key in old if key not in new)
            edits.append(Edit(index, walk.attributes(changed), deleted))
        else:
            edits.append(Edit(index, walk.content(item)))
    return walk.leaves, tuple(edits), walk.visit(out)


def _same(old: Any, new: Any) -> bool:
    """Identity of every child; an array that was not replaced is the same object."""
    if isinstance(old, dict):
        return list(old) == list(new) and all(old[key] is new[key] for key in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
    value, extra = old  # a Variable's raw value and metadata, or a pytree's children and treedef
    if isinstance(value, list):
        return _same(value, new[0]) and bool(extra == new[1])
    return value is new[0] and _same(extra, new[1])


def replay(edits: Iterable[Edit], out: Any, leaves: Iterable[Any], objects: list[Any]) -> Any:
    """Do to the caller's `objects` what the call did to its copies; returns the output."""
    build = _Build(iter(leaves), objects)
    for edit in edits:
        _apply(edit, objects[edit.index], build)
    return build.build(out)


def _apply(edit: Edit, target: Any, build: _Build) -> None:
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
        _refill(target, build.items(edit.content))
    else:
        _become(target, build.pytree(edit.content))


def _check_mutable(node: Any) -> None:
    """nnx's own error where plain code would have met it: a change across trace levels."""
    state = vars(node).get(_STATE_KEY)
    if state is not None and not state.trace_state.is_valid():
        raise flax_errors.TraceContextError(f"Cannot mutate '{type(node).__name__}' from different trace level")


def _refill(target: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    target.clear()
    target.update(content)


def _become(target: Any, new: Any) -> None:
    """Give a mutable pytree (an OrderedDict, a dataclass) the content of another."""
    if isinstance(target, MutableMapping):
        _refill(target, dict(new))
    else:
        for key, value in vars(new).items():
            object.__setattr__(target, key, value)

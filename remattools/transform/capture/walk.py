# SPDX-License-Identifier: Apache-2.0
"""Split everything that a call can reach into arrays, a hashable spec and objects.

Sits on `cache_key`, `plain_objects` and `rebuild` (the way back); knows nothing of policies or rules. A region has to
pass modules, caches, arrays, strings and callables through `jax.checkpoint`, which takes arrays only. `capture` splits
them into

-   leaves: the arrays, in a fixed order;
-   a spec: nested tuples that say how to rebuild the rest, hashable and equal for calls that may share one trace;
-   objects: everything with an identity (modules, Variables, lists, dicts), by index, so that shared objects, tied
    weights and returned arguments keep their identity. A plain Python object with arrays is split like a module. One
    without arrays stays whole; it and what it refers to are objects, since the call may write arrays into them.

`nnx.split` and `nnx.merge` do not work here: they write back every Variable, also unchanged ones (which destroys a
model that a transform closes over), lose in-place changes of plain dicts, and give a graphdef that is not hashable if
a static attribute is a list.
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
from .rebuild import DICT, LEAF, LIST, NODE, OBJECT, PYTREE, REF, STATE, STATIC, TUPLE, VARIABLE, Static

# Values without an identity that a caller could miss.
_VALUE_TYPES = (type(None), bool, int, float, complex, str, bytes)

STATE_KEY = "_pytree__state"  # nnx's record of the trace level at which an object was created

# While `scopes` records paths, modules have another class and attribute, on which no trace may depend.
SCOPE_KEY = "_pytree__remattools_scope"
SCOPE_OF = "_remattools_scope_of"


def get_own_class(value: Any) -> type:
    """Return the class of `value` without the temporary subclass of `scopes`."""
    kind = type(value)
    own: type = kind.__dict__.get(SCOPE_OF, kind)
    return own


@dataclasses.dataclass
class Capture:
    """What `capture` found.

    Attributes:
        leaves: Arrays in the order of the walk.
        objects: Objects with an identity, by index.
        spec: How to rebuild the value; hashable.
        unshareable: A value that prevents sharing the trace, or None.
    """

    leaves: list[Any]
    objects: list[Any]
    spec: Any
    unshareable: Any


def capture(value: Any) -> Capture:
    """Split `value` (any nest of nnx objects, pytrees and statics) into arrays and a spec."""
    # An object that a hook writes into stays the caller's, even with arrays; modules are always copied.
    walk, spec = run_walk(
        lambda walk: walk.visit(value),
        is_whole=lambda item: not plain_objects.has_instances(item, plain_objects.NNX_TYPES),
    )
    return Capture(walk.leaves, walk.objects, spec, walk.freezer.unshareable)


def run_walk[R](
    visit: Callable[["Walk"], R], *, is_whole: Callable[[Any], bool], objects: Sequence[Any] = ()
) -> tuple["Walk", R]:
    """Walk, and walk again if a container would be both copied and kept.

    A static value stays whole, with all that it refers to. A list that it refers to may also be reached directly, and
    would be copied there.

    Args:
        visit: What to do with the walk.
        is_whole: Whether such a container is to stay whole everywhere.
        objects: Objects that already have an index.

    Returns:
        The last walk, and what `visit` returned for it.
    """
    whole: frozenset[int] = frozenset()
    while True:
        walk = Walk(objects, whole)
        result = visit(walk)
        found = frozenset(id(item) for item in walk.split_containers if is_whole(item))
        if found <= whole:
            return walk, result
        whole |= found


class Walk:
    """Depth-first walk.

    Attributes:
        whole_ids: Ids of containers that must not be split.
        copied_ids: Ids of objects that a rebuilt copy will replace.
        split_containers: Containers that were split although a static value refers to them.
        objects: Objects with an identity, by index.
        indices: Index of each object by its id.
        leaves: Arrays in the order of the walk.
        freezer: Makes the keys of static values.
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
        """Return the spec of a value and of all that it reaches."""
        index = self.indices.get(id(value))
        if index is not None:
            return (REF, index)
        kind = type(value)
        if kind is tuple:
            return (TUPLE, tuple, tuple(map(self.visit, value)))
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            self.leaves.append(value)
            return (LEAF,)
        if isinstance(value, nnx.Variable):
            self.register(value)
            return (VARIABLE, value.var_type, *self.visit_variable(value))
        impl = graphlib.get_node_impl(value)
        if isinstance(impl, graphlib.GraphNodeImpl):
            self.register(value)
            return (NODE, get_own_class(value), self.visit_attributes(get_node_content(value)))
        if id(value) in self.whole_ids:
            return self.visit_static(value)
        if kind is list:
            self.split(value)
            return (LIST, tuple(map(self.visit, value)))
        if kind is dict:
            self.split(value)
            return (DICT, self.visit_items(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return (TUPLE, kind, tuple(map(self.visit, value)))
        if impl is not None and value is not None:
            self.split(value)
            return (PYTREE, *self.visit_pytree(value))
        if nnx.variablelib.is_array_ref(value):
            self.leaves.append(value)
            return (LEAF,)
        if plain_objects.is_plain(value) and plain_objects.has_arrays(value):
            content = plain_objects.get_content(value)
            assert content is not None  # since it is plain
            self.split(value)
            return (OBJECT, kind, *self.visit_plain_content(content))
        return self.visit_static(value)

    def register(self, value: Any) -> int:
        """Give an object the next index, and return it."""
        index = len(self.objects)
        self.objects.append(value)
        self.indices[id(value)] = index
        return index

    def split(self, value: Any) -> None:
        """Register an object that a rebuilt copy will replace."""
        self.register(value)
        self.copied_ids.add(id(value))

    def visit_static(self, value: Any) -> Any:
        """Return the spec of a value that is not traced."""
        key = self.freezer.freeze(value)
        if isinstance(value, (*_VALUE_TYPES, type)):
            return (STATIC, Static(key, value), ())
        # By index, so that a returned argument is the caller's own object.
        first = self.register(value)
        shape = self.visit_references(value)
        return (STATIC, Static(key, value, tuple(self.objects[first:])), shape)

    def visit_references(self, value: Any, depth: int = 0) -> Any:
        """Give an index to all mutable objects that a static value refers to.

        Returns:
            The indices of those that had one, nested like the references.
        """
        if depth > plain_objects.MAX_DEPTH or isinstance(value, _VALUE_TYPES):
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
        """Return the specs of the attributes and the items of a plain object."""
        items = content.items
        return self.visit_attributes(content.attributes), (
            None
            if items is None
            else self.visit_items(items)
            if isinstance(items, dict)
            else tuple(map(self.visit, items))
        )

    def visit_variable(self, variable: Any) -> tuple[Any, Any]:
        """Return the spec of a Variable's raw value, and its metadata."""
        raw = variable.get_raw_value()
        if isinstance(raw, np.ndarray | np.generic) and not raw.dtype.hasobject:
            # Weights loaded as numpy arrays are data; numpy arrays elsewhere are constants.
            self.leaves.append(raw)
            spec: Any = (LEAF,)
        else:
            spec = self.visit(raw)
        metadata = variable.get_metadata()
        return spec, Static(self.freezer.freeze(metadata), metadata)

    def visit_attributes(self, content: dict[Any, Any]) -> Any:
        """Return the specs of an nnx object's attributes."""
        return tuple(
            (key, (STATE, _make_static_treedef(value)) if key == STATE_KEY else self.visit(value))
            for key, value in content.items()
        )

    def visit_items(self, value: Any) -> Any:
        """Return the specs of a dict's items, in its order."""
        return tuple((Static(self.freezer.freeze(key), key), self.visit(item)) for key, item in value.items())

    def visit_pytree(self, value: Any) -> tuple[Any, Any]:
        """Return the treedef and the specs of the children of any other pytree."""
        children, treedef = flatten_one_level(value)
        try:
            hash(treedef)
            static = Static(treedef, treedef)
        except TypeError:  # unhashable auxiliary data
            self.freezer.unshareable = value
            static = Static(id(treedef), treedef)
        return static, tuple(map(self.visit, children))

    def visit_content(self, value: Any) -> Any:
        """Return the spec of what an object contains now, for edits."""
        if isinstance(value, nnx.Variable):
            return self.visit_variable(value)
        if type(value) is list:
            return tuple(map(self.visit, value))
        if type(value) is dict:
            return self.visit_items(value)
        if isinstance(value, set | collections.deque):
            return tuple(map(self.visit, value))
        return self.visit_pytree(value)


def flatten_one_level(value: Any) -> tuple[list[Any], Any]:
    """Return the children and treedef of a pytree, one level deep."""
    return jax.tree_util.tree_flatten(value, is_leaf=lambda item: item is not value)


def get_node_content(node: Any) -> dict[Any, Any]:
    """Return the attributes of an nnx object, also static ones, in nnx's order."""
    impl = graphlib.get_node_impl(node)
    assert impl is not None  # only called on registered nodes
    items, _ = impl.flatten(node)
    wrapped = (graphlib.DataElem, graphlib.StaticElem)
    content = {key: item.value if isinstance(item, wrapped) else item for key, item in items}
    content.pop(SCOPE_KEY, None)
    return content


def _make_static_treedef(state: Any) -> Static:
    treedef = jax.tree.structure(state)
    return Static(treedef, treedef)

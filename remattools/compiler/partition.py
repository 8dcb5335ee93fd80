# SPDX-License-Identifier: Apache-2.0
"""How large the values of a traced program are on one device of a mesh.

Sits on `hlo.program` and `lower`. A traced program shows whole arrays. Under Explicit axes their types carry the
sharding. Under Auto axes the compiler decides it, so the partitioned program is looked at: its operations have the
traced operation's name and module, and the shape on one device.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Any

import jax
from jax.sharding import NamedSharding

from ..jaxpr import jaxprs
from ..rules.paths import Path
from ..tracing import pure_call
from ..tracing.origins import is_in_host_memory, locate
from .hlo.live_buffers import find_operation, select_op_name
from .hlo.program import list_arrays, parse_program
from .lower import lower
from .targets import Target

_Shape = tuple[int, ...]
_MAX_PERMUTED_AXES = 5
# Less optimization partitions the same way, and the TPU compiler needs a fifth of the time.
_QUICK_OPTIONS = {"tpu": {"xla_optimization_level": "EFFORT_O0"}}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeviceSizes:
    """Sizes of traced values on one device.

    Attributes:
        devices: Number of devices of the mesh; 1 without one.
        shapes: How often the partitioned program has each shape, by module path and operation; with an empty operation
            in a whole module, with an empty path everywhere. Empty under Explicit axes.
        leaf_bytes: Bytes of each argument on one device; empty without a mesh.
        leaf_shapes: Shape of each argument on one device; empty without a mesh.
    """

    devices: int = 1
    shapes: dict[tuple[Path | None, str], Counter[_Shape]] = dataclasses.field(default_factory=dict)
    leaf_bytes: tuple[int, ...] = ()
    leaf_shapes: tuple[_Shape, ...] = ()
    _memo: dict[Any, _Shape] = dataclasses.field(default_factory=dict)

    def find_shape(self, aval: Any, path: Path | None = None, operation: str = "") -> _Shape:
        """Return the shape of a value on one device; the whole shape if nothing says how it is split.

        Args:
            aval: Its type.
            path: Path of the module that computes it, if known.
            operation: The primitive that computes it, if known.
        """
        shape = tuple(aval.shape)
        mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types:
            return tuple(aval.sharding.shard_shape(shape))
        if not self.shapes or not shape:
            return shape
        key = (shape, path, operation)
        if key not in self._memo:
            self._memo[key] = self._find_part(shape, path, operation)
        return self._memo[key]

    def _find_part(self, shape: _Shape, path: Path | None, operation: str) -> _Shape:
        keys = ((path, operation), (path, ""), (None, operation), (None, ""))
        for key in keys:
            parts = [(count, part) for part, count in self.shapes.get(key, {}).items() if self._is_part(part, shape)]
            if parts:
                return max(parts)[1]
        # The compiler keeps no axes of length 1, and may order the others in another way.
        axes = [axis for axis, length in enumerate(shape) if length != 1]
        for key in keys:
            for part, _ in self.shapes.get(key, Counter()).most_common():
                lengths = [length for length in part if length != 1]
                if len(lengths) != len(axes) or len(axes) > _MAX_PERMUTED_AXES:
                    continue
                for order in itertools.permutations(lengths):
                    whole = tuple(shape[axis] for axis in axes)
                    if self._is_part(order, whole):
                        by_axis = dict(zip(axes, order, strict=True))
                        return tuple(by_axis.get(axis, 1) for axis in range(len(shape)))
        return shape

    def _is_part(self, part: _Shape, shape: _Shape) -> bool:
        """Whether a shape can be what one device has of another one."""
        if len(part) != len(shape) or any(not few or many % few for few, many in zip(part, shape, strict=True)):
            return False
        return self.devices % (math.prod(shape) // math.prod(part)) == 0

    def count_bytes(self, aval: Any, path: Path | None = None, operation: str = "") -> int:
        """Return the bytes of a value on one device; 0 in host memory.

        Args:
            aval: Its type.
            path: Path of the module that computes it, if known.
            operation: The primitive that computes it, if known.
        """
        if is_in_host_memory(aval):
            return 0
        return self.count_any_bytes(aval, path, operation)

    def count_any_bytes(self, aval: Any, path: Path | None = None, operation: str = "") -> int:
        """Return the bytes of a value on one device or, if it is offloaded, in the host memory beside it."""
        whole = jaxprs.count_aval_bytes(aval)
        if not whole or self.devices == 1:
            return whole
        return int(whole * math.prod(self.find_shape(aval, path, operation)) // math.prod(aval.shape))


WHOLE_ARRAYS = DeviceSizes()


def find_device_sizes(
    call: pure_call.Call, target: Target | None = None, *, differentiate: bool, with_types: bool = True
) -> DeviceSizes:
    """Return the sizes of a call's values on one device.

    Without a mesh nothing is compiled, nor under Explicit axes alone, unless the types cannot be relied on.

    Args:
        call: The staged call.
        target: What to compile for; None for the devices of the arguments' mesh.
        differentiate: Whether the call is a loss, whose gradient is meant.
        with_types: Whether the values that are asked for have the types of the trace, with their shardings.
    """
    meshes = [
        leaf.sharding.mesh
        for leaf in call.leaves
        if isinstance(getattr(leaf, "sharding", None), NamedSharding) and leaf.sharding.mesh.size > 1
    ]
    if not meshes:
        return WHOLE_ARRAYS
    devices = max(mesh.size for mesh in meshes)
    leaf_shapes = tuple(_find_leaf_shape(leaf) for leaf in call.leaves)
    leaf_bytes = tuple(map(_count_leaf_bytes, call.leaves, leaf_shapes))
    is_explicit = all(kind == jax.sharding.AxisType.Explicit for mesh in meshes for kind in mesh.axis_types)
    if is_explicit and with_types:
        return DeviceSizes(devices=devices, leaf_bytes=leaf_bytes, leaf_shapes=leaf_shapes)
    where = target or _make_mesh_target(meshes[0])
    if where is None:  # an abstract mesh: there is nothing to compile for
        return DeviceSizes(devices=devices, leaf_bytes=leaf_bytes, leaf_shapes=leaf_shapes)
    lowered = lower(call, where, differentiate=differentiate).lowered
    text = lowered.compile(compiler_options=_QUICK_OPTIONS.get(where.platform)).as_text()
    return DeviceSizes(devices=devices, shapes=read_shapes(text), leaf_bytes=leaf_bytes, leaf_shapes=leaf_shapes)


def read_shapes(hlo: str) -> dict[tuple[Path | None, str], Counter[_Shape]]:
    """Return the shapes in a partitioned program, by module path and operation.

    Args:
        hlo: What `compiled.as_text()` prints.
    """
    found: dict[tuple[Path | None, str], Counter[_Shape]] = {}
    for instructions in parse_program(hlo).computations.values():
        for instruction in instructions:
            op_name = select_op_name(instruction.op_name)
            if not op_name or instruction.opcode in ("tuple", "get-tuple-element"):
                continue
            path, operation = _locate_operation(op_name)
            for array in list_arrays(instruction.type):
                for key in ((path, operation), (path, ""), (None, operation), (None, "")):
                    found.setdefault(key, Counter())[array.shape] += 1
    return found


@functools.lru_cache(maxsize=4096)
def _locate_operation(op_name: str) -> tuple[Path, str]:
    return locate([op_name])[0], find_operation(op_name).rpartition("/")[2]


def _make_mesh_target(mesh: Any) -> Target | None:
    if not isinstance(mesh, jax.sharding.Mesh):
        return None
    devices = tuple(mesh.devices.flat)
    platform = devices[0].platform
    return Target(name=platform, platform=platform, devices=devices, live=True)


def _find_leaf_shape(leaf: Any) -> _Shape:
    sharding, shape = getattr(leaf, "sharding", None), tuple(leaf.shape)
    return shape if sharding is None else tuple(sharding.shard_shape(shape))


def _count_leaf_bytes(leaf: Any, shape: _Shape) -> int:
    whole = jaxprs.count_aval_bytes(jax.typeof(leaf) if isinstance(leaf, jax.Array) else _make_aval(leaf))
    return int(whole * math.prod(shape) // max(math.prod(leaf.shape), 1))


def _make_aval(leaf: Any) -> Any:
    return jax.core.ShapedArray(leaf.shape, leaf.dtype)

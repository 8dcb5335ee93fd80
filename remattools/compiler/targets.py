# SPDX-License-Identifier: Apache-2.0
"""Targets to compile for: a live device, or a TPU topology without a device.

A target is named by a string: `cpu`, `gpu` or `tpu` (live), or a topology such as
`tpu:v5e:2x2`, whose compiler (libtpu) runs on any machine.

Two facts shaped this file. Unless environment variables prevent it, libtpu queries a
metadata server for its machine and locks the machine for one process. It reads the
variables once, when it is loaded, so they are set around that moment only. And loading a
topology does not change JAX's backend: JAX keeps running on the CPU.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ..errors import TargetError

_LIVE_PLATFORMS = ("cpu", "gpu", "tpu", "cuda", "rocm")
# The smallest topology of each generation.
_DEFAULT_TOPOLOGIES = {
    "v2": "2x2",
    "v3": "2x2",
    "v4": "2x2x1",
    "v5e": "2x2",
    "v5p": "2x2x1",
    "v6e": "2x2",
    "tpu7x": "2x2x1",
}
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # The lock keeps two processes off one device; without a device, compiles may run in parallel.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a program is compiled for; from `find_target`.

    Attributes:
        name: Name, such as `cpu` or `tpu:v5e:2x2`.
        platform: JAX's name of the platform to lower for.
        devices: The target's devices. A program without shardings is compiled for the first.
        live: Whether programs can run on it from this process.

    Example:
        >>> import remattools as rt
        >>> rt.find_target("cpu").live
        True
    """

    name: str
    platform: str
    devices: tuple[jax.Device, ...]
    live: bool

    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> Mesh:
        """Return a mesh over the target's first devices, for the shardings of abstract arguments.

        Args:
            shape: Devices along each axis.
            names: Name of each axis.

        Raises:
            TargetError: If the target has too few devices.
        """
        return Mesh(np.array(self._take_devices(int(np.prod(shape)))).reshape(shape), tuple(names))

    def placements(self, shardings: Sequence[Sharding | None]) -> list[Sharding]:
        """Return the same shardings on this target's devices.

        Unsharded arguments go to the first device, or are replicated over the mesh if another argument is sharded.

        Args:
            shardings: The sharding of each argument; None if it has none.
        """
        meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1]
        if not meshes:
            return [SingleDeviceSharding(self.devices[0])] * len(shardings)
        mesh = self._move_mesh(meshes[0])
        return [
            NamedSharding(self._move_mesh(s.mesh), s.spec)
            if isinstance(s, NamedSharding) and s.mesh.size > 1
            else NamedSharding(mesh, PartitionSpec())
            for s in shardings
        ]

    def _move_mesh(self, mesh: Mesh | AbstractMesh) -> Mesh:
        if isinstance(mesh, Mesh) and not set(mesh.devices.flat) - set(self.devices):
            return mesh
        devices = np.array(self._take_devices(mesh.size)).reshape(tuple(mesh.shape.values()))
        return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)

    def _take_devices(self, count: int) -> list[jax.Device]:
        if count > len(self.devices):
            raise TargetError(
                what=f"a mesh of {count} devices is too large for {self.name}, which has {len(self.devices)}.",
                why="every position of a mesh needs a separate device.",
                fix="a larger topology, such as tpu:v5e:4x4; on cpu, set jax_num_cpu_devices.",
            )
        return list(self.devices[:count])


def find_target(target: "str | Target | jax.Device | None" = None) -> Target:
    """Return the target that a name or a device stands for.

    Args:
        target: `"cpu"`, `"gpu"`, `"tpu"`, a topology such as `"tpu:v5e:2x2"`, a device, or a `Target`. None: all of
            JAX's default devices.

    Raises:
        TargetError: If the target does not exist or is not installed; the message says what to install.

    Example:
        >>> import remattools as rt
        >>> rt.find_target("cpu").name
        'cpu'
    """
    if isinstance(target, Target):
        return target
    if target is None:  # all of them, since arguments may be sharded over several
        devices = jax.devices()
        return Target(
            name=_get_platform_name(devices[0].platform),
            platform=devices[0].platform,
            devices=tuple(devices),
            live=True,
        )
    if isinstance(target, jax.Device):
        return make_target((target,))
    if not isinstance(target, str):
        raise TargetError(
            what=f"target={target!r} has the type {type(target).__name__}.",
            why="a target is a string, a device, or None for JAX's default devices.",
            fix='"cpu", "gpu", "tpu:v5e:2x2" or jax.devices()[0].',
        )
    platform, _, topology = target.partition(":")
    if platform == "tpu" and topology:
        return _load_topology(topology)
    if platform not in _LIVE_PLATFORMS or topology:
        raise _make_unknown_error(target)
    return _find_live_target(platform)


def make_target(devices: Sequence[jax.Device]) -> Target:
    """Return the target of devices, live or of a topology; a topology's name then has no shape."""
    first = devices[0]
    try:
        live = first in jax.devices(first.platform)
    except RuntimeError:  # a platform that JAX does not run on here
        live = False
    name = _get_platform_name(first.platform)
    if not live:
        kind = str(getattr(first, "device_kind", "")).lower().removeprefix("tpu ").replace(" lite", "e")
        name = f"{name}:{kind}"
    return Target(name=name, platform=first.platform, devices=tuple(devices), live=live)


def _get_platform_name(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


def _find_live_target(platform: str) -> Target:
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise TargetError(
            what=f"JAX finds no {platform} on this machine: {str(error).splitlines()[0]}",
            why="compiling for a live target needs its device and its driver.",
            fix=_suggest_live_fix(platform),
        ) from error
    return Target(name=_get_platform_name(platform), platform=devices[0].platform, devices=tuple(devices), live=True)


def _suggest_live_fix(platform: str) -> str:
    if platform == "tpu":
        return 'name a topology, such as "tpu:v5e:2x2": its compiler needs no device.'
    if platform == "cpu":
        return "JAX_PLATFORMS must name cpu too, as in JAX_PLATFORMS=cuda,cpu."
    return (
        'pip install "jax[cuda13]" (or jax[cuda12]) on a machine with a GPU; check that JAX_PLATFORMS does not hide it.'
    )


def _make_unknown_error(target: str) -> TargetError:
    return TargetError(
        what=f"unknown target {target!r}.",
        why="a program is compiled for one kind of device.",
        fix=_suggest_target(target),
    )


def _suggest_target(target: str) -> str:
    """Suggest the closest target, or list all kinds if none is close."""
    platform = target.lower().partition(":")[0]
    if platform in _LIVE_PLATFORMS and platform != "tpu":
        return f"did you mean {platform!r}?"
    generation = re.sub(r"^tpu[:_-]*|:.*$", "", target.lower())
    generation = "v5e" if generation.startswith("v5lite") else generation  # the cloud's name
    close = difflib.get_close_matches(generation, _DEFAULT_TOPOLOGIES, n=1, cutoff=0.75)
    if close:
        return f"did you mean 'tpu:{close[0]}:{_DEFAULT_TOPOLOGIES[close[0]]}'?"
    choices = ", ".join(f"tpu:{name}:{shape}" for name, shape in _DEFAULT_TOPOLOGIES.items())
    return f"{', '.join(_LIVE_PLATFORMS[:3])} (live), or without a device {choices}, and larger shapes of each."


@functools.cache
def _load_topology(topology: str) -> Target:
    generation, _, shape = topology.partition(":")
    is_known = generation in _DEFAULT_TOPOLOGIES
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(
            what=f"tpu:{topology} needs libtpu, which is not installed.",
            why="libtpu contains the TPU compiler, which runs on any machine.",
            fix='pip install "nnx-checkpointing[tpu]"'
            + ("" if is_known else f"; {_suggest_target(f'tpu:{topology}')}"),
        )
    shape = shape or _DEFAULT_TOPOLOGIES.get(generation, "")
    if not re.fullmatch(r"\w+", generation) or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise _make_unknown_error(f"tpu:{topology}")
    name = f"{generation}:{shape}"
    try:
        with _set_libtpu_environment():
            description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise TargetError(
                what=f"libtpu does not load: {str(error).splitlines()[0]}",
                why="another process holds its lock, and ALLOW_MULTIPLE_LIBTPU_LOAD forbids a second one.",
                fix="unset ALLOW_MULTIPLE_LIBTPU_LOAD, or wait for the other process.",
            ) from error
        raise TargetError(
            what=f"libtpu does not know the topology {name!r}: {str(error).splitlines()[0]}",
            why="libtpu compiles only for generations and shapes that exist.",
            fix=_suggest_target(f"tpu:{name}"),
        ) from error
    return Target(name=f"tpu:{name}", platform="tpu", devices=tuple(description.devices), live=False)


@contextlib.contextmanager
def _set_libtpu_environment() -> Iterator[None]:
    """Set the variables that libtpu needs to load on a machine without a TPU, except those the user has set."""
    added = {key: value for key, value in _LIBTPU_ENVIRONMENT.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)

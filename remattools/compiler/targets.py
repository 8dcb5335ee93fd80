# SPDX-License-Identifier: Apache-2.0
"""What to compile for: a live device, or a TPU topology without a device.

Targets are texts: `cpu`, `gpu`, `tpu` (live), `tpu:v5e:2x2` and every other topology
that libtpu knows (its compiler runs on any machine).

Two facts shaped this file. libtpu asks a metadata server for the machine it runs on
unless environment variables say otherwise, and locks the machine for one process. It
reads the variables once, when it is loaded: so they are set around that moment only.
And JAX on CPU goes on working beside it, since a topology is no backend.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..errors import TargetError

_LIVE_PLATFORMS = ("cpu", "gpu", "tpu", "cuda", "rocm")
# Smallest topology of each generation and the accelerator type under which libtpu loads without a machine.
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
    # A lock keeps two processes from one device; here there is none, and compiles may run side by side.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where a program is to run.

    Attributes:
        name: As text, such as `cpu` or `tpu:v5e:2x2`.
        platform: Name of the platform as JAX lowers for it.
        devices: Its devices; a program without shardings is compiled for the first.
        live: Whether programs can run on it here.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    live: bool

    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> Mesh:
        """A mesh over the target's first devices, for `NamedSharding`s of abstract arguments.

        Raises:
            TargetError: If it has fewer devices.
        """
        return Mesh(np.array(self._take_devices(int(np.prod(shape)))).reshape(shape), tuple(names))

    def placements(self, shardings: Sequence[Any]) -> list[Any]:
        """The same shardings on this target's devices.

        What is not spread goes to the first device, or to every device of the mesh if something else is spread.
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

    def _move_mesh(self, mesh: Any) -> Mesh:
        if isinstance(mesh, Mesh) and not set(mesh.devices.flat) - set(self.devices):
            return mesh
        return self.mesh(tuple(mesh.shape.values()), mesh.axis_names)

    def _take_devices(self, count: int) -> list[Any]:
        if count > len(self.devices):
            raise TargetError(
                what=f"a mesh of {count} devices does not fit {self.name}, which has {len(self.devices)}.",
                why="every place of the mesh is a device of its own.",
                fix="a larger topology, such as tpu:v5e:4x4; on cpu set jax_num_cpu_devices.",
            )
        return list(self.devices[:count])


def find_target(target: "str | Target | jax.Device | None" = None) -> Target:
    """The target that a text, a device or None (JAX's default devices) stands for.

    Raises:
        TargetError: If there is none, with what to install.
    """
    if isinstance(target, Target):
        return target
    if target is None:  # all of them, for arguments that are spread over several
        devices = jax.devices()
        return Target(
            name=_get_platform_name(devices[0].platform),
            platform=devices[0].platform,
            devices=tuple(devices),
            live=True,
        )
    if isinstance(target, jax.Device):
        return _make_device_target(target)
    if not isinstance(target, str):
        raise TargetError(
            what=f"target={target!r} is of the type {type(target).__name__}.",
            why="a target is named by a text, a device, or None for JAX's default device.",
            fix='"cpu", "gpu", "tpu:v5e:2x2" or jax.devices()[0].',
        )
    platform, _, topology = target.partition(":")
    if platform == "tpu" and topology:
        return _load_topology(topology)
    if platform not in _LIVE_PLATFORMS or topology:
        raise _make_unknown_error(target)
    return _find_live_target(platform)


def _make_device_target(device: Any) -> Target:
    return Target(name=_get_platform_name(device.platform), platform=device.platform, devices=(device,), live=True)


def _get_platform_name(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


def _find_live_target(platform: str) -> Target:
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise TargetError(
            what=f"there is no {platform} on this machine: {str(error).splitlines()[0]}",
            why="a live target is compiled for by its own driver.",
            fix=_suggest_live_fix(platform),
        ) from error
    return Target(name=_get_platform_name(platform), platform=devices[0].platform, devices=tuple(devices), live=True)


def _suggest_live_fix(platform: str) -> str:
    if platform == "tpu":
        return 'name a topology, such as "tpu:v5e:2x2": its compiler needs no device.'
    if platform == "cpu":
        return "JAX_PLATFORMS must name cpu too, as in JAX_PLATFORMS=cuda,cpu."
    return (
        'pip install "jax[cuda13]" (or jax[cuda12]) on a machine with a GPU; see that JAX_PLATFORMS does not hide it.'
    )


def _make_unknown_error(target: str) -> TargetError:
    return TargetError(
        what=f"there is no target {target!r}.",
        why="a program is compiled for one kind of machine.",
        fix=_suggest_target(target),
    )


def _suggest_target(target: str) -> str:
    """The target that was meant, if one is near; all kinds of them else."""
    platform = target.lower().partition(":")[0]
    if platform in _LIVE_PLATFORMS and platform != "tpu":
        return f"did you mean {platform!r}?"
    generation = re.sub(r"^tpu[:_-]*|:.*$", "", target.lower())
    generation = "v5e" if generation.startswith("v5lite") else generation  # as the cloud calls it
    near = difflib.get_close_matches(generation, _DEFAULT_TOPOLOGIES, n=1, cutoff=0.75)
    if near:
        return f"did you mean 'tpu:{near[0]}:{_DEFAULT_TOPOLOGIES[near[0]]}'?"
    topologies = ", ".join(f"tpu:{name}:{shape}" for name, shape in _DEFAULT_TOPOLOGIES.items())
    return f"one of {', '.join(_LIVE_PLATFORMS[:3])} (live), or without a device {topologies}, and larger ones of each."


@functools.cache
def _load_topology(topology: str) -> Target:
    generation, _, shape = topology.partition(":")
    known = generation in _DEFAULT_TOPOLOGIES
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(
            what=f"tpu:{topology} needs libtpu, which is not installed.",
            why="it holds the TPU's compiler, which runs on any machine.",
            fix='pip install "nnx-checkpointing[tpu]"' + ("" if known else f"; {_suggest_target(f'tpu:{topology}')}"),
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
                why="another process holds its lock, and ALLOW_MULTIPLE_LIBTPU_LOAD is set to forbid a second one.",
                fix="unset ALLOW_MULTIPLE_LIBTPU_LOAD, or wait for the other process.",
            ) from error
        raise TargetError(
            what=f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}",
            why="only generations and shapes that are built can be compiled for.",
            fix=_suggest_target(f"tpu:{name}"),
        ) from error
    return Target(name=f"tpu:{name}", platform="tpu", devices=tuple(description.devices), live=False)


@contextlib.contextmanager
def _set_libtpu_environment() -> Iterator[None]:
    """The environment that libtpu needs to load on a machine that is no TPU host; what the user set is kept."""
    added = {key: value for key, value in _LIBTPU_ENVIRONMENT.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)

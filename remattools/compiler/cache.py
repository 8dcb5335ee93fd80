# SPDX-License-Identifier: Apache-2.0
"""Measurements that were made before, found by the program and the compiler.

A key is a digest of everything that decides the figures: the lowered program, the
target, the compilers' versions, flags and options. One small JSON file each, written
whole or not at all, with a digest of its own: a file that cannot be read, or whose
figures are not those that were written, is no hit. A folder that cannot be written
costs the cache, never the measurement.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
import warnings
from typing import Any

import jax

from ..errors import CacheWarning
from .measurement import Measurement

# Changes with the meaning of the stored fields.
_FORMAT_VERSION = "2"
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# JAX's settings that change what a compiler makes of one program; the others change the program's text.
_CONFIG_NAMES = (
    "jax_enable_x64",
    "jax_compiler_enable_remat_pass",
    "jax_disable_most_optimizations",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_use_magma",
    "jax_xla_profile_version",
)


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of measurements; may be shared by processes.

    Attributes:
        directory: Made when the first one is written.
    """

    directory: pathlib.Path

    def get(self, key: str) -> Measurement | None:
        """The measurement of that key, or None."""
        try:
            stored = json.loads((self.directory / f"{key}.json").read_text())
            measured = stored["measurement"]
            return Measurement.from_dict(measured) if stored["digest"] == _compute_digest(measured) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, measurement: Measurement) -> None:
        """Store it under its key; where that fails, a warning says so."""
        measured = measurement.as_dict()
        self.write(f"{key}.json", json.dumps({"measurement": measured, "digest": _compute_digest(measured)}))

    def write(self, name: str, text: str) -> None:
        """Write a file of this folder whole or not at all; where that fails, a warning says so."""
        made = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".tmp", delete=False) as file:
                made = file.name
                file.write(text)
            os.replace(made, self.directory / name)
        except OSError as error:
            if made is not None:
                with contextlib.suppress(OSError):
                    os.unlink(made)
            warnings.warn(f"what was measured is not kept in {self.directory}: {error}", CacheWarning, stacklevel=4)


def _compute_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def find_cache(cache: "Cache | str | os.PathLike[str] | None") -> Cache | None:
    """A cache, that of a folder, or that of the folder in REMATTOOLS_CACHE; None if that is not set."""
    if isinstance(cache, Cache):
        return cache
    directory = cache or os.environ.get("REMATTOOLS_CACHE")
    return Cache(pathlib.Path(directory)) if directory else None


def open_user_cache() -> Cache:
    """Where the command line keeps its measurements."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Cache(pathlib.Path(base) / "remattools")


def compute_key(program: str, target: str, device: Any, options: Any = ()) -> str:
    """Digest of a lowered program, where it is compiled for, and by what.

    Args:
        program: Its text.
        target: Name of the target.
        device: One of the target's devices.
        options: What the program asks its compiler for, beside the flags of the process.
    """
    versions = [f"{name}={_get_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    # Of a GPU this names the driver and the toolkit; a topology has no client.
    versions.append(str(getattr(getattr(device, "client", None), "platform_version", "")))
    flags = [f"{name}={os.environ.get(name, '')}" for name in _FLAG_VARIABLES]
    settings = [f"{name}={getattr(jax.config, name, '')}" for name in _CONFIG_NAMES]
    kind = str(getattr(device, "device_kind", ""))
    parts = [_FORMAT_VERSION, target, kind, *versions, *flags, *settings, repr(options), program]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _get_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

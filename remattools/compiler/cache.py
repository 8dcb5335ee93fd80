# SPDX-License-Identifier: Apache-2.0
"""A directory of earlier measurements, found by the program and the compiler.

A key is a digest of everything that decides a measurement: the lowered program, the
target, the compilers' versions, flags and options. Each measurement is one small JSON
file, written atomically together with its digest. A file that cannot be read or does not
match its digest is a miss. A directory that cannot be written loses the cache, never the
measurement.
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
from .report import Measurement

# Increased whenever the meaning of a stored field changes.
_FORMAT_VERSION = "4"
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# JAX's settings that change how a compiler treats the same program; all others change the program itself.
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
    """A directory of measurements; processes may share it.

    Attributes:
        directory: Where the files are; created by the first write.
    """

    directory: pathlib.Path

    def get(self, key: str) -> Measurement | None:
        """Return the measurement stored under a key, or None."""
        try:
            stored = json.loads((self.directory / f"{key}.json").read_text())
            data = stored["measurement"]
            return Measurement.from_dict(data) if stored["digest"] == _compute_digest(data) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, measurement: Measurement) -> None:
        """Store a measurement under a key; a failure is a `CacheWarning`."""
        data = measurement.as_dict()
        self.write(f"{key}.json", json.dumps({"measurement": data, "digest": _compute_digest(data)}))

    def write(self, name: str, text: str) -> None:
        """Write a file of the directory atomically; a failure is a `CacheWarning`."""
        temporary = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(text)
            os.replace(temporary, self.directory / name)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            warnings.warn(f"the measurement was not cached in {self.directory}: {error}", CacheWarning, stacklevel=4)


def _compute_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def find_cache(cache: "Cache | str | os.PathLike[str] | None") -> Cache | None:
    """Return the cache of a directory; without one, of the directory in REMATTOOLS_CACHE, or None if that is unset."""
    if isinstance(cache, Cache):
        return cache
    directory = cache or os.environ.get("REMATTOOLS_CACHE")
    return Cache(pathlib.Path(directory)) if directory else None


def open_user_cache() -> Cache:
    """Return the cache of the command line, in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Cache(pathlib.Path(base) / "remattools")


def compute_key(program: str, target: str, device: jax.Device, options: tuple[Any, ...] = ()) -> str:
    """Return the digest of a lowered program, its target and its compiler.

    Args:
        program: The lowered program's text.
        target: Name of the target.
        device: One of the target's devices.
        options: The compiler options of the program's `jax.jit`.
    """
    versions = [f"{name}={get_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    # On a GPU this names the driver and the toolkit; the devices of a topology have no client.
    versions.append(str(getattr(getattr(device, "client", None), "platform_version", "")))
    flags = [f"{name}={os.environ.get(name, '')}" for name in _FLAG_VARIABLES]
    settings = [f"{name}={getattr(jax.config, name, '')}" for name in _CONFIG_NAMES]
    kind = str(getattr(device, "device_kind", ""))
    parts = [_FORMAT_VERSION, target, kind, *versions, *flags, *settings, repr(options), program]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def get_version(distribution: str) -> str:
    """Return the version of an installed distribution; "" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

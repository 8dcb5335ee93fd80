# SPDX-License-Identifier: Apache-2.0
"""Measurements that were made before, found by the program and the compiler.

A key is a digest of everything that decides the figures: the lowered program, the
target, the compilers' versions and flags. One small JSON file each, written whole or
not at all; a file that cannot be read is no hit.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile

import jax

from .measurement import Measurement

# Changes with the meaning of the stored fields.
_FORMAT = "1"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


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
            return Measurement.from_dict(json.loads((self.directory / f"{key}.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, measurement: Measurement) -> None:
        """Store it under its key."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".tmp", delete=False) as file:
            json.dump(measurement.as_dict(), file)
        os.replace(file.name, self.directory / f"{key}.json")


def find_cache(cache: "Cache | str | os.PathLike[str] | None") -> Cache | None:
    """A cache, that of a folder, or that of the folder in REMATTOOLS_CACHE; None if that is not set."""
    if isinstance(cache, Cache):
        return cache
    directory = cache or os.environ.get("REMATTOOLS_CACHE")
    return Cache(pathlib.Path(directory)) if directory else None


def user_cache() -> Cache:
    """Where the command line keeps its measurements."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Cache(pathlib.Path(base) / "remattools")


def key_of(program: str, target: str, device_kind: str) -> str:
    """Digest of a lowered program, where it is compiled for, and by what."""
    versions = [f"{name}={_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    flags = [f"{name}={os.environ.get(name, '')}" for name in _FLAGS]
    parts = [_FORMAT, target, device_kind, *versions, *flags, str(jax.config.jax_enable_x64), program]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

# SPDX-License-Identifier: Apache-2.0
"""Digests of arrays and files: xxh3 against accidents, sha256 against intent.

On one core, xxh3 hashes at memory speed, sha256 at about 1.8 GB/s. A digest is written as `xxh3:<hex>`, so that a
manifest says how to check it.
"""

import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import xxhash

from ..errors import CorruptStepError
from . import layout

_BUFFER_BYTES = 1 << 20


class _Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


def _make_hasher(algorithm: str) -> _Hasher:
    if algorithm == "xxh3":
        return xxhash.xxh3_128()
    if algorithm == "sha256":
        return hashlib.sha256()
    raise CorruptStepError(
        what=f"the {layout.MANIFEST} names a digest of the unknown algorithm {algorithm!r}.",
        why="the bytes cannot be verified without it.",
    )


def hash_bytes(algorithm: str, data: bytes) -> str:
    """Return the digest of `data`, prefixed by the algorithm's name."""
    hasher = _make_hasher(algorithm)
    hasher.update(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def hash_array(algorithm: str, array: np.ndarray[Any, Any]) -> str:
    """Return the digest of an array's bytes in C order (its shape and dtype are in the manifest)."""
    hasher = _make_hasher(algorithm)
    # A view as bytes: the dtypes of ml_dtypes do not support the buffer protocol.
    hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return f"{algorithm}:{hasher.hexdigest()}"


def hash_file(algorithm: str, path: pathlib.Path) -> str:
    """Return the digest of a file, read in chunks into one small buffer.

    Mapping the file would save the copy, but count every byte of it as memory of this process. Reading large files in
    several threads was tried and gained nothing on two cores.
    """
    hasher = _make_hasher(algorithm)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hasher.update(buffer[:size])
    return f"{algorithm}:{hasher.hexdigest()}"


def hash_chunks(algorithm: str, chunks: Iterable[bytes]) -> str:
    """Return the digest of bytes that come in chunks."""
    hasher = _make_hasher(algorithm)
    for piece in chunks:
        hasher.update(piece)
    return f"{algorithm}:{hasher.hexdigest()}"


def get_algorithm(digest: str) -> str:
    """Return the algorithm of a digest."""
    return digest.partition(":")[0]

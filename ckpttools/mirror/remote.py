# SPDX-License-Identifier: Apache-2.0
"""Copies of steps at an fsspec address: the only file that imports fsspec.

    s3://bucket/run/
        500-1a2b3c4d/          one step: the files of its folder, each under its own name
            ckpttools.manifest written last: without it the copy is not a step

The name holds the step and the first digits of its manifest's digest, so that a name never stands for two contents,
an unfinished copy is taken up where it was left, and a manifest that was read once need not be read again.

Stores raise whatever their drivers raise; all of it becomes `MirrorError` here. Nothing that a store says is
believed: names are matched, never joined as they come, manifests are sealed, files are compared with their digests.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import CorruptStepError, IncompleteStepError, MirrorError, StepDamagedError
from ..store import commit, digest, layout, manifest
from ..store.manifest import Manifest, Summary

_NAME = re.compile(r"(0|[1-9]\d{0,17})-([0-9a-f]{8})")
_BLOCK_BYTES = 1 << 22
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "tos", "memory"})
"""Stores of flat names; asking some of them for a folder would create a bucket."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """A finished copy of a step.

    Attributes:
        name: Its folder, below the mirror's address.
        manifest: The step's manifest, whose seal was checked.
        data: The manifest's bytes.
    """

    name: str
    manifest: Manifest
    data: bytes


def name_of(data: bytes) -> str:
    """The name of the copy of the step whose manifest has these bytes."""
    summary = manifest.from_bytes(data).summary
    mark = digest.of_bytes("sha256", data).partition(":")[2]
    return f"{summary.step}-{mark[:8]}"


class RemoteStore:
    """The steps at one address. Opening it reaches nothing.

    Attributes:
        url: The address.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url
        self._options = options
        self._known: dict[str, Summary] = {}

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError as error:
            raise MirrorError(
                what="a mirror needs the package fsspec, which is not installed.",
                why="it is an extra, since most runs need no mirror.",
                fix='pip install "nnx-checkpointing[mirror]", and the driver of your store, such as s3fs.',
            ) from error
        with self._explained("opened"):
            # A file system of its own: a cached listing would hide what others wrote, and a cached failure its end.
            system, root = fsspec.core.url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False, **self._options
            )
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    def _path(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self._opened[1], name, file) if part)

    @property
    def seen(self) -> dict[str, Summary]:
        """The summaries of the finished copies whose manifests were read so far."""
        return dict(self._known)

    def names(self) -> tuple[str, ...]:
        """The names of all copies, finished or not.

        Raises:
            MirrorError: If the store does not answer.
        """
        system, root = self._opened
        with self._explained("listed"):
            system.invalidate_cache()
            try:
                found = system.ls(root, detail=False)
            except FileNotFoundError:
                # A folder without files; where it is the bucket that is missing, the first copy will tell.
                return ()
        last = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return tuple(sorted(name for name in last if _NAME.fullmatch(name)))

    def copies(self) -> tuple[Copy, ...]:
        """Every finished copy, in the order of the commits; unfinished and damaged ones are left out.

        Raises:
            MirrorError: If the store does not answer.
        """
        found = (self.copy(name) for name in self.names())
        return tuple(sorted((copy for copy in found if copy), key=lambda copy: copy.manifest.summary.saved_at))

    def summary(self, name: str) -> Summary | None:
        """The summary of the finished copy of that name, which is read once; None as for `copy`."""
        if name not in self._known:
            self.copy(name)
        return self._known.get(name)

    def copy(self, name: str) -> Copy | None:
        """The finished copy of that name; None if its manifest is missing, damaged or another's.

        Only its summary is kept: the manifests of many copies of a large model would fill the memory of a training.
        """
        self._known.pop(name, None)
        data = self._read_small(self._path(name, layout.MANIFEST))
        try:
            if data is None or name_of(data) != name:
                return None
            copy = Copy(name, manifest.from_bytes(data), data)
        except StepDamagedError:
            return None
        self._known[name] = copy.manifest.summary
        return copy

    def _read_small(self, path: str) -> bytes | None:
        with self._explained("read"):
            try:
                if self._system.size(path) > manifest.LARGEST_BYTES:
                    return None
                return bytes(self._system.cat_file(path))
            except FileNotFoundError:
                return None

    def put(self, folder: pathlib.Path, *, readback: bool, stop: Callable[[], bool] = lambda: False) -> str:
        """Copy a committed step, its manifest last; what is there already in the right size is not sent again.

        Args:
            folder: The step, or links to its files, which do not change.
            readback: Whether to read each file back and compare.
            stop: Asked before each file; a copy that is stopped goes on with the next call.

        Raises:
            MirrorError: If the store does not take it.
            StepDamagedError: If the local files are not what was committed; the copy is not finished.
            InterruptedError: If it was stopped.
        """
        data = (folder / layout.MANIFEST).read_bytes()
        name, files = name_of(data), manifest.from_bytes(data).summary.files
        self._known.pop(name, None)
        there = self._sizes(name)
        for file, (size, mark) in files.items():
            if stop():
                raise InterruptedError
            if there.get(file) == size and self._digest(name, file, mark) == mark:
                continue
            _require_local(folder / file, file, mark)
            self._send(folder / file, name, file)
            self._require_sent(name, file, size, mark if readback else None)
        with self._explained("written"):
            self._make_parent(self._path(name, layout.MANIFEST))
            self._system.pipe_file(self._path(name, layout.MANIFEST), data)
        if self.copy(name) is None:
            raise MirrorError(
                what=f"the manifest of {name} came back from {self.url} with other bytes.",
                why="the store does not keep what it is given; the copy does not count.",
                fix="look at the store.",
            )
        return name

    def _sizes(self, name: str) -> dict[str, int]:
        prefix = self._path(name) + "/"
        with self._explained("listed"):
            try:
                found = self._system.find(self._path(name), detail=True)
            except FileNotFoundError:
                return {}
        return {path.removeprefix(prefix): int(info.get("size") or 0) for path, info in found.items()}

    def _send(self, source: pathlib.Path, name: str, file: str) -> None:
        target = self._path(name, file)
        with self._explained("written"):
            self._make_parent(target)
            if source.stat().st_size <= _BLOCK_BYTES:
                self._system.pipe_file(target, source.read_bytes())
            else:
                self._system.put_file(str(source), target)

    def _make_parent(self, path: str) -> None:
        protocol = self._system.protocol
        if not _WITHOUT_FOLDERS.intersection([protocol] if isinstance(protocol, str) else protocol):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _require_sent(self, name: str, file: str, size: int, mark: str | None) -> None:
        with self._explained("read"):
            found = int(self._system.size(self._path(name, file)))
        if found != size or (mark is not None and self._digest(name, file, mark) != mark):
            raise MirrorError(
                what=f"{name}/{file} came back from {self.url} with other bytes ({found} of {size}).",
                why="the store does not keep what it is given; the copy does not count.",
                fix="look at the store; the copy is tried again.",
            )

    def _digest(self, name: str, file: str, mark: str) -> str | None:
        """Digest of a file at the store; None if it is not there."""
        pieces = self._pieces(name, file)
        try:
            return digest.of_pieces(digest.algorithm_of(mark), pieces)
        except FileNotFoundError:
            return None

    def _pieces(self, name: str, file: str) -> Iterator[bytes]:
        with (
            self._explained("read", absent=True),
            self._system.open(self._path(name, file), "rb", block_size=_BLOCK_BYTES) as source,
        ):
            while piece := source.read(_BLOCK_BYTES):
                yield piece

    def damaged_files(self, copy: Copy) -> tuple[str, ...]:
        """Files of a copy that are missing or not what was written; reads all of them."""
        files = copy.manifest.summary.files
        return tuple(file for file, (_, mark) in files.items() if self._digest(copy.name, file, mark) != mark)

    def fetch(self, copy: Copy, folder: pathlib.Path, seen: Callable[[int], None] = lambda size: None) -> None:
        """Write a step's files into a new local folder, each proved by its digest.

        Raises:
            MirrorError: If the store does not answer.
            StepDamagedError: If a file is missing or damaged, naming all such files.
        """
        commit.make_folder(folder)
        missing, damaged = [], []
        for file, (size, mark) in copy.manifest.summary.files.items():
            # `file` was checked when the manifest was read: it does not leave the step's folder.
            target = folder / file
            commit.make_folder(target.parent)
            try:
                self._fetch_file(copy.name, file, target, size)
            except FileNotFoundError:
                missing.append(file)
                continue
            seen(size)
            if target.stat().st_size != size or digest.of_file(digest.algorithm_of(mark), target) != mark:
                damaged.append(file)
        if missing or damaged:
            kind = CorruptStepError if damaged else IncompleteStepError
            error = kind(what=f"the copy of step {copy.manifest.summary.step} at {self.url} is damaged.")
            error.step, error.files = copy.manifest.summary.step, (*missing, *damaged)
            raise error
        (folder / layout.MANIFEST).write_bytes(copy.data)

    def _fetch_file(self, name: str, file: str, target: pathlib.Path, size: int) -> None:
        """Write one file; no more of it than its manifest says, whatever the store sends."""
        with target.open("wb") as sink:
            for piece in self._pieces(name, file):
                sink.write(piece)
                if sink.tell() > size:
                    return

    def delete(self, name: str) -> None:
        """Delete a copy, its manifest first, so that it is no step any more."""
        if not _NAME.fullmatch(name):
            raise ValueError(name)
        self._known.pop(name, None)
        with self._explained("deleted"):
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._path(name, layout.MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._system.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def _explained(self, done: str, *, absent: bool = False) -> Iterator[None]:
        """Errors of the store as `MirrorError`; with `absent`, that a file is not there is left to the caller."""
        try:
            yield
        except MirrorError:
            raise
        except Exception as error:
            if absent and isinstance(error, FileNotFoundError):
                raise
            told = str(error).rstrip(". \n") or "no reason given"
            raise MirrorError(
                what=f"{self.url} could not be {done}: {type(error).__name__}: {told}.",
                why="the store does not answer, or refuses this address or these credentials; local steps are safe.",
                fix="see the cause above; what is missing at the store is copied when it answers again.",
            ) from error


def _require_local(path: pathlib.Path, file: str, mark: str) -> None:
    if digest.of_file(digest.algorithm_of(mark), path) != mark:
        error = CorruptStepError(
            what=f"{file} is not what was committed, so the step is not copied.",
            why="a mirror of damage would be worth nothing.",
            fix="ct.verify(directory) names all damage.",
        )
        error.files = (file,)
        raise error

# SPDX-License-Identifier: Apache-2.0
"""Read and write copies of steps at an fsspec address; the only file that imports fsspec.

    s3://bucket/run/
        500-1a2b3c4d/          one step: the files of its directory, under their own names
            ckpttools.manifest written last: without it the copy is not a step
        metrics/               copies of the run's .ckpttools/metrics: metrics recorded after the save

The name holds the step and the first digits of its manifest's digest. So a name never stands for two contents, an
unfinished copy is resumed where it stopped, and each manifest is read only once.

Stores raise whatever their drivers raise; all of it becomes `MirrorError` here. No answer of a store is trusted: names
must match a pattern, manifests are sealed, and files are compared with their digests.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import CorruptStepError, IncompleteStepError, MirrorError, StepDamagedError
from ..store import commit, digest, late_metrics, layout, manifest
from ..store.manifest import Manifest, Summary

_NAME = re.compile(r"(0|[1-9]\d{0,17})-([0-9a-f]{8})")
_METRICS = "metrics"
_BLOCK_BYTES = 1 << 22
_FLAT_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "tos", "memory"})
"""Stores without directories; creating one would create a bucket on some of them."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """A finished copy of a step.

    Attributes:
        name: Its directory, below the mirror's address.
        manifest: The step's manifest, with a verified seal.
        manifest_bytes: The manifest's bytes.
    """

    name: str
    manifest: Manifest
    manifest_bytes: bytes


def get_copy_name(data: bytes) -> str:
    """Return the name of the copy of a step, from the bytes of its manifest."""
    summary = manifest.parse_manifest(data).summary
    mark = digest.hash_bytes("sha256", data).partition(":")[2]
    return f"{summary.step}-{mark[:8]}"


class RemoteStore:
    """The copies at one address; the constructor does not contact it.

    Args:
        url: The address, such as "s3://bucket/run".
        options: Options of the fsspec driver.

    Attributes:
        url: The address.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url
        self._options = options
        self._summaries: dict[str, Summary] = {}
        self._metric_files: dict[str, late_metrics.LateMetrics] = {}

    @functools.cached_property
    def _filesystem_and_root(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError as error:
            raise MirrorError(
                what="a mirror needs the package fsspec, which is not installed.",
                why="it is an extra, since most runs need no mirror.",
                fix='pip install "nnx-checkpointing[mirror]", and the driver of your store, such as s3fs.',
            ) from error
        with self._wrap_errors("opened"):
            # No caches: a cached listing would hide what others wrote, and a cached failure would outlast its cause.
            system, root = fsspec.core.url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False, **self._options
            )
        return system, root.rstrip("/")

    @property
    def _filesystem(self) -> Any:
        return self._filesystem_and_root[0]

    def _join_path(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self._filesystem_and_root[1], name, file) if part)

    @property
    def known_summaries(self) -> dict[str, Summary]:
        """Return the summaries of the finished copies whose manifests were read so far."""
        return dict(self._summaries)

    def list_names(self) -> tuple[str, ...]:
        """Return the names of all copies, finished or not.

        Raises:
            MirrorError: If the store does not answer.
        """
        system, root = self._filesystem_and_root
        with self._wrap_errors("listed"):
            system.invalidate_cache()
            try:
                found = system.ls(root, detail=False)
            except FileNotFoundError:
                # An empty directory; if the bucket itself is missing, the first copy fails.
                return ()
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        if _METRICS in names:
            self._read_metric_files()
        return tuple(sorted(name for name in names if _NAME.fullmatch(name)))

    def _list_metric_names(self) -> frozenset[str]:
        with self._wrap_errors("listed"):
            try:
                found = self._filesystem.ls(self._join_path(_METRICS), detail=False)
            except FileNotFoundError:
                return frozenset()
        names = (str(path).rpartition("/")[2] for path in found)
        return frozenset(name for name in names if late_metrics.is_file_name(name))

    def _read_metric_files(self) -> None:
        """Read new metrics files, and update the summaries that were read before them."""
        names = self._list_metric_names() - self._metric_files.keys()
        for name in names:
            if (data := self._read_small(self._join_path(_METRICS, name))) is not None:
                self._metric_files[name] = late_metrics.parse_file(name, data)
        if names:
            self._summaries = {
                name: late_metrics.merge(summary, self._metric_files) for name, summary in self._summaries.items()
            }

    def upload_metrics(self, root: pathlib.Path, summaries: Iterable[Summary]) -> None:
        """Copy the metrics files that the mirror lacks.

        Args:
            root: The run's directory.
            summaries: The steps whose metrics are copied: those that exist in the run or at the mirror.

        Raises:
            MirrorError: If the store does not accept them.
        """
        keys, names = set(map(late_metrics.get_key, summaries)), late_metrics.list_names(root)
        missing = names - self._list_metric_names() if names else ()
        for name in sorted(name for name in missing if late_metrics.parse_file(name, b"").key in keys):
            with contextlib.suppress(FileNotFoundError):
                data = layout.get_control_path(root, f"metrics/{name}").read_bytes()
                with self._wrap_errors("written"):
                    self._make_parent_directory(self._join_path(_METRICS, name))
                    self._filesystem.pipe_file(self._join_path(_METRICS, name), data)
        if missing:
            self._read_metric_files()

    def fetch_metrics(self, root: pathlib.Path, summary: Summary) -> None:
        """Fetch the metrics files of one step that a run lacks.

        Raises:
            MirrorError: If the store does not answer.
        """
        here = late_metrics.list_names(root)
        for name, each in self._metric_files.items():
            if each.key == late_metrics.get_key(summary) and name not in here:
                data = self._read_small(self._join_path(_METRICS, name))
                if data is not None:
                    late_metrics.add_file(root, name, data)

    def list_copies(self) -> tuple[Copy, ...]:
        """Return every finished copy in the order of the commits, without unfinished and damaged ones.

        Raises:
            MirrorError: If the store does not answer.
        """
        found = (self.read_copy(name) for name in self.list_names())
        return tuple(sorted((copy for copy in found if copy), key=lambda copy: copy.manifest.summary.saved_at))

    def read_summary(self, name: str) -> Summary | None:
        """Return the summary of a finished copy, reading it at most once; None if `read_copy` returns None."""
        if name not in self._summaries:
            self.read_copy(name)
        return self._summaries.get(name)

    def read_copy(self, name: str) -> Copy | None:
        """Return the finished copy of a name; None if its manifest is missing, damaged or another step's.

        Only the summary stays in memory: the manifests of many copies of a large model would fill it.
        """
        self._summaries.pop(name, None)
        data = self._read_small(self._join_path(name, layout.MANIFEST))
        try:
            if data is None or get_copy_name(data) != name:
                return None
            parsed = manifest.parse_manifest(data)
            summary = late_metrics.merge(parsed.summary, self._metric_files)
            copy = Copy(name, dataclasses.replace(parsed, summary=summary), data)
        except StepDamagedError:
            return None
        self._summaries[name] = copy.manifest.summary
        return copy

    def _read_small(self, path: str) -> bytes | None:
        with self._wrap_errors("read"):
            try:
                if self._filesystem.size(path) > manifest.MAX_BYTES:
                    return None
                return bytes(self._filesystem.cat_file(path))
            except FileNotFoundError:
                return None

    def upload(
        self, directory: pathlib.Path, *, readback: bool, should_stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Copy a committed step, its manifest last; files that are intact at the store are not sent again.

        Args:
            directory: The step, or links to its files, which do not change.
            readback: Whether to read each file back and compare.
            should_stop: Called before each file; the next call resumes a copy that was stopped.

        Raises:
            MirrorError: If the store does not accept it.
            StepDamagedError: If the local files are not what was committed; the copy is not finished.
            InterruptedError: If it was stopped.
        """
        data = (directory / layout.MANIFEST).read_bytes()
        name, files = get_copy_name(data), manifest.parse_manifest(data).summary.files
        self._summaries.pop(name, None)
        remote_sizes = self._list_sizes(name)
        for file, (size, mark) in files.items():
            if should_stop():
                raise InterruptedError
            if remote_sizes.get(file) == size and self._hash_file(name, file, mark) == mark:
                continue
            _require_local_intact(directory / file, file, mark)
            self._upload_file(directory / file, name, file)
            self._require_uploaded(name, file, size, mark if readback else None)
        with self._wrap_errors("written"):
            self._make_parent_directory(self._join_path(name, layout.MANIFEST))
            self._filesystem.pipe_file(self._join_path(name, layout.MANIFEST), data)
        if self.read_copy(name) is None:
            raise MirrorError(
                what=f"the manifest of {name} came back from {self.url} with other bytes.",
                why="the store changes what is written to it; the copy is not used.",
                fix="check the store.",
            )
        return name

    def _list_sizes(self, name: str) -> dict[str, int]:
        prefix = self._join_path(name) + "/"
        with self._wrap_errors("listed"):
            try:
                found = self._filesystem.find(self._join_path(name), detail=True)
            except FileNotFoundError:
                return {}
        return {path.removeprefix(prefix): int(info.get("size") or 0) for path, info in found.items()}

    def _upload_file(self, source: pathlib.Path, name: str, file: str) -> None:
        target = self._join_path(name, file)
        with self._wrap_errors("written"):
            self._make_parent_directory(target)
            if source.stat().st_size <= _BLOCK_BYTES:
                self._filesystem.pipe_file(target, source.read_bytes())
            else:
                self._filesystem.put_file(str(source), target)

    def _make_parent_directory(self, path: str) -> None:
        protocol = self._filesystem.protocol
        if not _FLAT_PROTOCOLS.intersection([protocol] if isinstance(protocol, str) else protocol):
            self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _require_uploaded(self, name: str, file: str, size: int, expected_digest: str | None) -> None:
        with self._wrap_errors("read"):
            found = int(self._filesystem.size(self._join_path(name, file)))
        if found != size or (
            expected_digest is not None and self._hash_file(name, file, expected_digest) != expected_digest
        ):
            raise MirrorError(
                what=f"{name}/{file} came back from {self.url} with other bytes ({found} of {size}).",
                why="the store changes what is written to it; the copy is not used.",
                fix="check the store; the copy is retried.",
            )

    def _hash_file(self, name: str, file: str, expected_digest: str) -> str | None:
        """Return the digest of a file at the store; None if the file does not exist."""
        chunks = self._read_chunks(name, file)
        try:
            return digest.hash_chunks(digest.get_algorithm(expected_digest), chunks)
        except FileNotFoundError:
            return None

    def _read_chunks(self, name: str, file: str) -> Iterator[bytes]:
        with (
            self._wrap_errors("read", allow_missing=True),
            self._filesystem.open(self._join_path(name, file), "rb", block_size=_BLOCK_BYTES) as source,
        ):
            while chunk := source.read(_BLOCK_BYTES):
                yield chunk

    def find_damaged_files(self, copy: Copy) -> tuple[str, ...]:
        """Return the files of a copy that are missing or damaged; reads all of them."""
        files = copy.manifest.summary.files
        return tuple(file for file, (_, mark) in files.items() if self._hash_file(copy.name, file, mark) != mark)

    def fetch(self, copy: Copy, directory: pathlib.Path, on_bytes: Callable[[int], None] = lambda size: None) -> None:
        """Write a step's files into a new local directory, and verify each by its digest.

        Args:
            copy: The copy to fetch.
            directory: The new directory.
            on_bytes: Called with the size of each file that was written.

        Raises:
            MirrorError: If the store does not answer.
            StepDamagedError: If a file is missing or damaged, naming all such files.
        """
        commit.make_directory(directory)
        missing, damaged = [], []
        for file, (size, mark) in copy.manifest.summary.files.items():
            # `file` was checked when the manifest was read: it does not leave the step's directory.
            target = directory / file
            commit.make_directory(target.parent)
            try:
                self._fetch_file(copy.name, file, target, size)
            except FileNotFoundError:
                missing.append(file)
                continue
            on_bytes(size)
            if target.stat().st_size != size or digest.hash_file(digest.get_algorithm(mark), target) != mark:
                damaged.append(file)
        if missing or damaged:
            kind = CorruptStepError if damaged else IncompleteStepError
            error = kind(what=f"the copy of step {copy.manifest.summary.step} at {self.url} is damaged.")
            error.step, error.files = copy.manifest.summary.step, (*missing, *damaged)
            raise error
        (directory / layout.MANIFEST).write_bytes(copy.manifest_bytes)

    def _fetch_file(self, name: str, file: str, target: pathlib.Path, size: int) -> None:
        """Write one file, at most one chunk beyond its recorded size, whatever the store sends."""
        with target.open("wb") as sink:
            for chunk in self._read_chunks(name, file):
                sink.write(chunk)
                if sink.tell() > size:
                    return

    def delete(self, name: str) -> None:
        """Delete a copy, its manifest first, so that it stops being a step."""
        if not _NAME.fullmatch(name):
            raise ValueError(name)
        summary = self._summaries.pop(name, None)
        key = late_metrics.get_key(summary) if summary else None
        with self._wrap_errors("deleted"):
            for file in [file for file, each in self._metric_files.items() if each.key == key]:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._join_path(_METRICS, file))
                del self._metric_files[file]
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(self._join_path(name, layout.MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm(self._join_path(name), recursive=True)

    @contextlib.contextmanager
    def _wrap_errors(self, action: str, *, allow_missing: bool = False) -> Iterator[None]:
        """Raise errors of the store as `MirrorError`; with `allow_missing`, `FileNotFoundError` passes through."""
        try:
            yield
        except MirrorError:
            raise
        except Exception as error:
            if allow_missing and isinstance(error, FileNotFoundError):
                raise
            reason = str(error).rstrip(". \n") or "no reason given"
            raise MirrorError(
                what=f"{self.url} could not be {action}: {type(error).__name__}: {reason}.",
                why="the store does not answer, or rejects this address or these credentials; local steps are safe.",
                fix="fix the cause above; missing steps are copied when the store answers again.",
            ) from error


def _require_local_intact(path: pathlib.Path, file: str, expected_digest: str) -> None:
    if digest.hash_file(digest.get_algorithm(expected_digest), path) != expected_digest:
        error = CorruptStepError(
            what=f"{file} differs from what was committed, so the step is not copied.",
            why="the copy would be damaged too.",
            fix="ct.verify(directory) lists all damage.",
        )
        error.files = (file,)
        raise error

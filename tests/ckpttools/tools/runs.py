# SPDX-License-Identifier: Apache-2.0
"""What the tests of several tools share: the bytes below a directory, and its small files."""


def snapshot_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small_files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and 0 < p.stat().st_size < 4096]

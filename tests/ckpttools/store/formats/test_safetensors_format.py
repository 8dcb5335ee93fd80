# SPDX-License-Identifier: Apache-2.0
"""Files in the safetensors format: written whole, and trusted only after the header was checked."""

import json
import struct

import numpy as np
import pytest
from safetensors import numpy as oracle

import ckpttools as ct
from ckpttools.store.formats import safetensors_format
from ckpttools.store.formats.safetensors_format import Tensor


def file_with(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not begin with the length"),
        (file_with({}, length=1 << 60), "does not begin with the length"),
        (file_with(b"{"), "cannot be read"),
        (file_with(b"[" * 5000), "cannot be read"),
        (file_with([]), "is not a table"),
        (file_with(b'{"a":1,"a":2}'), "a name occurs twice"),
        (file_with({"__metadata__": {"a": 1}}), "values are not strings"),
        (file_with({"a": {}}), "is malformed"),
        (file_with({"a": {**ENTRY, "dtype": "X9"}}, b"1234"), "unknown dtype 'X9'"),
        (file_with({"a": {**ENTRY, "dtype": ["F32"]}}, b"1234"), "unknown dtype"),
        (file_with({"a": {**ENTRY, "shape": [-1]}}, b"1234"), "is out of range"),
        (file_with({"a": {**ENTRY, "data_offsets": [0, 8]}}, b"12345678"), "has 8 bytes"),
        (file_with({"a": ENTRY, "b": ENTRY}, b"1234"), "overlap or leave gaps"),
        (file_with({"a": {**ENTRY, "data_offsets": [4, 8]}}, b"12345678"), "overlap or leave gaps"),
        (file_with({"a": ENTRY}, b"123"), "header describes"),
        (file_with({"a": ENTRY}, b"12345"), "header describes"),
        (file_with({"a": {**ENTRY, "shape": [1 << 50, 1 << 50]}}, b"1234"), "has 4 bytes"),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, content, why):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ct.TensorFileError, match=why):
        safetensors_format.read_header(tmp_path / "m")


def test_a_file_that_shrinks_or_vanishes_during_a_read_raises(tmp_path):
    (tmp_path / "m").write_bytes(b"12")
    tensor = safetensors_format.Tensor("float32", (1,), 0)
    with pytest.raises(ct.TensorFileError, match="was truncated"):
        safetensors_format.read(tmp_path / "m", tensor)
    with pytest.raises(ct.StorageError, match="a moment ago"):
        safetensors_format.read(tmp_path / "nothing", tensor)


def write(path, arrays, *, batch_bytes=1 << 20, read=None):
    batches = []

    def read_batch(names):
        batches.append(list(names))
        return {name: arrays[name] for name in names}

    tensors = {name: Tensor(array.dtype.name, array.shape) for name, array in arrays.items()}
    safetensors_format.write(path, tensors, read or read_batch, {"format": "pt"}, batch_bytes=batch_bytes)
    return batches


ARRAYS = {
    "narrow": np.arange(3, dtype=np.int8),
    "wide": np.arange(2, dtype=np.float64),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def test_a_written_file_is_read_by_the_formats_own_package(tmp_path):
    write(tmp_path / "m", ARRAYS)
    for name, array in oracle.load_file(tmp_path / "m").items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)
    tensors, metadata = safetensors_format.read_header(tmp_path / "m")
    assert (set(tensors), metadata) == (set(ARRAYS), {"format": "pt"})
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(safetensors_format.read(tmp_path / "m", tensor), ARRAYS[name], strict=True)


def test_each_tensor_is_aligned_to_its_dtype(tmp_path):
    write(tmp_path / "m", ARRAYS)
    tensors, _ = safetensors_format.read_header(tmp_path / "m")
    assert [tensors[name].start % ARRAYS[name].itemsize for name in ARRAYS] == [0] * 4
    assert min(tensors.values(), key=lambda tensor: tensor.start).dtype == "float64", "the widest dtype comes first"


@pytest.mark.parametrize(("batch_bytes", "sizes"), [(1, [1, 1, 1, 1]), (20, [3, 1]), (1 << 20, [4])])
def test_arrays_are_requested_in_batches(tmp_path, batch_bytes, sizes):
    assert [len(batch) for batch in write(tmp_path / "m", ARRAYS, batch_bytes=batch_bytes)] == sizes


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "m").write_bytes(b"old")

    def fail(names):
        raise OSError(28, "No space left on device")

    with pytest.raises(ct.StorageError, match="could not be written"):
        write(tmp_path / "m", ARRAYS, read=fail)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m", b"old")]
    write(tmp_path / "m", ARRAYS)  # control
    assert (tmp_path / "m").stat().st_size > 3

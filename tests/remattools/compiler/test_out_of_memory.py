# SPDX-License-Identifier: Apache-2.0
"""Out-of-memory messages of compilers and allocators are read into numbers."""

import pytest

from remattools.compiler import out_of_memory


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        pytest.param(
            "the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G)",
            20.5 * 2**30,
            15.75 * 2**30,
            id="tpu",
        ),
        pytest.param(
            "Ran out of memory in hbm. Used 24.5G of 15.75G hbm.", 24.5 * 2**30, 15.75 * 2**30, id="older tpu"
        ),
        pytest.param("Out of memory while trying to allocate 16.00GiB.", 16 * 2**30, None, id="gpu"),
        pytest.param("Out of memory allocating 17179869184 bytes.", 16 * 2**30, None, id="gpu in bytes"),
        pytest.param("RESOURCE_EXHAUSTED: something else", None, None, id="unknown"),
    ],
)
def test_bytes_are_read_from_known_wordings(message, needed, limit):
    reason = out_of_memory.parse_out_of_memory(message)
    assert (reason.needed_bytes, reason.limit_bytes) == (needed, limit)
    assert reason.message == message


def test_the_excess_is_what_is_needed_above_the_limit():
    reason = out_of_memory.OutOfMemory(needed_bytes=5, limit_bytes=3, message="m")
    assert reason.excess_bytes == 2
    assert out_of_memory.OutOfMemory(needed_bytes=5, limit_bytes=None, message="m").excess_bytes is None

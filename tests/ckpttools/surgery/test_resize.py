# SPDX-License-Identifier: Apache-2.0
"""Shapes and blocks of `Pad` and `Slice`."""

import pytest

import ckpttools as ct
from ckpttools.surgery import resize


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        pytest.param([ct.Pad("w")], (5, 4), id="pad grows only"),
        pytest.param([ct.Slice("w")], (3, 2), id="slice shrinks only"),
        pytest.param([ct.Slice("w"), ct.Pad("w")], (5, 2), id="both reach the target"),
        pytest.param([], (3, 4), id="control"),
    ],
)
def test_shapes_after_pad_and_slice(operations, expected):
    assert resize.compute_shape("m.w", operations, (3, 4), (5, 2)) == expected


def test_another_rank_is_never_resized():
    assert resize.compute_shape("m.w", [ct.Pad("w")], (3,), (5, 2)) == (3,)


def test_the_block_stands_in_the_larger_array():
    pad, cut = ct.Pad("w", start=(2,)), ct.Slice("w", start=(1,))
    assert resize.locate_block(pad, (3, 2), (6, 2)) == (slice(2, 5), slice(0, 2))
    assert resize.locate_block(cut, (6, 2), (3, 2)) == (slice(1, 4), slice(0, 2))


@pytest.mark.parametrize(
    ("operation", "shape"),
    [(ct.Slice("w", start=(2,)), (2, 2)), (ct.Pad("w", start=(3,)), (5, 2)), (ct.Slice("w", start=(0, 0, 1)), (2, 2))],
    ids=["slice", "pad", "rank"],
)
def test_a_block_outside_its_array_is_refused(operation, shape):
    with pytest.raises(ct.StructureError, match="exceeds an array") as caught:
        resize.compute_shape("m.w", [operation], (3, 2), shape)
    assert "is the last position that fits" in caught.value.fix

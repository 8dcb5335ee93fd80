# SPDX-License-Identifier: Apache-2.0
"""Functions as targets compare by the function."""

from remattools.transform.function_target import FunctionTarget


def test_two_targets_of_one_function_are_equal():
    assert FunctionTarget(len) == FunctionTarget(len)
    assert hash(FunctionTarget(len)) == hash(FunctionTarget(len))
    assert FunctionTarget(len) != FunctionTarget(abs)
    assert FunctionTarget(max)(1, 2) == 2

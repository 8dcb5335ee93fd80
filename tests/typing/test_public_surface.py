# SPDX-License-Identifier: Apache-2.0
"""Type checkers see the attributes of everything that the two packages return."""

import pytest

from .checkers import CHECKERS, check_program


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("program", ["public_surface", "public_surface_errors"])
def test_results_and_their_attributes_have_types(checker, program):
    check_program(checker, program)

# SPDX-License-Identifier: Apache-2.0
"""Type checkers see through `@rt.remat`."""

import pytest

from .checkers import CHECKERS, check_program


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("program", ["decorator", "decorator_errors"])
def test_decorated_code_keeps_its_type(checker, program):
    check_program(checker, program)

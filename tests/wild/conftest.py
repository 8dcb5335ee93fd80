# SPDX-License-Identifier: Apache-2.0
"""Settings for models that others wrote.

Other people's code may warn, also while it is imported; that is not this project's
to mend. This folder is in `norecursedirs`, so what is set here reaches no other test.
"""

import os

import pytest

# Hundreds of programs are compiled and each runs twice: the machine code need not be good.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")

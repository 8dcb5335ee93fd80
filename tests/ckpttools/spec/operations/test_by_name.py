# SPDX-License-Identifier: Apache-2.0
"""Every public operation has a name in spec files."""

import ckpttools as ct
from ckpttools.spec.operations import OPERATIONS, Operation


def test_each_public_operation_has_a_name():
    public = {
        kind for name in ct.__all__ if isinstance(kind := getattr(ct, name), type) and issubclass(kind, Operation)
    }
    assert set(OPERATIONS.values()) == public - {Operation}
    assert all(name == kind.__name__.lower() for name, kind in OPERATIONS.items())

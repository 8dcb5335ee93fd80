# SPDX-License-Identifier: Apache-2.0
"""`ls` prints as a table."""

import numpy as np

import ckpttools as ct
from tests.ckpttools.restore.test_first_intact import spec_for


def test_a_listing_prints_as_a_table(tmp_path):
    assert str(ct.ls(tmp_path)) == f"no steps: {tmp_path} is an empty directory."
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(3, {"model": {"w": np.ones(2)}}, metrics={"loss": 0.25})
    head, row = str(ct.ls(tmp_path)).splitlines()
    assert head.split() == ["step", "state", "saved", "size", "loss", "branch", "reason"]
    assert row.split()[:2] == ["3", "committed"]
    assert "0.25" in row
    assert "asked for" in row

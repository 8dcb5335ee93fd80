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


def test_a_listing_says_where_each_branch_began(tmp_path):
    state = {"model": {"w": np.ones(2)}}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.restore(state, step=1)
        ckpt.save(3, state)
        ckpt.save(4, state)
        ckpt.restore(state, step=3)
        ckpt.save(5, state)
    rows = {row.step: row for row in ct.ls(tmp_path)}
    first, second, third = rows[1].branch, rows[3].branch, rows[5].branch
    assert rows[5].lineage == ((first, 0), (second, 1), (third, 3))
    assert [step for step, row in rows.items() if row.state == "superseded"] == [2, 4]
    assert f"{third} after 3" in str(ct.ls(tmp_path))
    shown = ct.show(tmp_path, 5)
    assert shown.as_dict()["lineage"] == rows[5].lineage
    assert f"lineage: branch {first}, branch {second} after step 1, branch {third} after step 3" in str(shown)

# SPDX-License-Identifier: Apache-2.0
"""What a mirror copies and deletes."""

import ckpttools as ct
from ckpttools.mirror import upload_plan
from ckpttools.store.manifest import Summary


def summary(step, saved_at, lineage=(("a", 0),)):
    return Summary(
        step=step,
        sequence=step,
        saved_at=saved_at,
        run_s=0.0,
        metrics={},
        lineage=lineage,
        reason="",
        spec="",
        files={},
    )


def test_a_plan_copies_the_newest_first_and_deletes_unkept_steps():
    local = {f"{step}-x": summary(step, step) for step in (3, 4, 5)}
    there = {f"{step}-x": summary(step, step) for step in (1, 2, 3)}
    todo = upload_plan.make_upload_plan(
        local, there, [*there, "9-y"], ct.Latest(3), lineage=(("a", 0),), deleted={}, pins=frozenset({1})
    )
    assert todo.names_to_copy == ("5-x", "4-x")
    assert todo.names_to_delete == ("2-x", "9-y")
    assert not todo.missed_names

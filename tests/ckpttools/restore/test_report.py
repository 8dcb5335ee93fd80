# SPDX-License-Identifier: Apache-2.0
"""What a restore did, as text and as data."""

import json
import pathlib

import pytest

import ckpttools as ct

USED = ct.Candidate(step=20, verdict="used")
CORRUPT = ct.Candidate(
    step=30,
    verdict="corrupt",
    reason="step 30 is corrupt: 1 leaf differs",
    leaves=("model.kernel",),
    files=("model/d/1",),
    moved_to=pathlib.Path("runs/a/.ckpttools/quarantine/30"),
)


def test_a_damaged_candidate_names_leaf_file_and_place():
    assert str(CORRUPT).splitlines() == [
        "step 30: corrupt, 1 leaf differs",
        "    damaged leaf: model.kernel",
        "    damaged file: model/d/1",
        "    moved to: runs/a/.ckpttools/quarantine/30",
    ]
    assert str(USED) == "step 20: used", "control"


def test_a_copy_from_the_mirror_says_so():
    assert str(ct.Candidate(step=20, verdict="used", source="mirror")) == "step 20 from the mirror: used"


def test_rejected_candidates_are_those_that_were_not_used():
    report = ct.RestoreReport(step=20, state={}, candidates=(CORRUPT, USED))
    assert report.rejected == (CORRUPT,)
    assert ct.RestoreReport(step=20, state={}, candidates=(USED,)).rejected == ()


@pytest.mark.parametrize(
    ("verdicts", "count"),
    [
        (["used"], 0),
        (["corrupt", "used"], 1),
        (["rejected", "unreachable", "empty"], 0),
        (["incomplete", "corrupt"], 1),
    ],
)
def test_damaged_steps_are_counted_once_whatever_their_copies(verdicts, count):
    candidates = tuple(ct.Candidate(step=30, verdict=verdict) for verdict in verdicts)
    assert ct.RestoreReport(step=None, state={}, candidates=candidates).damaged == count


def test_a_report_as_data_is_json_without_the_state():
    leaf = ct.AlteredLeaf(name="model.b", action="renamed", source="model.a", before="f32[]", after="f32[]")
    report = ct.RestoreReport(
        step=20, state={"w": object()}, candidates=(CORRUPT, USED), metrics={"loss": 0.5}, altered=(leaf,)
    )
    data = json.loads(json.dumps(report.as_dict()))
    assert "state" not in data
    assert data["candidates"][0]["moved_to"] == "runs/a/.ckpttools/quarantine/30"
    assert data["candidates"][1]["moved_to"] is None
    assert data["altered"][0]["source"] == "model.a"
    assert "object" not in repr(report), "a state may be large"


def test_a_report_as_text_lists_candidates_and_changed_leaves():
    leaf = ct.AlteredLeaf(name="model.a", action="kept")
    text = str(ct.RestoreReport(step=20, state={}, candidates=(CORRUPT, USED), seconds=1.25, altered=(leaf,)))
    assert text.splitlines()[0] == "restored step 20 in 1.25 s"
    assert "  step 20: used" in text.splitlines()
    assert text.splitlines()[-1] == "  model.a: kept"

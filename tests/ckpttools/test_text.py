# SPDX-License-Identifier: Apache-2.0
"""The health of a step in lines: the verdict is said once, and damage has a line for each part."""

from ckpttools.text import format_health


def test_a_healthy_step_takes_one_line():
    assert format_health(500, "intact", "", leaves=(), files=()) == "step 500: intact"


def test_damaged_leaves_and_files_have_lines_of_their_own():
    text = format_health(500, "corrupt", "2 leaves differ", leaves=("m.a", "m.b"), files=("m/d/1",))
    assert text.splitlines() == [
        "step 500: corrupt, 2 leaves differ",
        "    damaged leaf: m.a",
        "    damaged leaf: m.b",
        "    damaged file: m/d/1",
    ]


def test_a_reason_that_repeats_step_and_verdict_is_shortened():
    reason = "step 500 is corrupt: 1 leaf differs"
    assert format_health(500, "corrupt", reason, leaves=(), files=()) == "step 500: corrupt, 1 leaf differs"
    other = format_health(500, "incomplete", reason, leaves=(), files=())
    assert other == f"step 500: incomplete, {reason}", "control: another verdict"


def test_the_origin_stands_after_the_number():
    assert (
        format_health(5, "used", "", leaves=(), files=(), origin=" from the mirror") == "step 5 from the mirror: used"
    )

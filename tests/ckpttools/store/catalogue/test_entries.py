# SPDX-License-Identifier: Apache-2.0
"""A catalogue says which steps are live, and which number the next commit gets."""

import pathlib

from ckpttools.spec.retention import StepInfo
from ckpttools.store.catalogue import Catalogue, Entry


def make_entry(step, *, sequence=0, superseded=False):
    info = StepInfo(step=step, sequence=sequence, saved_at=0.0, metrics={}, pinned=False, superseded=superseded)
    state = "committed" if sequence else "corrupt"
    return Entry(step=step, path=pathlib.Path(str(step)), state=state, info=info if sequence else None)


def test_the_newest_step_is_the_live_one_that_was_committed_last():
    entries = (make_entry(20, sequence=3), make_entry(30, sequence=2), make_entry(40, sequence=4, superseded=True))
    steps = Catalogue(entries=(*entries, make_entry(50)), last_sequence=7)
    assert [entry.step for entry in steps.live_entries] == [20, 30]
    assert [entry.step for entry in steps.superseded_entries] == [40]
    assert steps.newest_entry is entries[0]
    assert steps.next_sequence == 8, "that of a damaged step counts, too"


def test_a_run_without_steps_has_no_newest_one():
    assert Catalogue(()).newest_entry is None
    assert Catalogue(()).next_sequence == 1

# SPDX-License-Identifier: Apache-2.0
"""A step is used only if every process could read it; `test_messages.py` restores with real processes."""

import pytest

import ckpttools as ct
from ckpttools.processes.messages import Group
from ckpttools.restore import multiprocess_restore
from ckpttools.store.catalogue import Entry
from ckpttools.store.run_directory import RunDirectory


class FirstOfTwo(Group):
    """A process whose peer sends the given verdict."""

    count = 2

    def __init__(self, other):
        self.other = other
        self.sent = []

    def all_gather(self, topic, value, *, channel="main"):
        self.sent.append(value)
        return [value, self.other]


class SecondOfTwo(Group):
    """The second process, for which the leader lists the given steps."""

    index = 1
    count = 2

    def __init__(self, names):
        self.names = names

    def broadcast(self, topic, make, *, channel="main"):
        return self.names


LOADED = ("a loaded step", [])
DAMAGED = ["damaged", "step 2 is corrupt: a leaf differs.\n  why: ..."]
OTHER = ["other", "the disk does not answer.\n  why: ..."]


def coordinate(group, outcome):
    def attempt():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    entry = Entry(step=2, path=None, state="committed")
    return multiprocess_restore.make_coordinator(group)(entry, attempt)


def test_a_step_that_all_can_read_is_used():
    group = FirstOfTwo(None)
    assert coordinate(group, LOADED) == LOADED
    assert group.sent == [None]


def test_damage_seen_by_another_process_rejects_the_step():
    with pytest.raises(ct.IncompleteStepError, match="could not be read by process 1: step 2 is corrupt"):
        coordinate(FirstOfTwo(DAMAGED), LOADED)


def test_another_failure_of_another_process_ends_the_restore():
    with pytest.raises(ct.ProcessError, match="process 1 could not restore step 2: the disk does not answer"):
        coordinate(FirstOfTwo(OTHER), LOADED)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ct.CorruptStepError("bad"), "damaged"), (ct.StorageError("no answer"), "other"), (ValueError("bug"), "other")],
    ids=["damage", "disk", "bug"],
)
def test_an_own_error_is_sent_and_raised_unchanged(error, kind):
    group = FirstOfTwo(None)
    with pytest.raises(type(error)) as caught:
        coordinate(group, error)
    assert caught.value is error
    assert group.sent == [[kind, str(error)]]


def test_a_failure_ends_the_restore_although_this_process_sees_damage():
    with pytest.raises(ct.ProcessError):
        coordinate(FirstOfTwo(OTHER), ct.CorruptStepError("bad"))


def test_the_leader_lists_the_steps_it_sees(golden):
    found = multiprocess_restore.list_candidates(Group(), RunDirectory(golden), "latest")
    assert [entry.step for entry in found] == [2, 1]


def test_the_others_try_the_leaders_steps_in_its_order(golden):
    found = multiprocess_restore.list_candidates(SecondOfTwo(["1", "2"]), RunDirectory(golden), "latest")
    assert [(entry.step, entry.state) for entry in found] == [(1, "committed"), (2, "committed")]


def test_a_step_that_only_the_leader_sees_is_incomplete(golden):
    names = ["3", ".ckpttools/superseded/2-2"]
    found = multiprocess_restore.list_candidates(SecondOfTwo(names), RunDirectory(golden), "latest")
    assert [(entry.step, entry.state) for entry in found] == [(3, "incomplete"), (2, "incomplete")]
    assert "does not see step 3" in str(found[0].error)

# SPDX-License-Identifier: Apache-2.0
"""Versions of a state count from 1, and migrations lead to them without a gap."""

import pytest

import ckpttools as ct
from ckpttools.spec.state import as_state_version


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
        pytest.param(lambda: ct.Migration(0), "from_version=0", "from_version=1", id="version"),
        pytest.param(lambda: ct.StateVersion(3, [ct.Migration(1)]), "migrations from 1", "ct.Migration(2", id="gap"),
        pytest.param(lambda: ct.StateVersion(1, [ct.Migration(0 + 1)]), "migrations from 1", "Migration", id="itself"),
        pytest.param(lambda: ct.CheckpointSpec(directory="x", state_version=0), "number=0", "number=1", id="spec"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, text, fix):
    with pytest.raises(ct.SpecError) as caught:
        make()
    assert text in caught.value.what
    assert fix in caught.value.fix


VERSION = ct.StateVersion(4, [ct.Migration(2, ct.Drop("b")), ct.Migration(3, [ct.Rename("c", "d"), ct.Drop("e")])])


@pytest.mark.parametrize(("version", "names"), [(2, ["b", "c", "e"]), (3, ["c", "e"]), (4, [])])
def test_migrations_since_a_version_come_in_order(version, names):
    surgeries = VERSION.get_surgery_since(version)
    assert [operation.pattern for surgery in surgeries for operation in surgery] == names


def test_the_oldest_version_is_that_of_the_first_migration():
    assert VERSION.oldest == 2
    assert ct.StateVersion(4).oldest == 4


def test_a_number_stands_for_a_version_without_migrations():
    assert as_state_version(7) == ct.StateVersion(7)
    assert as_state_version(VERSION) is VERSION


def test_versions_compare_by_value():
    same = ct.StateVersion(2, (ct.Migration(1, [ct.Drop("b")]),))
    assert same == ct.StateVersion(2, [ct.Migration(1, ct.Surgery([ct.Drop("b")]))])
    assert hash(same) == hash(ct.StateVersion(2, [ct.Migration(1, ct.Drop("b"))]))
    assert same != ct.StateVersion(2, [ct.Migration(1)])

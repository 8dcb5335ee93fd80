# SPDX-License-Identifier: Apache-2.0
"""What is suggested for changes that people make puts every value where it belongs, or nothing is suggested."""

import pytest

import ckpttools as ct
from ckpttools.surgery import suggest
from tests.ckpttools.surgery import changes
from tests.ckpttools.surgery.change_list import list_changes

CHANGES = {change.name: change for change in list_changes()}
MOST_OPERATIONS = 12
"""More would be one operation for each layer."""


@pytest.mark.parametrize("name", CHANGES)
def test_every_value_lands_where_it_belongs(name):
    outcome = changes.try_change(CHANGES[name], changes.load_from_memory)
    assert outcome.right, (outcome.wrong, outcome.suggested)
    assert outcome.kept == outcome.possible
    assert len(outcome.suggested) <= MOST_OPERATIONS


@pytest.mark.parametrize("name", ["scan on, with adam", "adam, clipping added"])
def test_the_same_comes_from_disk(name):
    outcome = changes.try_change(CHANGES[name], changes.load_from_disk)
    assert outcome.right
    assert outcome.suggested == changes.try_change(CHANGES[name], changes.load_from_memory).suggested


@pytest.mark.parametrize("name", ["scan on", "PyTorch's weights to kernels", "dropout in, between equal layers"])
def test_a_suggestion_that_follows_no_trace_is_wrong(name, monkeypatch):
    """Control."""
    monkeypatch.setattr(suggest, "trace_leaves", lambda plan: [])
    outcome = changes.try_change(CHANGES[name], changes.load_from_memory)
    assert not outcome.right


def test_names_are_unique():
    assert len(CHANGES) == len(list_changes()) >= 60


def test_what_nothing_on_disk_could_fill_is_not_offered():
    surgery, _ = changes.load_from_disk(CHANGES["nothing alike"].old(), CHANGES["nothing alike"].new())
    assert surgery is None
    assert ct.StructureError.surgery == ()

# SPDX-License-Identifier: Apache-2.0
"""One step into host memory: planned, verified and changed before the state is touched."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.restore.read_step import get_no_changes, read_step
from ckpttools.store import catalogue, orbax
from ckpttools.store.manifest import Item
from ckpttools.surgery.plan import Changes
from ckpttools.tree import flatten

OPTIMIZER = {"count": jnp.array(0, jnp.int32), "mu": jnp.zeros((2, 3)), "none": None}


@pytest.fixture
def entry(golden):
    return next(entry for entry in catalogue.scan(golden).entries if entry.step == 2)


def templates(**items):
    return {name: flatten.flatten_item(value, template=True) for name, value in items.items()}


def forbid_reading(monkeypatch):
    monkeypatch.setattr(orbax, "read", lambda *_: pytest.fail("an array was read"))


def test_only_the_items_of_the_state_are_read(entry, monkeypatch):
    requested = []
    read = orbax.read
    monkeypatch.setattr(orbax, "read", lambda path, records: requested.extend(records) or read(path, records))
    loaded = read_step(entry, templates(optimizer=OPTIMIZER), get_no_changes)
    assert requested == ["optimizer"]
    assert loaded.items["optimizer"].arrays["count",].tolist() == 2
    np.testing.assert_allclose(loaded.items["optimizer"].arrays["mu",], np.full((2, 3), 0.2), rtol=1e-6)
    assert {leaf.template for leaf in loaded.plan.placed_leaves} == {None}, "the state's values are not kept twice"


def test_surgery_is_applied_to_what_was_read(entry):
    changes = Changes(surgery=ct.Surgery([ct.Rename("optimizer.mu", "optimizer.momentum"), ct.Drop("optimizer.none")]))
    state = {"count": OPTIMIZER["count"], "momentum": OPTIMIZER["mu"]}
    loaded = read_step(entry, templates(optimizer=state), lambda _: changes)
    assert set(loaded.items["optimizer"].arrays) == {("count",), ("momentum",)}


def test_a_state_that_does_not_fit_raises_before_reading(entry, monkeypatch):
    forbid_reading(monkeypatch)
    with pytest.raises(ct.StructureError, match="step 2 does not fit") as caught:
        read_step(entry, templates(optimizer={**OPTIMIZER, "mu": jnp.zeros((4, 3))}), get_no_changes)
    assert any("mu" in line for line in caught.value.mismatches)
    assert any(isinstance(each, ct.Pad) for each in caught.value.surgery)


def test_a_version_that_is_not_supported_raises_before_reading(entry, monkeypatch):
    forbid_reading(monkeypatch)

    def refuse(_):
        raise ct.VersionError("too new", "", "")

    with pytest.raises(ct.VersionError):
        read_step(entry, templates(optimizer=OPTIMIZER), refuse)


def test_a_step_without_a_manifest_raises_its_error(entry):
    error = ct.CorruptStepError("the manifest is damaged.")
    with pytest.raises(ct.CorruptStepError, match="the manifest is damaged"):
        read_step(dataclasses.replace(entry, manifest=None, error=error), {}, get_no_changes)
    with pytest.raises(ct.IncompleteStepError, match="step 2 has no manifest"):
        read_step(dataclasses.replace(entry, manifest=None), {}, get_no_changes)


def test_values_of_several_processes_need_as_many_processes(entry, monkeypatch):
    contents = entry.manifest.contents
    count = contents.items["optimizer"].records[0]
    local = {1: {"optimizer": Item(records=(count,), skeletons={})}}
    entry.manifest.__dict__["contents"] = dataclasses.replace(contents, processes=2, local=local)
    control = read_step(entry, templates(values={"epoch": 0}), lambda _: Changes(only=("values.epoch",)))
    assert control.entry is entry, "an item without such values"
    forbid_reading(monkeypatch)
    with pytest.raises(ct.StructureError, match="was saved by 2 processes"):
        read_step(entry, templates(optimizer=OPTIMIZER), get_no_changes)

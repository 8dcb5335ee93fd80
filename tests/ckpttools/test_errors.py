# SPDX-License-Identifier: Apache-2.0
"""Errors keep their three parts and can be caught as the builtin that they extend."""

import pickle

import pytest

import ckpttools as ct
from ckpttools import errors


def test_a_damaged_step_has_a_default_why_and_fix():
    for kind in (ct.IncompleteStepError, ct.CorruptStepError, ct.UntrustedStepError):
        error = pickle.loads(pickle.dumps(kind(what="step 3 is damaged.")))
        assert str(error).splitlines()[0] == "step 3 is damaged."
        assert error.why
        assert "step" in error.fix or "directory" in error.fix
        assert kind(what="a", why="b", fix="c").why == "b"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ct.SpecError, ValueError),
        (ct.LeafError, TypeError),
        (ct.StepNotFoundError, LookupError),
        (ct.NoIntactStepError, LookupError),
        (ct.StorageError, OSError),
        (ct.MirrorError, ct.StorageError),
        (ct.SaveTimeoutError, TimeoutError),
        (ct.CorruptStepError, ct.StepDamagedError),
        (ct.UntrustedStepError, ct.CorruptStepError),
        (ct.VersionError, ct.StructureError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_an_error_can_be_caught_as_what_it_extends(error, builtin):
    assert issubclass(error, builtin)
    assert issubclass(error, ct.CheckpointError)


def test_a_structure_or_a_disk_is_not_damage():
    """Damage is passed over for an older step; these must not be."""
    for kind in (ct.StructureError, ct.VersionError, ct.StorageError, ct.NoIntactStepError):
        assert not issubclass(kind, ct.StepDamagedError)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ct.CheckpointError) and kind.__module__ == errors.__name__
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_error_survives_pickling_with_its_attributes(kind):
    error = kind("what", "why", "fix")
    error.step, error.note = 3, ("a", "b")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.what, again.why, again.fix, again.step, again.note) == ("what", "why", "fix", 3, ("a", "b"))
    assert str(again) == "what\n  why: why\n  fix: fix"

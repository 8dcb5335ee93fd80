# SPDX-License-Identifier: Apache-2.0
"""Which steps a restore tries, and in which order."""

import math
import pathlib

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.restore import select
from ckpttools.spec.retention import StepInfo
from ckpttools.store.catalogue import Catalogue, Entry


def entry(step, sequence=None, *, metrics=None, superseded=False, directory="run"):
    info = StepInfo(step=step, sequence=sequence or step, metrics=metrics or {}, superseded=superseded)
    return Entry(step=step, path=pathlib.Path(directory, str(step)), state="committed", info=info)


def damaged(step):
    return Entry(step=step, path=pathlib.Path("run", str(step)), state="corrupt", error=ct.CorruptStepError("bad"))


def numbers(entries):
    return [each.step for each in entries]


LOSSES = Catalogue(
    entries=(
        entry(1, metrics={"loss": 0.5}),
        entry(2, metrics={"loss": 0.1}),
        entry(3, metrics={"loss": math.nan}),
        entry(4, metrics={"loss": 0.01}, superseded=True),
        entry(5),
    )
)


def test_latest_tries_the_newest_first_and_reports_damage():
    catalogue = Catalogue(entries=(entry(1), entry(2), damaged(3)))
    assert numbers(select.list_candidates(catalogue, "latest")) == [3, 2, 1]


def test_latest_leaves_out_abandoned_branches():
    catalogue = Catalogue(entries=(entry(1), entry(9, superseded=True)), moved_entries=(entry(8, superseded=True),))
    assert numbers(select.list_candidates(catalogue, "latest")) == [1]
    moved = Catalogue(entries=(entry(1),), moved_entries=(entry(8),))
    assert numbers(select.list_candidates(moved, "latest")) == [8, 1], "control: a live step that was moved aside"


def test_a_number_selects_one_step_superseded_or_not():
    assert numbers(select.list_candidates(LOSSES, 4)) == [4]
    moved = entry(4, directory="run/.ckpttools/superseded")
    here = Catalogue(entries=(entry(4),), moved_entries=(moved,))
    assert select.list_candidates(here, 4) == [entry(4)]
    assert select.list_candidates(Catalogue(entries=(), moved_entries=(moved,)), 4) == [moved]


def test_a_missing_number_names_the_steps_that_exist():
    with pytest.raises(ct.StepNotFoundError, match="step 7 does not exist") as caught:
        select.list_candidates(LOSSES, 7)
    assert caught.value.fix == "available: 1, 2, 3, 5; superseded: 4."


@pytest.mark.parametrize(("mode", "expected"), [("min", [2, 1, 3]), ("max", [1, 2, 3])])
def test_best_ranks_live_steps_and_puts_nan_last(mode, expected):
    assert numbers(select.list_candidates(LOSSES, ct.best("loss", mode))) == expected


def test_a_metric_that_was_never_recorded_names_those_that_were():
    with pytest.raises(ct.StepNotFoundError, match="no step has a recorded metric 'lsos'") as caught:
        select.list_candidates(LOSSES, ct.best("lsos", "min"))
    assert caught.value.fix == "recorded: loss."


@pytest.mark.parametrize("selector", ["newest", "500", 5.0, True, None, np.int64(5)], ids=repr)
def test_what_selects_no_step_is_refused(selector):
    with pytest.raises(ct.SpecError, match="does not select a step"):
        select.require_selector(selector)


def test_a_numpy_integer_is_answered_with_an_int():
    with pytest.raises(ct.SpecError) as caught:
        select.require_selector(np.int64(500))
    assert caught.value.fix == "step=500"


@pytest.mark.parametrize("selector", ["latest", 0, 500, ct.best("loss")], ids=repr)
def test_legal_selectors_pass(selector):
    """Control."""
    assert select.require_selector(selector) is None


SPEC = ct.CheckpointSpec(directory="run", keep=ct.Best("loss", mode="max"), save=ct.OnImprovement("other", mode="min"))
PLAIN = ct.CheckpointSpec(directory="run")


def test_the_mode_of_a_metric_comes_from_the_spec():
    assert select.resolve_mode(SPEC, ct.best("loss")) == ct.best("loss", "max")
    assert select.resolve_mode(SPEC, ct.best("loss", "min")) == ct.best("loss", "min"), "an explicit mode wins"
    with pytest.raises(ct.SpecError, match="has no mode"):
        select.resolve_mode(PLAIN, ct.best("loss"))


def test_the_metric_of_keep_is_the_default():
    assert select.make_best_selector(SPEC) == ct.best("loss", "max")
    with pytest.raises(ct.SpecError, match="names no metric"):
        select.make_best_selector(PLAIN)

# SPDX-License-Identifier: Apache-2.0
"""Retention keeps what the spec wants and never deletes what the run needs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpttools as ct
from ckpttools.spec.retention import StepInfo, Union, decide_retention, rank_steps

NAN = math.nan


def infos(*losses, **changes):
    return [
        StepInfo(step=10 * n, sequence=n, saved_at=100.0 * n, metrics={} if loss is None else {"loss": loss}, **changes)
        for n, loss in enumerate(losses, start=1)
    ]


def kept(retention, steps):
    newest = max((step.sequence for step in steps), default=None)
    return [verdict.step.step for verdict in decide_retention(retention, steps, newest_verified=newest) if verdict.keep]


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        pytest.param(ct.Latest(3), [40, 50, 60], id="latest"),
        pytest.param(ct.Latest(1), [50, 60], id="never fewer than two"),
        pytest.param(ct.Best("loss", mode="min"), [20, 50, 60], id="best"),
        pytest.param(ct.Best("loss", mode="max"), [40, 50, 60], id="best upwards, NaN last"),
        pytest.param(ct.Best("other", mode="min"), [50, 60], id="a metric that nobody recorded"),
        pytest.param(ct.EveryNSteps(30), [30, 50, 60], id="every n steps"),
        pytest.param(ct.EveryNSeconds(250), [10, 40, 50, 60], id="every n seconds"),
        pytest.param(ct.Pinned((10, 20)), [10, 20, 50, 60], id="pinned by the spec"),
        pytest.param(ct.All(), [10, 20, 30, 40, 50, 60], id="all"),
        pytest.param(ct.Latest(2) | ct.Best("loss", mode="min") | ct.EveryNSteps(30), [20, 30, 50, 60], id="union"),
    ],
)
def test_retention_keeps(retention, expected):
    assert kept(retention, infos(0.5, 0.1, 0.3, 0.9, NAN, 0.2)) == expected


def test_after_a_rollback_the_latest_are_those_committed_last():
    steps = [StepInfo(step=step, sequence=n) for n, step in enumerate([60, 100, 70], start=1)]
    assert kept(ct.Latest(2), steps) == [100, 70]


def test_superseded_steps_do_not_compete_for_best():
    steps = [*infos(0.5, 0.4), StepInfo(step=30, sequence=3, metrics={"loss": 0.1}, superseded=True)]
    assert rank_steps(steps, "loss", "min")[0].step == 20


def test_every_verdict_has_a_reason():
    for verdict in decide_retention(ct.Latest(1), infos(1, 2, 3), newest_verified=3):
        assert verdict.reason


RETENTIONS = st.recursive(
    st.one_of(
        st.integers(1, 5).map(ct.Latest),
        st.sampled_from(["min", "max"]).map(lambda mode: ct.Best("loss", mode=mode)),
        st.integers(1, 50).map(ct.EveryNSteps),
        st.floats(1, 500).map(ct.EveryNSeconds),
        st.just(ct.Pinned()),
        st.just(ct.All()),
    ),
    lambda inner: st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
    max_leaves=4,
)


@given(
    RETENTIONS,
    st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1) | st.just(NAN), st.booleans(), st.booleans()), max_size=12),
    st.integers(0, 20),
)
def test_no_spec_can_delete_what_the_run_needs(retention, rows, verified):
    steps = [
        StepInfo(step=step, sequence=n, saved_at=n, metrics={"loss": loss}, pinned=pinned, superseded=superseded)
        for n, (step, loss, pinned, superseded) in enumerate(rows, start=1)
    ]
    newest = 1 + verified % len(steps) if steps else None
    verdicts = decide_retention(retention, steps, newest_verified=newest)
    keeps = {verdict.step.sequence for verdict in verdicts if verdict.keep}
    assert len(verdicts) == len(steps)
    assert len(keeps) >= min(2, len(steps))
    assert newest is None or newest in keeps
    assert keeps >= {step.sequence for step in steps if step.pinned}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: ct.Latest(0), id="keep nothing"),
        pytest.param(lambda: ct.Latest(-1), id="keep less than nothing"),
        pytest.param(lambda: ct.Best("loss", mode="low"), id="no direction"),
        pytest.param(lambda: ct.Best("loss", mode="min", n=True), id="a bool"),
        pytest.param(lambda: ct.Best(3, mode="min"), id="no name"),
        pytest.param(lambda: ct.EveryNSteps(0), id="every 0 steps"),
        pytest.param(lambda: ct.EveryNSeconds(-1), id="negative seconds"),
        pytest.param(lambda: ct.Pinned((0,)), id="step 0"),
        pytest.param(lambda: Union(), id="nothing combined"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_fix(build):
    with pytest.raises(ct.SpecError) as caught:
        build()
    assert caught.value.fix


def test_only_retention_values_combine():
    with pytest.raises(TypeError):
        ct.Latest(1) | ct.EverySteps(1)


def test_a_clock_set_back_does_not_end_the_trail():
    clocks = (1000.0, 2000.0, 9_000_000.0, 2500.0, 2600.0, 3600.0)
    steps = [StepInfo(step=n, sequence=n, saved_at=clock) for n, clock in enumerate(clocks, start=1)]
    assert set(ct.EveryNSeconds(1000).select_steps(steps)) == {1, 2, 3, 4, 6}


def left_at(base, *steps):
    """Ten live steps of which those after `base` are superseded, and then the given steps of the next branch."""
    old = [StepInfo(step=step, sequence=step // 10, superseded=step > base) for step in range(10, 101, 10)]
    return [*old, *(StepInfo(step=step, sequence=n) for n, step in enumerate(steps, start=11))]


@pytest.mark.parametrize(
    ("keep", "steps", "expected"),
    [
        pytest.param(ct.Latest(3), left_at(70, 71), [60, 70, 80, 90, 100, 71], id="live steps only count"),
        pytest.param(ct.Latest(1), left_at(70, 71), [70, 90, 100, 71], id="the base stays"),
        pytest.param(ct.Latest(1), left_at(70, 71, 72), [90, 100, 71, 72], id="until two steps follow it"),
        pytest.param(ct.Latest(2), left_at(70, 85, 95), [90, 100, 85, 95], id="passed by one step"),
        pytest.param(ct.Latest(2), left_at(70, 95, 99), [100, 95, 99], id="passed by two kept steps"),
        pytest.param(ct.Latest(2), left_at(70, 101, 102), [101, 102], id="all passed"),
        pytest.param(ct.EveryNSteps(50), left_at(70, 101, 102), [50, 101, 102], id="a multiple that was passed"),
        pytest.param(ct.Latest(2) | ct.Pinned((80,)), left_at(70, 101, 102), [80, 101, 102], id="pinned by the spec"),
        pytest.param(ct.All(), left_at(70, 101, 102), [*range(10, 101, 10), 101, 102], id="everything"),
    ],
)
def test_superseded_steps_are_counted_apart_and_expire_when_passed(keep, steps, expected):
    assert kept(keep, steps) == expected


def test_pinned_superseded_steps_stay():
    steps = [StepInfo(step=90, sequence=1, superseded=True, pinned=True), *infos(*[None] * 12)[8:]]
    assert 90 in kept(ct.Latest(2), steps)


def test_best_chooses_among_superseded_steps_that_were_not_passed():
    steps = [
        StepInfo(step=step, sequence=step, metrics={"loss": loss}, superseded=step > 1)
        for step, loss in enumerate([1.0, 0.1, 0.9, 0.8, 0.7], start=1)
    ]
    assert kept(ct.Best("loss", mode="min"), steps) == [1, 2, 4, 5]


def test_older_steps_of_a_resumed_branch_pass_nothing():
    """Steps 35 and 45 of the branch that is left now are not passed by 40 and 50, which were there before."""
    live = [StepInfo(step=step, sequence=n) for n, step in enumerate((30, 40, 50), start=1)]
    left = [StepInfo(step=step, sequence=n, superseded=True) for n, step in enumerate((35, 45), start=4)]
    first, second = StepInfo(step=60, sequence=6), StepInfo(step=70, sequence=7)
    assert kept(ct.Latest(3), [*live, *left, first]) == [40, 50, 35, 45, 60]
    assert kept(ct.Latest(3), [*live, *left, first, second]) == [50, 60, 70]

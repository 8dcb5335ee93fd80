# SPDX-License-Identifier: Apache-2.0
"""Triggers decide from a step, a clock and metrics, and remember in JSON what a resumed run needs."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpttools as ct
from ckpttools.spec.triggers import AllOf, AnyOf, StepContext


def moments(losses, seconds_per_step=1.0):
    for step, loss in enumerate(losses, start=1):
        yield StepContext(
            step=step, run_s=step * seconds_per_step, get_metric=lambda name, v=loss: v if name == "loss" else None
        )


def saved_steps(trigger, losses, *, memory=None, start=0, seconds_per_step=1.0):
    steps = []
    for moment in moments(losses, seconds_per_step):
        if moment.step <= start:
            continue
        memory = trigger.observe(moment, memory)
        if trigger.decide(moment, memory).save:
            memory = trigger.update_after_save(moment, memory)
            steps.append((moment.step, memory))
    return steps


def only_steps(pairs):
    return [step for step, _ in pairs]


NAN = math.nan


@pytest.mark.parametrize(
    ("trigger", "losses", "expected"),
    [
        pytest.param(ct.EverySteps(3), [0] * 7, [3, 6], id="every steps"),
        pytest.param(ct.EverySeconds(2.5), [0] * 7, [3, 6], id="every seconds since the last save"),
        pytest.param(ct.AtSteps((2, 5)), [0] * 7, [2, 5], id="at steps"),
        pytest.param(ct.OnImprovement("loss", mode="min"), [3, 2, 2, NAN, 1], [1, 2, 5], id="improvement"),
        pytest.param(ct.OnImprovement("loss", mode="max"), [3, 2, 4], [1, 3], id="improvement upwards"),
        pytest.param(ct.OnImprovement("loss", mode="min", min_delta=0.5), [3, 2.6, 2.5], [1, 3], id="by a margin"),
        pytest.param(ct.OnImprovement("other", mode="min"), [3, 2], [], id="a metric that is not there"),
        pytest.param(ct.OnImprovement("loss", mode="min"), [NAN, NAN], [], id="NaN never improves"),
        pytest.param(ct.EverySteps(4) | ct.AtSteps((1,)), [0] * 8, [1, 4, 8], id="either"),
        pytest.param(ct.EverySteps(2) & ct.OnImprovement("loss", mode="min"), [5, 6, 4, 5, 9, 7], [2, 4], id="both"),
    ],
)
def test_triggers_save_at(trigger, losses, expected):
    assert only_steps(saved_steps(trigger, losses)) == expected


def test_the_clock_counts_from_any_save():
    trigger = ct.EverySeconds(3) | ct.AtSteps((2,))
    assert only_steps(saved_steps(trigger, [0] * 8)) == [2, 5, 8]


def test_adaptive_saves_more_often_while_the_loss_is_unstable():
    trigger = ct.Adaptive("loss", base_steps=8, min_steps=2, max_steps=32, window=4)
    calm, wild = [1.0] * 64, [1.0, 9.0] * 32
    assert len(saved_steps(trigger, wild)) > 2 * len(saved_steps(trigger, calm))
    gaps = [
        b - a for a, b in zip(only_steps(saved_steps(trigger, wild))[:-1], only_steps(saved_steps(trigger, wild))[1:])
    ]
    assert min(gaps) >= 2
    assert len(saved_steps(trigger, [NAN] * 64)) == len(saved_steps(trigger, wild))


TRIGGERS = st.recursive(
    st.one_of(
        st.integers(1, 9).map(ct.EverySteps),
        st.floats(0.5, 9).map(ct.EverySeconds),
        st.sets(st.integers(1, 40), min_size=1).map(lambda steps: ct.AtSteps(tuple(sorted(steps)))),
        st.sampled_from(["min", "max"]).map(lambda mode: ct.OnImprovement("loss", mode=mode)),
        st.integers(2, 6).map(
            lambda window: ct.Adaptive("loss", base_steps=4, min_steps=2, max_steps=16, window=window)
        ),
    ),
    lambda inner: st.tuples(inner, inner).flatmap(lambda pair: st.sampled_from([pair[0] | pair[1], pair[0] & pair[1]])),
    max_leaves=4,
)


@given(TRIGGERS, st.lists(st.floats(0, 9) | st.just(NAN), min_size=20, max_size=40), st.integers(0, 100))
def test_a_resumed_run_decides_as_an_uninterrupted_one(trigger, losses, pick):
    whole = saved_steps(trigger, losses)
    if not whole:
        return
    step, memory = whole[pick % len(whole)]
    memory = json.loads(json.dumps(memory))
    resumed = saved_steps(trigger, losses, memory=memory, start=step)
    assert only_steps(resumed) == [later for later in only_steps(whole) if later > step]


def test_combinations_are_flat_and_compare_equal():
    a, b, c = ct.EverySteps(1), ct.EverySteps(2), ct.EverySteps(3)
    assert (a | b | c) == AnyOf(a, b, c)
    assert (a & b & c) == AllOf(a, b, c)
    assert hash(a | b) == hash(AnyOf(a, b))
    assert (a | b).get_metric_names() == frozenset()


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: ct.EverySteps(0), id="interval of 0"),
        pytest.param(lambda: ct.EverySteps(True), id="a bool"),
        pytest.param(lambda: ct.EverySteps(2.0), id="a float"),
        pytest.param(lambda: ct.EverySeconds(0), id="0 seconds"),
        pytest.param(lambda: ct.EverySeconds(NAN), id="NaN seconds"),
        pytest.param(lambda: ct.AtSteps(()), id="no steps"),
        pytest.param(lambda: ct.AtSteps((3, 1)), id="unordered steps"),
        pytest.param(lambda: ct.OnImprovement("", mode="min"), id="no metric"),
        pytest.param(lambda: ct.OnImprovement("loss", mode="low"), id="no direction"),
        pytest.param(lambda: ct.OnImprovement("loss", mode="min", min_delta=-1), id="a negative margin"),
        pytest.param(lambda: ct.Adaptive("loss", base_steps=1), id="base below min"),
        pytest.param(lambda: ct.Adaptive("loss", window=1), id="a window of 1"),
        pytest.param(lambda: AnyOf(), id="nothing combined"),
        pytest.param(lambda: AllOf(3), id="a number combined"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_fix(build):
    with pytest.raises(ct.SpecError) as caught:
        build()
    assert caught.value.what
    assert caught.value.fix


def test_only_triggers_combine():
    with pytest.raises(TypeError):
        ct.EverySteps(1) | 3
    with pytest.raises(TypeError):
        ct.EverySteps(1) & ct.Latest(1)

# SPDX-License-Identifier: Apache-2.0
"""Memories are stored under the description of their trigger, and only that trigger reads them."""

import json

import pytest

import ckpttools as ct
from ckpttools.spec.trigger_memory import decode_memory, encode_memory
from ckpttools.spec.triggers import Decision
from tests.ckpttools.spec.test_triggers import moments

EACH = [
    ct.EverySteps(2),
    ct.EverySeconds(1.0),
    ct.OnImprovement("loss", mode="min"),
    ct.Adaptive("loss"),
    ct.EverySteps(3) | ct.OnImprovement("loss", mode="max"),
    ct.EverySeconds(1.0) & ct.Adaptive("loss"),
    (ct.EverySteps(3) | ct.EverySeconds(2.0)) & ct.OnImprovement("loss", mode="min"),
]


def memory_after(trigger, losses):
    memory = None
    for moment in moments(losses):
        memory = trigger.update_after_save(moment, trigger.observe(moment, memory))
    return memory


@pytest.mark.parametrize("before", EACH, ids=str)
def test_a_written_memory_is_read_by_its_own_trigger_only(before):
    memory = memory_after(before, [3.0, 2.0, 1.0])
    stored = json.loads(json.dumps(encode_memory(before, memory)))
    moment = next(moments([0.5]))
    again = decode_memory(before, stored)
    assert before.decide(moment, again) == before.decide(moment, memory)
    for after in EACH:
        own = decode_memory(after, stored)
        after.decide(moment, after.update_after_save(moment, after.observe(moment, own)))
        if before in (ct.EverySeconds(1.0), ct.Adaptive("loss")) and after == EACH[2]:
            assert own is None


def test_a_trigger_keeps_its_memory_when_the_spec_changes():
    best = ct.OnImprovement("loss", mode="min")
    stored = encode_memory(ct.EverySteps(2) | best, memory_after(ct.EverySteps(2) | best, [3.0, 1.0]))
    assert decode_memory(best, stored) == 1.0
    assert decode_memory(ct.AtSteps((5,)) | (ct.EverySteps(9) & best), stored) == [None, [None, 1.0]]
    assert decode_memory(ct.OnImprovement("loss", mode="max"), stored) is None


@pytest.mark.parametrize("hostile", [5, "x", [], {"a": 1}, None, [[[]]]])
def test_a_memory_of_a_strange_form_is_forgotten(hostile):
    moment = next(moments([0.5]))
    for trigger in EACH:
        for stored in (hostile, dict.fromkeys(encode_memory(trigger, memory_after(trigger, [1.0])), hostile)):
            trigger.decide(moment, trigger.observe(moment, decode_memory(trigger, stored)))


def test_a_user_defined_trigger_needs_no_dataclass():
    class Always(ct.Trigger):
        def decide(self, moment, memory):
            return Decision(True, "always")

    assert decode_memory(Always(), encode_memory(Always(), [1, 2])) == [1, 2]

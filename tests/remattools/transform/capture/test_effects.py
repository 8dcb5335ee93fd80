# SPDX-License-Identifier: Apache-2.0
"""Changes of a call are recorded on the copies and replayed on the caller's objects."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from remattools.transform.capture import effects
from remattools.transform.capture.rebuild import rebuild
from remattools.transform.capture.walk import capture


def run_on_copy(fn, *args):
    """Call `fn` on copies of `args`, and replay what it did."""
    captured, objects = capture(args), []
    copies = rebuild(captured.spec, captured.leaves, objects)
    before = effects.snapshot(objects)
    leaves, call_effects = effects.collect_effects(objects, before, fn(*copies))
    return call_effects, lambda: effects.replay(call_effects, leaves, captured.objects)


def test_only_changed_objects_have_edits():
    linear, log = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), []

    def double_bias(linear, log):
        linear.bias[...] = linear.bias[...] + 2.0

    recorded, replay = run_on_copy(double_bias, linear, log)
    assert len(recorded.edits) == 1
    np.testing.assert_array_equal(linear.bias[...], 0.0)
    replay()
    np.testing.assert_array_equal(linear.bias[...], 2.0)
    assert run_on_copy(lambda linear, log: linear, linear, log)[0].edits == (), "control"


def test_a_returned_argument_is_the_callers_object():
    cache = {"k": jnp.ones(2)}

    def extend(cache):
        cache["v"] = jnp.zeros(2)
        return cache

    _, replay = run_on_copy(extend, cache)
    assert replay() is cache
    assert list(cache) == ["k", "v"]


def test_deleted_attributes_are_deleted():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    linear.note = "x"

    def forget(linear):
        del linear.note

    run_on_copy(forget, linear)[1]()
    assert not hasattr(linear, "note")


def test_restore_objects_undoes_what_the_block_wrote():
    log, table = [1], {"a": 1}
    with effects.restore_objects([log, table]):
        log.append(2)
        table.clear()
        assert log == [1, 2]
    assert (log, table) == ([1], {"a": 1})

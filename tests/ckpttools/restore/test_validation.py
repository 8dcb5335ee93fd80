# SPDX-License-Identifier: Apache-2.0
"""`ct.open(spec, validate=fn)`: a restored model computes what the saved one did; the live one is left alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from tests.ckpttools.behaviour.examples import Net, leaves, make_state, train_step

BATCH = jnp.ones((2, 8))


def outputs(state):
    # Dropout and running averages: the function changes the copy it is given.
    return state["model"](BATCH)


def spec_for(directory):
    return ct.CheckpointSpec(directory=directory, keep=ct.All())


def test_a_validated_run_resumes_with_the_same_bits(tmp_path):
    ends = []
    for validate in (None, outputs):
        directory = tmp_path / str(validate is None)
        for total in (2, 4):
            state = make_state()
            with ct.open(spec_for(directory), validate=validate) as ckpt:
                ckpt.restore(state)
                for step in ckpt.steps(total):
                    train_step(state)
                    ckpt.step(step, state)
        ends.append(leaves(state))
    assert ends[0] == ends[1], "validation must not touch the live state"


def test_a_step_whose_model_computes_something_else_is_rejected(tmp_path):
    state = {"model": Net(nnx.Rngs(0))}
    with ct.open(spec_for(tmp_path), validate=outputs) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
    other = {"model": Net(nnx.Rngs(1))}
    before = leaves(other)
    with (
        ct.open(spec_for(tmp_path), validate=lambda copy: outputs(copy) * 1.01) as ckpt,
        pytest.raises(ct.NoIntactStepError, match="does not compute what it did") as caught,
    ):
        ckpt.restore(other)
    assert leaves(other) == before
    assert {each.verdict for each in caught.value.report.candidates} == {"rejected"}
    assert "undo the change in the validation function" in caught.value.fix
    assert "repair" not in caught.value.fix, "there is nothing to repair"
    with (
        ct.open(spec_for(tmp_path), validate=lambda copy: outputs(copy)[:1]) as ckpt,
        pytest.raises(ct.StepRejectedError, match="step 2 fails validation") as alone,
    ):
        ckpt.restore(other, step=2)
    assert "validate=" in alone.value.fix
    assert ct.verify(tmp_path).ok
    with ct.open(spec_for(tmp_path), validate=outputs) as ckpt:
        assert ckpt.restore(other).step == 2


def test_a_rejected_step_stays_until_the_run_moves_on(tmp_path):
    def check(copy, spoiled=3):
        w = copy["params"]["w"]
        return jnp.where(w[0] == spoiled, w + 1, w)

    def state_at(step):
        return {"params": {"w": jnp.full(4, float(step))}}

    with ct.open(spec_for(tmp_path), validate=lambda copy: check(copy, None)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state_at(step))
    with ct.open(spec_for(tmp_path), validate=check) as ckpt:
        report = ckpt.restore(state_at(0))
        assert report.step == 2
        (rejected,) = report.rejected
        assert (rejected.step, rejected.verdict, rejected.moved_to) == (3, "rejected", None)
        assert report.damaged == 0
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.restore(state_at(0)).step == 3, "the control: nothing was moved"
    with ct.open(spec_for(tmp_path), validate=check) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.save(4, state_at(4))
    assert [(row.step, row.state) for row in ct.ls(tmp_path)][-2:] == [(3, "superseded"), (4, "committed")]
    assert ct.verify(tmp_path).ok


def test_outputs_that_are_not_finite_fail_save_and_restore(tmp_path):
    state = {"model": Net(nnx.Rngs(0))}
    with ct.open(spec_for(tmp_path), validate=lambda copy: outputs(copy) * jnp.nan) as ckpt:
        with pytest.raises(ct.ValidationError, match="not finite"):
            ckpt.save(1, state)
        assert ckpt.latest_step() is None
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, state)
    with (
        ct.open(spec_for(tmp_path), validate=lambda copy: outputs(copy) * jnp.nan) as ckpt,
        pytest.raises(ct.NoIntactStepError, match="not finite"),
    ):
        ckpt.restore(state)


def test_outputs_that_are_too_large_to_store_are_refused(tmp_path):
    with (
        ct.open(spec_for(tmp_path), validate=lambda _copy: np.zeros(1 << 20)) as ckpt,
        pytest.raises(ct.ValidationError, match="8,388,608 bytes"),
    ):
        ckpt.save(1, {"model": Net(nnx.Rngs(0))})


def test_a_pytree_and_an_iterator_can_be_validated_together(tmp_path):
    state = {"params": {"w": jnp.arange(3.0)}, "data": make_state()["data"]}
    seen = []

    def check(copy):
        seen.append(sorted(copy))
        return copy["params"]["w"].sum()

    with ct.open(spec_for(tmp_path), validate=check) as ckpt:
        ckpt.save(1, state)
        assert ckpt.restore(state).step == 1
    assert seen == [["params"], ["params"]]


def spoil(copy):
    """Compute a sum, and write into every array of the copy that can be written to."""
    total = copy["array"].sum() + copy["model"].offset[...].sum()
    copy["array"][:] = 7
    copy["model"].offset.get_raw_value()[:] = 7
    copy["model"].table[:] = 7
    if isinstance(copy["raw"], bytearray):  # A restore returns bytes.
        copy["raw"][:] = b"\7\7"
    return total


class Offset(nnx.Module):
    def __init__(self, value):
        self.offset = nnx.Variable(np.full(3, value))
        self.table = nnx.data(np.full(2, value))


def make_numpy_state(value):
    return {"array": np.full(3, value), "model": Offset(value), "raw": bytearray(b"ab")}


def list_numpy_values(state):
    arrays = state["array"], state["model"].offset[...], state["model"].table
    return [array.tolist() for array in arrays], bytes(state["raw"])


def test_a_function_that_writes_into_its_copy_changes_no_live_array(tmp_path):
    state = make_numpy_state(1.0)
    with ct.open(spec_for(tmp_path), validate=spoil) as ckpt:
        ckpt.save(1, state)
        assert list_numpy_values(state) == list_numpy_values(make_numpy_state(1.0))
    fresh = make_numpy_state(0.0)
    with ct.open(spec_for(tmp_path), validate=spoil) as ckpt:
        restored = ckpt.restore(fresh).state
    assert list_numpy_values(restored) == list_numpy_values(make_numpy_state(1.0))


def test_leaves_that_keep_their_value_are_copied_for_the_function(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, make_numpy_state(1.0))
    fresh = make_numpy_state(0.0)
    with ct.open(spec_for(tmp_path), validate=spoil) as ckpt:
        restored = ckpt.restore(fresh, surgery=[ct.Reinit("array.**"), ct.Reinit("model.offset")]).state
    assert restored["array"].tolist() == restored["model"].offset[...].tolist() == [0.0, 0.0, 0.0]

# SPDX-License-Identifier: Apache-2.0
"""A restore that stops half way leaves the live objects as they were, whatever stopped it and wherever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree import replacing
from tests.ckpttools.behaviour.examples import Batches, leaves, make_state, train_step

MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
SHARDED = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("x"))


class Odd(nnx.Module):
    """Arrays that are not in variables: attributes, entries of a dict, a list and a tuple; large, sharded, weak."""

    def __init__(self, seed):
        self.raw = nnx.data(jnp.full(50_000, seed, jnp.float32))
        self.parts = nnx.data({"a": jnp.full(20_000, seed, jnp.bfloat16), "v": nnx.Param(jnp.full(3, seed))})
        self.entries = nnx.List([jnp.full(4, seed), nnx.Param(jnp.full(30_000, seed))])
        self.pair = nnx.data((jnp.full(2, seed), nnx.Param(jnp.full(2, seed)), {"deep": (jnp.full(1, seed),)}))
        self.sharded = nnx.Param(jax.device_put(jnp.full(80_000, seed, jnp.float32), SHARDED))
        self.tied = nnx.Param(jax.device_put(jnp.full(40_000, seed), jax.devices()[3]))
        self.weak = nnx.Variable(jnp.asarray(float(seed)))
        self.tree = nnx.Variable({"big": jnp.full(25_000, seed), "count": seed})


def make(seed):
    state = make_state(seed)
    return {**state, "odd": Odd(seed), "loose": {"iterator": Batches(seed), "odd": Odd(seed + 1)}}


def describe(state):
    def form(value):
        return (
            (value.sharding, value.committed, getattr(value, "weak_type", False))
            if isinstance(value, jax.Array)
            else None
        )

    forms = [form(leaf) for item in ("model", "odd") for leaf in jax.tree.leaves(nnx.state(state[item]))]
    return leaves(state), forms


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("replacing")
    with ct.open(ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, make(5))
    return directory


@pytest.fixture
def begun():
    state = make(7)
    for data in (state["data"], state["loose"]["iterator"]):
        next(data)
    return state


class Flaky:
    """`jax.device_put` that fails at one call, or from it on."""

    def __init__(self, at, error, *, forever=False):
        self.calls, self.at, self.error, self.forever = 0, at, error, forever
        self.real = jax.device_put

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.at or (self.forever and self.calls > self.at):
            raise self.error
        return self.real(*args, **options)


def count_calls(directory, state, monkeypatch):
    with monkeypatch.context() as patch:
        counting = Flaky(0, None)
        patch.setattr(jax, "device_put", counting)
        ct.load(directory, state)
    return counting.calls


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_failure_at_any_leaf_puts_every_object_back(directory, begun, error, monkeypatch):
    calls = count_calls(directory, make(6), monkeypatch)
    assert calls > 40
    before = describe(begun)
    for at in range(1, calls + 1):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_put", Flaky(at, error))
            expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ct.PlacementError
            with pytest.raises(expected) as caught:
                ct.load(directory, begun)
        if expected is ct.PlacementError:
            (name,) = caught.value.leaves
            assert name in before[0]
            assert name in caught.value.what
        assert describe(begun) == before, at
    train_step(begun)


def test_without_putting_back_a_failure_leaves_a_mixture(directory, monkeypatch):
    state = make(6)
    before = leaves(state)
    monkeypatch.setattr(replacing.Replacements, "put_back", lambda self: ((), ()))
    monkeypatch.setattr(jax, "device_put", Flaky(20, RuntimeError("lost")))
    with pytest.raises(ct.PlacementError):
        ct.load(directory, state)
    assert leaves(state) != before


def test_a_restore_of_arrays_outside_variables_fills_them(directory):
    state = make(6)
    ct.load(directory, state)
    assert leaves(state) == leaves(make(5))


def test_a_dead_device_loses_no_value(directory, monkeypatch):
    state = make(6)
    before = leaves(state)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", Flaky(40, RuntimeError("device lost"), forever=True))
        with pytest.raises(ct.PlacementError, match=r"could not be put back after: .* device lost") as caught:
            ct.load(directory, state)
    assert "as host arrays" in caught.value.why
    assert leaves(state) == before


def test_an_interrupt_while_putting_back_is_raised_at_the_end(directory, monkeypatch):
    state = make(6)
    before = leaves(state)
    real, interrupted = replacing._put_back, []

    def interrupt_once(replaced):
        done = real(replaced)
        if len(interrupted) < 3:
            interrupted.append(replaced.name)
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(replacing, "_put_back", interrupt_once)
    monkeypatch.setattr(jax, "device_put", Flaky(30, RuntimeError("lost")))
    with pytest.raises(KeyboardInterrupt):
        ct.load(directory, state)
    assert len(interrupted) == 3
    assert leaves(state) == before


def test_an_iterator_that_accepts_no_state_any_more_is_named(directory, monkeypatch):
    state = make(6)
    model = leaves({"model": state["model"]})

    def refuse(state):
        raise ValueError("closed")

    state["data"].set_state = refuse
    with pytest.raises(ValueError, match="closed") as caught:
        ct.load(directory, state)
    assert "data refused its state" in caught.value.__notes__[0]
    assert leaves({"model": state["model"]}) == model


def test_a_donated_state_is_restored_and_stays_donated_after_failure(directory, monkeypatch):
    state = make(6)
    kernel = state["model"].layers[0].kernel
    jax.jit(lambda x: x + 1, donate_argnums=0)(kernel.get_raw_value())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", Flaky(30, RuntimeError("lost")))
        with pytest.raises(ct.PlacementError):
            ct.load(directory, state)
    assert kernel.get_raw_value().is_deleted()
    ct.load(directory, state)
    assert leaves(state) == leaves(make(5))


def test_old_arrays_that_can_return_hold_no_device_memory():
    variables = [nnx.Param(jnp.full(100_000, n, jnp.float32)) for n in range(4)]
    replacements = replacing.Replacements()
    others = {id(array) for array in jax.live_arrays()} - {id(each.get_raw_value()) for each in variables}

    def held():
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in others)

    for variable in variables:
        replacements.set_variable("w", variable, jnp.zeros(100_000))
        assert held() <= 4 * 400_000
    assert replacements.put_back() == ((), ())
    assert [float(variable[0]) for variable in variables] == [0, 1, 2, 3]


def test_a_validation_copy_in_a_container_is_not_live(tmp_path):
    saved, live = {"nets": {"a": Odd(1)}}, {"nets": {"a": Odd(2)}}
    accepts = [True]
    spec = ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))
    validate = lambda state: state["nets"]["a"].sharded[...] if accepts[0] else jnp.full(1, jnp.nan)  # noqa: E731
    with ct.open(spec, validate=validate) as ckpt:
        ckpt.save(1, saved)
    before = leaves(live)
    accepts[0] = False
    with ct.open(spec, validate=validate) as ckpt, pytest.raises(ct.NoIntactStepError):
        ckpt.restore(live)
    assert leaves(live) == before
    assert np.asarray(live["nets"]["a"].raw)[0] == 2

# SPDX-License-Identifier: Apache-2.0
"""The guide's functions, each with the fault of the guide's own that it does not have."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools import functional
from tests.ckpttools.behaviour.examples import Net, leaves
from tests.ckpttools.behaviour.faults import flip_bit_of

CONFIG = types.SimpleNamespace(learning_rate=1e-2)
X = jnp.arange(16.0).reshape(2, 8) / 16


class Plain(nnx.Module):
    def __init__(self, config=CONFIG, *, rngs, width=64):
        del config
        self.first, self.second = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@nnx.jit
def update(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)


def plain(seed):
    return Plain(rngs=nnx.Rngs(seed))


def bits(model):
    return leaves({"model": model})


def saved_run(directory, *steps):
    """A run with another model at each step."""
    manager, _ = functional.setup_checkpoint_manager(directory)
    models = {step: plain(step) for step in steps}
    for step, model in models.items():
        assert functional.save_checkpoint(manager, model, step) is manager
    manager.close()
    return models


def kernel(model):
    return np.asarray(model.first.kernel[...]).tobytes()


def test_a_saved_step_is_on_disk_and_restores_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = saved_run("run", 1, 2)
    manager, directory = functional.setup_checkpoint_manager("run")
    assert directory == str(tmp_path / "run")
    template = plain(0)
    assert functional.load_checkpoint(manager, template) == (template, 2)
    assert bits(template) == bits(models[2])
    assert functional.load_checkpoint(manager, template, step=1) == (template, 1)
    assert bits(template) == bits(models[1])
    functional.save_checkpoint(manager, template, 3)
    assert ct.verify("run", 3).ok


def test_an_empty_run_gives_none(tmp_path):
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    assert functional.load_checkpoint(manager, plain(0)) == (None, None)
    assert functional.load_sharded_checkpoint(manager, plain(0)) == (None, None)
    optimizer = nnx.Optimizer(plain(0), optax.sgd(0.1), wrt=nnx.Param)
    assert functional.load_model_and_optimizer(manager, plain(0), optimizer) == (None, None, None)
    assert functional.recover_from_corruption(tmp_path, plain(0)) == (None, None)


def test_another_structure_raises_and_changes_nothing(tmp_path):
    saved_run(tmp_path, 1)
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    template = Plain(rngs=nnx.Rngs(0), width=4)
    before = bits(template)
    with pytest.raises(ct.StructureError, match=r"model\.first\.kernel: float32\[8,64\] on disk, float32\[8,4\] here"):
        functional.load_checkpoint(manager, template)
    with pytest.raises(ct.StructureError):
        functional.recover_from_corruption(tmp_path, template)
    assert bits(template) == before


def test_a_flipped_bit_is_passed_over_with_a_warning(tmp_path):
    models = saved_run(tmp_path, 1, 2, 3)
    flip_bit_of(tmp_path / "3", kernel(models[3]))
    with pytest.warns(ct.CheckpointWarning, match=r"step 3: corrupt"):
        model, step = functional.recover_from_corruption(tmp_path, plain(0))
    assert step == 2
    assert bits(model) == bits(models[2])


def test_a_run_without_an_intact_step_never_starts_afresh(tmp_path):
    models = saved_run(tmp_path, 1)
    flip_bit_of(tmp_path / "1", kernel(models[1]))
    with pytest.raises(ct.NoIntactStepError):
        functional.recover_from_corruption(tmp_path, plain(0))
    with pytest.raises(ct.NoIntactStepError):
        functional.load_checkpoint(functional.setup_checkpoint_manager(tmp_path)[0], plain(0))


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path):
    def training(directory, num_steps, save_every=2):
        model, optimizer, start_step, manager = functional.setup_training_from_checkpoint(
            directory, CONFIG, create_model=Plain
        )
        for step in range(start_step, num_steps):
            update(model, optimizer, X + step)
            if (step + 1) % save_every == 0:
                functional.save_model_and_optimizer(manager, model, optimizer, step + 1)
        manager.close()
        return leaves({"model": model, "optimizer": optimizer}), start_step

    unbroken, _ = training(tmp_path / "one", 8)
    training(tmp_path / "two", 5)  # The fifth update is lost: it was not saved.
    resumed, start_step = training(tmp_path / "two", 8)
    assert start_step == 4
    assert resumed == unbroken


def test_the_configuration_may_be_a_dict(tmp_path):
    made = functional.setup_training_from_checkpoint(tmp_path, {"learning_rate": 0.25}, create_model=Plain)
    made[1].update(made[0], jax.tree.map(jnp.ones_like, nnx.state(made[0], nnx.Param)))
    # The first step of Adam is as long as its learning rate.
    np.testing.assert_allclose(made[0].first.bias[...], -0.25, rtol=1e-5)


def test_a_custom_optimizer_is_used(tmp_path):
    made = functional.setup_training_from_checkpoint(
        tmp_path,
        None,
        create_model=lambda config, rngs: Plain(rngs=rngs),
        create_optimizer=lambda model, config: nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param),
    )
    assert jax.tree.leaves(nnx.state(made[1], nnx.optimizer.OptState)) == [0]


def test_validation_leaves_the_live_model_alone(tmp_path):
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    model = Net(nnx.Rngs(0, dropout=1))
    before = bits(model)
    model(X)
    assert bits(model) != before, "control: a call moves the averages and the random streams"
    before = bits(model)
    assert functional.save_and_validate_checkpoint(manager, model, 1, X) is True
    assert bits(model) == before


def test_validation_fails_on_nan(tmp_path):
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    model = plain(0)
    model.second.bias[...] = model.second.bias[...].at[0].set(jnp.nan)
    with pytest.warns(ct.CheckpointWarning, match="not finite"):
        assert functional.save_and_validate_checkpoint(manager, model, 1, X) is False


def test_validation_reads_from_the_disk(tmp_path, monkeypatch):
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    model = plain(0)
    assert functional.save_and_validate_checkpoint(manager, model, 1, X)
    other = plain(1)  # Step 1 is saved already, so the file holds the first model.
    with pytest.warns(ct.CheckpointWarning, match="not the same"):
        assert functional.save_and_validate_checkpoint(manager, other, 1, X) is False
    flip_bit_of(tmp_path / "1", kernel(model))
    with pytest.warns(ct.CheckpointWarning, match="corrupt"):
        assert functional.save_and_validate_checkpoint(manager, model, 1, X) is False


def test_sharded_arrays_are_restored_with_the_templates_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("x"))
    model, template = plain(0), plain(1)
    model.first.kernel[...] = jax.device_put(model.first.kernel[...], sharded)
    template.second.kernel[...] = jax.device_put(template.second.kernel[...], sharded)
    manager, _ = functional.setup_checkpoint_manager(tmp_path)
    assert functional.save_sharded_checkpoint(manager, model, 1) is manager
    assert model.first.kernel[...].sharding == sharded
    assert functional.load_sharded_checkpoint(manager, template) == (template, 1)
    assert bits(template) == bits(model)
    assert template.second.kernel[...].sharding == sharded
    assert len(template.first.kernel[...].sharding.device_set) == 1
    with pytest.raises(ct.SpecError, match="num_shards=0"):
        functional.save_sharded_checkpoint(manager, model, 2, num_shards=0)


def test_a_spec_says_what_is_kept(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path / "few", keep=ct.Latest(2))
    manager, directory = functional.setup_checkpoint_manager(spec)
    everything, _ = functional.setup_checkpoint_manager(tmp_path / "all")
    for step in range(1, 5):
        functional.save_checkpoint(manager, {"w": jnp.ones(2)}, step)
        functional.save_checkpoint(everything, {"w": jnp.ones(2)}, step)
    assert directory == str(tmp_path / "few")
    assert manager.all_steps() == [3, 4]
    assert everything.all_steps() == [1, 2, 3, 4], "control"

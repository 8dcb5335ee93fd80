# SPDX-License-Identifier: Apache-2.0
"""tunix's manager on a spec, with an imitation of its trainer; `tests/wild` runs the original."""

import functools
import os
import signal
import types

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves
from tests.ckpttools.integrations.test_trainers import spec_of


@functools.partial(nnx.jit, static_argnums=2)
def imitated_step(model, optimizer, kind):
    loss, grads = nnx.value_and_grad(
        lambda model: jnp.mean((model(jnp.ones((1, 4))) - 1) ** 2), argnums=nnx.DiffState(0, kind)
    )(model)
    optimizer.update(model, grads)
    return loss


class ImitatedTrainer:
    """The part of tunix's trainer that deals with checkpoints, in the order of its calls."""

    def __init__(self, model, transform, config, lora=False):
        self.model, self.config, self._lora = model, config, lora
        self.optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam if lora else nnx.Param)
        self.checkpoint_manager = types.SimpleNamespace(close=lambda: None)
        self.train_steps, self.metadata = self.checkpoint_manager.maybe_restore(
            self.model, self.optimizer, restore_only_lora_params=lora
        )
        self.loss = None

    def train(self, total_steps):
        while self.train_steps < total_steps:
            self.one_step()
        manager = self.checkpoint_manager
        if manager.latest_step() is None or manager.latest_step() < self.train_steps:
            manager.save(self.train_steps, self.model, self.optimizer, save_only_lora_params=self._lora, force=True)
        manager.close()

    def one_step(self):
        self.loss = imitated_step(self.model, self.optimizer, nnx.LoRAParam if self._lora else nnx.Param)
        self.train_steps += 1
        self.saved = self.checkpoint_manager.save(
            self.train_steps,
            self.model,
            self.optimizer,
            save_only_lora_params=self._lora,
            custom_metadata={"role": "actor", "step": self.train_steps},
        )


def make_trainer(spec, *, lora=False, seed=0, root=None, **more):
    rngs = nnx.Rngs(seed)
    base = nnx.Linear(4, 4, rngs=rngs)
    model = nnx.LoRA(4, 2, 4, base_module=base, rngs=rngs) if lora else base
    config = types.SimpleNamespace(checkpoint_root_directory=root)
    return ct.peft_trainer(ImitatedTrainer, spec, **more)(model, optax.adam(0.1), config, lora)


def everything(trainer):
    return leaves({"model": trainer.model, "optimizer": trainer.optimizer})


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_peft_trainer_resumes_with_the_same_bits(tmp_path, lora):
    unbroken = make_trainer(spec_of(tmp_path / "one"), lora=lora)
    unbroken.train(7)
    make_trainer(spec_of(tmp_path / "two"), lora=lora).train(4)
    resumed = make_trainer(spec_of(tmp_path / "two"), lora=lora)
    assert (resumed.train_steps, isinstance(resumed, ImitatedTrainer)) == (4, True)
    resumed.train(7)
    assert everything(resumed) == everything(unbroken)
    stored = {leaf.name for leaf in ct.show(tmp_path / "two").leaves}
    assert ("model_params.kernel" in stored, "model_params.lora_a" in stored) == (not lora, lora)


def test_peft_trainer_keeps_the_trainers_metadata(tmp_path):
    trainer = make_trainer(spec_of(tmp_path, save=ct.EverySteps(1)))
    assert trainer.metadata == {}
    trainer.train(2)
    assert make_trainer(spec_of(tmp_path)).metadata == {"role": "actor", "step": 2}


def test_peft_trainer_saves_when_the_spec_says_so(tmp_path):
    trainer = make_trainer(
        spec_of(tmp_path, save=ct.OnImprovement("loss", mode="max")), metrics=lambda trainer: {"loss": trainer.loss}
    )
    trainer.one_step()
    assert trainer.saved
    trainer.one_step()
    assert not trainer.saved, "control: the loss falls, which is no improvement here"
    trainer.train(3)
    assert [step.step for step in ct.ls(tmp_path)] == [1, 3]


def test_a_spec_that_uses_metrics_needs_a_metrics_function(tmp_path):
    for fields in ({"save": ct.OnImprovement("loss", mode="min")}, {"keep": ct.Best("loss", mode="min")}):
        with pytest.raises(ct.SpecError, match="uses loss"):
            ct.peft_trainer(ImitatedTrainer, spec_of(tmp_path, **fields))


def test_a_trainer_with_its_own_directory_is_refused(tmp_path):
    with pytest.raises(ct.SpecError, match="checkpoint_root_directory='elsewhere'"):
        make_trainer(spec_of(tmp_path), root="elsewhere")


def test_a_model_that_does_not_fit_raises(tmp_path):
    make_trainer(spec_of(tmp_path)).train(1)
    with pytest.raises(ct.StructureError, match="model_params"):
        make_trainer(spec_of(tmp_path), lora=True)


def test_a_signal_is_raised_again_after_the_save(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append([step.step for step in ct.ls(tmp_path)]))
    try:
        trainer = make_trainer(spec_of(tmp_path))
        trainer.one_step()
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [], "control: it is held back until the step is complete"
        trainer.one_step()
        assert seen == [[2]]
        assert "SIGTERM" in ct.ls(tmp_path)[0].reason
    finally:
        signal.signal(signal.SIGTERM, before)

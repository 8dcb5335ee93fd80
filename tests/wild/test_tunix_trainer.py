# SPDX-License-Identifier: Apache-2.0
"""google-tunix's `PeftTrainer`, unedited, on a spec: trained, killed, resumed."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from tunix.sft.peft_trainer import PeftTrainer

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves
from tests.wild.peft_run import batches, make_trainer, spec_of

pytestmark = pytest.mark.wild
ROOT = pathlib.Path(__file__).parents[2]


def ours(folder, steps, *, lora=False, **more):
    return make_trainer(ct.peft_trainer(PeftTrainer, spec_of(folder), **more), steps=steps, lora=lora)


def everything(trainer):
    return leaves({"model": trainer.model, "optimizer": trainer.optimizer})


def run_until(folder, steps, kind, *, kill_at, number):
    """Train in a process of its own and send it a signal when it begins the update after step `kill_at`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.wild.peft_run", str(folder), str(steps), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for line in process.stdout:
        if line.strip() == str(kill_at):
            process.send_signal(number)
    process.stdout.close()
    return process.wait(120)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trained_killed_and_resumed_with_the_same_bits(tmp_path, kind):
    lora = kind == "lora"
    unbroken = make_trainer(PeftTrainer, steps=12, lora=lora)
    unbroken.train(batches(12))
    fresh = everything(make_trainer(PeftTrainer, steps=12, lora=lora))
    assert everything(unbroken) != fresh, "control: the training changes the model"

    assert run_until(tmp_path, 4000, kind, kill_at=7, number=signal.SIGKILL) == -signal.SIGKILL
    assert ct.verify(tmp_path).steps
    resumed = ours(tmp_path, 12, lora=lora)
    assert resumed.train_steps >= 4
    assert everything(resumed) != fresh, "control: it does not begin anew"
    resumed.train(batches(12))
    assert everything(resumed) == everything(unbroken)
    assert ct.verify(tmp_path).ok
    assert ct.ls(tmp_path)[-1].step == 12


def test_at_sigterm_the_step_is_saved(tmp_path):
    assert run_until(tmp_path, 4000, "full", kill_at=5, number=signal.SIGTERM) == -signal.SIGTERM
    last = ct.ls(tmp_path)[-1]
    assert last.step >= 6
    assert "SIGTERM" in last.reason
    assert ours(tmp_path, 4000).train_steps == last.step


def test_the_last_step_is_saved_and_a_finished_run_stays_as_it_is(tmp_path):
    ours(tmp_path, 5).train(batches(5))
    assert [step.step for step in ct.ls(tmp_path)] == [2, 4, 5]
    again = ours(tmp_path, 5)
    before = everything(again)
    again.train(batches(5))
    assert everything(again) == before
    assert [step.step for step in ct.ls(tmp_path)] == [2, 4, 5]


def test_a_damaged_step_is_passed_over(tmp_path):
    ours(tmp_path, 6).train(batches(6))
    data = max((tmp_path / "6").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    resumed = ours(tmp_path, 8)
    assert resumed.train_steps == 4
    resumed.train(batches(8))
    unbroken = make_trainer(PeftTrainer, steps=8)
    unbroken.train(batches(8))
    assert everything(resumed) == everything(unbroken)


def test_metrics_come_from_the_trainer(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.OnImprovement("loss", mode="min"), keep=ct.All())
    # tunix writes the loss of an update at the next one.
    seen = ct.peft_trainer(PeftTrainer, spec, metrics=lambda trainer: {"loss": float(loss_of(trainer))})
    make_trainer(seen, steps=6).train(batches(1) * 6)
    listed = ct.ls(tmp_path)
    assert len(listed) > 2
    assert all(step.metrics["loss"] > 0 for step in listed)


def loss_of(trainer):
    try:
        return trainer.metrics_logger.get_metric(trainer.metrics_prefix, "loss", "train")
    except (KeyError, ValueError):
        return 1e3  # There is none before the second update.


def test_orbaxs_options_from_a_spec(tmp_path):
    """The other way: tunix's own manager, told by the spec."""
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(2), keep=ct.Latest(2))
    config = {"checkpoint_root_directory": str(tmp_path), "checkpointing_options": ct.orbax_options(spec)}
    make_trainer(PeftTrainer, steps=7, **config).train(batches(7))
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [6, 7]
    assert make_trainer(PeftTrainer, steps=9, **config).train_steps == 7

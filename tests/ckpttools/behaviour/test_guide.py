# SPDX-License-Identifier: Apache-2.0
"""The guide's blocks on model checkpointing, copied to `guide/*.txt`, one test for each.

Names that the guide does not define come from `names`. `BLOCKS` lists what is changed in a block: the import path, and
what current flax or Orbax refuse. A test checks that docs/guide-checkpointing.md lists the same.
"""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools import functional
from tests.ckpttools.behaviour.faults import flip_bit_of

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "guide-checkpointing.md"
IMPORT = ("workshop.generative_models.core.checkpointing", "ckpttools.functional")
UPDATE = ("optimizer.update(grads)", "optimizer.update(model, grads)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A heading of the guide, and what is replaced in its code."""

    heading: str
    changes: tuple[tuple[str, str], ...] = ()


BLOCKS = {
    "basic": Block("Basic Model Checkpointing", (IMPORT,)),
    "loading": Block("Loading Checkpoints", (IMPORT,)),
    "specific": Block("Loading Specific Checkpoints"),
    "optimizer": Block(
        "Checkpointing with Optimizer State", (("optax.adam(1e-4))", "optax.adam(1e-4), wrt=nnx.Param)"), UPDATE)
    ),
    "asynchronous": Block("Asynchronous Checkpointing", (("ocp.CheckpointManager(\n", "CheckpointManager(\n"), UPDATE)),
    "retention": Block("Checkpoint Retention Policies", (UPDATE,)),
    "frequency": Block("Checkpoint Frequency", (UPDATE,)),
    "sharding": Block("Checkpoint Sharding"),
    "validation": Block("Checkpoint Validation"),
    "resumption": Block(
        "Training Resumption",
        (IMPORT, ("optax.adam(config.learning_rate))", "optax.adam(config.learning_rate), wrt=nnx.Param)"), UPDATE),
    ),
    "corruption": Block("Checkpoint Corruption Recovery"),
}


class Autoencoder(nnx.Module):
    def __init__(self, width, rngs):
        self.encoder, self.decoder = nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.decoder(jnp.tanh(self.encoder(x)))


def create_vae_model(config, rngs):
    return Autoencoder(config.width, rngs)


CONFIG = types.SimpleNamespace(width=64, learning_rate=1e-2)
BATCH = jnp.arange(8.0).reshape(2, 4) / 8
GRAPHDEF = nnx.graphdef(create_vae_model(CONFIG, nnx.Rngs(0)))


def loss_fn(model, batch=BATCH):
    return jnp.mean((model(batch) - batch) ** 2)


@jax.jit
def train_step(state, batch):
    loss, grads = jax.value_and_grad(lambda state: loss_fn(nnx.merge(GRAPHDEF, state), batch))(state)
    return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, state, grads), loss


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the guide's blocks use without defining it; relative paths lead into a temporary directory."""
    monkeypatch.chdir(tmp_path)
    model = create_vae_model(CONFIG, nnx.Rngs(1))
    return {
        **{name: getattr(functional, name) for name in ("setup_checkpoint_manager", "save_checkpoint")},
        **{name: getattr(functional, name) for name in ("load_checkpoint", "CheckpointManager")},
        "jax": jax,
        "jnp": jnp,
        "nnx": nnx,
        "optax": optax,
        "ocp": ocp,
        "create_vae_model": create_vae_model,
        "train_step": train_step,
        "loss_fn": loss_fn,
        "config": CONFIG,
        "batch": BATCH,
        "num_steps": 6,
        "save_every": 2,
        "steps_per_epoch": 3,
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param),
    }


def source(name):
    text = (HERE / "guide" / f"{name}.txt").read_text()
    for old, new in BLOCKS[name].changes:
        assert old in text
        text = text.replace(old, new)
    return text


def run(name, names):
    exec(compile(source(name), f"guide/{name}.txt", "exec"), names)


def weights(model):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def saved_weights(directory, step):
    model = create_vae_model(CONFIG, nnx.Rngs(9))
    with ct.CheckpointManager(directory) as manager:
        functional.load_checkpoint(manager, model, step)
    return weights(model)


def fill(directory, *steps, optimizer=False):
    """A run with a different model at each step; the weights by step."""
    seen = {}
    with ct.CheckpointManager(directory) as manager:
        for step in steps:
            model = create_vae_model(CONFIG, nnx.Rngs(step))
            items = {"model": model}
            if optimizer:
                items["optimizer"] = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
            manager.save(step, items)
            manager.wait_until_finished()
            seen[step] = weights(model)
    return seen


def test_basic(names, tmp_path):
    run("basic", names)
    assert names["checkpoint_dir"] == str(tmp_path / "checkpoints/experiment_1")
    assert names["checkpoint_manager"].all_steps() == [2, 4, 6]
    assert saved_weights("checkpoints/experiment_1", 6) == weights(names["model"])
    assert ct.verify("checkpoints/experiment_1").ok


def test_loading(names):
    run("basic", names)
    trained = weights(names["model"])
    names["checkpoint_manager"].close()
    run("loading", names)
    # `range(step + 1, num_steps)` has nothing left to do after step 6.
    assert weights(names["model"]) == trained
    assert names["restored_model"] is names["model_template"]


def test_loading_without_a_checkpoint(names, capsys):
    with pytest.raises(TypeError, match="NoneType"):
        run("loading", names)  # The guide's own `step + 1`; the page says so.
    assert "No checkpoint found" in capsys.readouterr().out
    assert names["restored_model"] is None


def test_specific(names, capsys):
    seen = fill("run", 5000, 7500, 10000)
    with ct.CheckpointManager("run") as manager:
        names |= {"checkpoint_manager": manager, "model_template": create_vae_model(CONFIG, nnx.Rngs(0))}
        run("specific", names)
        assert (names["step"], weights(names["restored_model"])) == (7500, seen[7500])
        assert "Available checkpoints: [5000, 7500, 10000]" in capsys.readouterr().out
        # After restoring old steps, the run continues from its end.
        functional.save_checkpoint(manager, names["model"], 10001)
        assert manager.all_steps() == [5000, 7500, 10000, 10001]


def test_optimizer(names):
    run("optimizer", names)
    assert names["step"] == 6
    assert names["checkpoint_manager"].all_steps() == [2, 4, 6]
    assert int(names["optimizer"].step[...]) == 6
    assert names["optimizer"] is names["optimizer_template"]
    assert weights(names["model"]) == saved_weights("checkpoints/with_optimizer", 6)


def test_asynchronous(names, capsys):
    run("asynchronous", names)
    assert names["checkpoint_manager"].all_steps() == [2, 4, 6]
    assert "Checkpoint error detected!" not in capsys.readouterr().out
    assert weights(names["model"]) == saved_weights("checkpoints/async", 6)


def test_asynchronous_notices_a_failed_save(names, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    real = ct.CheckpointManager.save
    monkeypatch.setattr("ckpttools.store.orbax.write", full)
    monkeypatch.setattr(ct.CheckpointManager, "save", lambda self, *a, **k: (real(self, *a, **k), self_join(self))[0])
    with pytest.raises(ct.DiskSpaceError):
        run("asynchronous", names)
    assert "Checkpoint error detected!" in capsys.readouterr().out
    assert "All checkpoints saved" not in capsys.readouterr().out
    assert names["checkpoint_manager"].latest_step() is None


def self_join(manager):
    """Wait until the background save has ended, without fetching its error."""
    manager.session._saver.worker.wait(60)


def test_retention(names):
    losses = iter([5.0, 1.0] + [2.0] * 14)
    names |= {"num_steps": 14, "save_every": 1, "best_val_loss": 1.5}
    # The block reads one `val_loss`; here it changes during the training.
    names["val_loss"] = next(losses)
    names["loss_fn"] = lambda model: (names.update(val_loss=next(losses)), loss_fn(model))[1]
    run("retention", names)
    kept = names["manager"].manager.all_steps()
    assert names["manager"].keep_steps == {1}
    assert kept[0] == 1, "the best step stays"
    assert kept[1:] == list(range(kept[1], 15))
    assert 2 not in kept, "control: what is not marked is deleted"
    assert ct.verify("checkpoints/custom").ok


def test_frequency(names):
    manager, _ = functional.setup_checkpoint_manager("run")
    names |= {"checkpoint_manager": manager}
    run("frequency", names)
    # Step 0 by the interval, 2 and 5 at the ends of the epochs.
    assert manager.all_steps() == [0, 2, 5]
    assert saved_weights("run", 5) == weights(names["model"])


def test_sharding(names):
    run("sharding", names)
    manager, _ = functional.setup_checkpoint_manager("run")
    assert names["load_sharded_checkpoint"](manager, names["model"]) == (None, None)
    assert names["save_sharded_checkpoint"](manager, names["model"], 3) is manager
    template = create_vae_model(CONFIG, nnx.Rngs(0))
    assert names["load_sharded_checkpoint"](manager, template) == (template, 3)
    assert weights(template) == weights(names["model"])


def test_validation(names, capsys):
    manager, _ = functional.setup_checkpoint_manager("run")
    names |= {"checkpoint_manager": manager, "step": 1, "val_dataloader": iter([{"data": BATCH}])}
    run("validation", names)
    assert names["success"] is True
    assert "Checkpoint at step 2 validated successfully" in capsys.readouterr().out


def test_resumption(names):
    run("resumption", names)
    assert names["start_step"] == 0
    names["checkpoint_manager"].close()
    names["num_steps"] = 10
    run("resumption", names)
    assert names["start_step"] == 7  # The guide's own `latest_step + 1`: one update is left out; the page says so.
    assert names["checkpoint_manager"].all_steps() == [2, 4, 6, 8, 10]


def test_corruption(names, capsys):
    seen = fill("checkpoints/experiment_1", 2, 4)
    flip_bit_of("checkpoints/experiment_1/4", seen[4][1])
    run("corruption", names)
    assert (names["step"], weights(names["model"])) == (2, seen[2])
    output = capsys.readouterr().out
    assert "Failed to load step 4" in output
    assert "Recovered from step 2" in output


def orbax_saves_to(directory):
    with ocp.CheckpointManager(directory) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
        manager.wait_until_finished()


REFUSED = {
    "an optimizer without wrt": lambda: nnx.Optimizer(create_vae_model(CONFIG, nnx.Rngs(0)), optax.adam(1e-4)),
    "an update without the model": lambda: nnx.Optimizer(
        create_vae_model(CONFIG, nnx.Rngs(0)), optax.adam(1e-4), wrt=nnx.Param
    ).update(nnx.state(create_vae_model(CONFIG, nnx.Rngs(0)))),
    "a relative path": lambda: orbax_saves_to("checkpoints"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_each_change_to_a_block_is_still_needed(call, tmp_path, monkeypatch):
    """If this fails, the change is no longer needed: remove it, here and on the page."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"wrt|argument|absolute"):
        call()


def test_every_block_has_a_page_entry_and_a_test():
    page = PAGE.read_text()
    assert {path.stem for path in (HERE / "guide").iterdir()} == BLOCKS.keys()
    for name, block in BLOCKS.items():
        start = page.index(f"## {block.heading}\n")
        section = page[start : page.find("\n## ", start + 1)]
        assert f"`test_{name}`" in section
        assert f"test_{name}" in globals()
        for old, new in block.changes:
            assert f"`{old.strip()}`" in section, (name, old)
            assert f"`{new.strip()}`" in section, (name, new)
        if not block.changes:
            assert "unchanged" in section

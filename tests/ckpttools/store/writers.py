# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other programs, written by those programs: Orbax v0 and v1, and flax."""

import subprocess
import sys
import warnings

import jax.numpy as jnp
import orbax.checkpoint as v0
from flax import config, serialization
from flax.training import checkpoints
from orbax.checkpoint import v1

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "nested": {"b": jnp.ones(3)}}
EMPTY = {"w": jnp.zeros((2, 3)), "nested": {"b": jnp.zeros(3)}}


def _write_manager(directory, **options):
    with v0.CheckpointManager(directory, options=v0.CheckpointManagerOptions(**options)) as manager:
        for step in (10, 20):
            manager.save(step, args=v0.args.StandardSave(STATE))


def _write_composite(directory):
    with v0.CheckpointManager(directory, options=v0.CheckpointManagerOptions(step_prefix="ckpt")) as manager:
        for step in (10, 20):
            items = {"default": v0.args.StandardSave(STATE), "lr": v0.args.JsonSave({"value": 0.5})}
            manager.save(step, args=v0.args.Composite(**items), metrics={"loss": 1.0 / step})


def _write_v1_trainer(directory):
    with v1.training.Checkpointer(directory) as trainer:
        for step in (10, 20):
            trainer.save_checkpointables(step, {"default": STATE})


def _write_bare(directory, checkpointer, name="{}"):
    for step in (10, 20):
        checkpointer.save(directory / name.format(step), STATE)
    checkpointer.close()


def _write_flax(directory, *, use_orbax):
    config.update("flax_use_orbax_checkpointing", use_orbax)
    for step in (10, 20):
        checkpoints.save_checkpoint(str(directory), STATE, step, keep=2)


RUNS = {
    "manager": _write_manager,
    "manager, prefix": lambda directory: _write_manager(directory, step_prefix="ckpt"),
    "manager, padded": lambda directory: _write_manager(directory, step_format_fixed_length=6),
    "manager, both": lambda directory: _write_manager(directory, step_prefix="a_b", step_format_fixed_length=8),
    "manager, items": _write_composite,
    "v1 trainer": _write_v1_trainer,
    "standard": lambda directory: _write_bare(directory, v0.StandardCheckpointer()),
    "standard, named": lambda directory: _write_bare(directory, v0.StandardCheckpointer(), "step-{}"),
    "pytree": lambda directory: _write_bare(directory, v0.PyTreeCheckpointer(), "epoch{}"),
    "pytree, zarr": lambda directory: _write_bare(directory, v0.PyTreeCheckpointer(use_ocdbt=False)),
    "flax": lambda directory: _write_flax(directory, use_orbax=False),
    "flax, Orbax": lambda directory: _write_flax(directory, use_orbax=True),
}
"""Writers of a run of the steps 10 and 20, each with the item "default"."""


SINGLES = {
    "standard": lambda path: _save_and_close(v0.StandardCheckpointer(), path),
    "pytree": lambda path: _save_and_close(v0.PyTreeCheckpointer(), path),
    "v1": lambda path: v1.save_checkpointables(path, {"default": STATE}),
    "to_bytes": lambda path: path.with_suffix(".msgpack").write_bytes(serialization.to_bytes(STATE)),
}
"""Writers of one checkpoint without a number."""


def _save_and_close(checkpointer, path):
    checkpointer.save(path, STATE)
    checkpointer.close()


def write(writer, path):
    """Call a writer without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer(path)
    return path if path.exists() else path.with_suffix(".msgpack")


def write_unfinished(directory):
    """Let Orbax's manager be killed before it renames its first step."""
    code = f"""
import os
import jax.numpy as jnp
import orbax.checkpoint as ocp
os.rename = os.replace = lambda *paths: os._exit(9)
with ocp.CheckpointManager({str(directory)!r}) as manager:
    manager.save(10, args=ocp.args.StandardSave({{"w": jnp.ones(3)}}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert [path.name for path in directory.iterdir()] == ["10.orbax-checkpoint-tmp"]

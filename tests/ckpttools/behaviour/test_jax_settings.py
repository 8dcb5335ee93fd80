# SPDX-License-Identifier: Apache-2.0
"""Save, restore, load and verify under each setting of JAX that makes some programs fail, and without a CPU backend."""

import contextlib
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ckpttools as ct
from tests.ckpttools.behaviour.examples import Batches, leaves


@contextlib.contextmanager
def config(**options):
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def set_mesh(axis_type):
    return jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2))


SETTINGS = {
    "default": contextlib.nullcontext,
    "transfer guard": lambda: config(jax_transfer_guard="disallow"),
    "transfer guard of explicit transfers": lambda: config(jax_transfer_guard="disallow_explicit"),
    "debug nans": lambda: config(jax_debug_nans=True),
    "x64": lambda: config(jax_enable_x64=True),
    "strict promotion": lambda: config(jax_numpy_dtype_promotion="strict"),
    "disable jit": jax.disable_jit,
    "rbg keys": lambda: config(jax_default_prng_impl="rbg"),
    "unsafe rbg keys": lambda: config(jax_default_prng_impl="unsafe_rbg"),
    "raw keys": lambda: config(jax_enable_custom_prng=False),
    "no rank promotion": lambda: config(jax_numpy_rank_promotion="raise"),
    "checking leaks": lambda: config(jax_check_tracer_leaks=True),
    "Auto mesh": lambda: set_mesh(AxisType.Auto),
    "Explicit mesh": lambda: set_mesh(AxisType.Explicit),
    "another default device": lambda: jax.default_device(jax.devices()[5]),
}


class Net(nnx.Module):
    """A sharded kernel where a mesh is current, a dropout with its key, a NaN, a number of each kind."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "b"))
        has_mesh = not jax.sharding.get_abstract_mesh().empty
        self.dense = nnx.Linear(8, 8, rngs=rngs, **({"kernel_init": init} if has_mesh else {}))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.mask = nnx.Variable(jnp.where(jnp.arange(4) == 2, -jnp.inf, jnp.float32(seed)))
        self.bad = nnx.Variable(jax.device_put(np.full(3, np.nan, np.float32)))
        self.half = nnx.Param(jnp.full(3, seed, jnp.bfloat16))
        self.raw = nnx.data(jnp.full(3, seed))


def make(seed):
    model = Net(seed)
    return {
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param),
        "rngs": nnx.Rngs(seed),
        "data": Batches(seed),
        "loose": {"keys": jax.random.split(jax.random.key(seed), 4), "lr": 0.1 * seed, "wide": np.full(2, seed * 0.1)},
    }


def validate(state):
    with jax.transfer_guard("allow"):
        return jnp.sum(jnp.abs(state["model"].dense.kernel[...]))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_comes_back_bit_by_bit(tmp_path, name):
    entered = SETTINGS[name]
    guarded = "guard" in name
    with contextlib.nullcontext() if guarded else entered():
        saved, first, second = make(1), make(2), make(3)
    before = leaves(saved)
    with entered():
        with ct.open(ct.CheckpointSpec(directory=tmp_path), validate=validate) as ckpt:
            ckpt.save(1, saved, metrics={"loss": saved["optimizer"].step.get_raw_value()})
            ckpt.wait()
            report = ckpt.restore(first)
            first["loose"] = report.state["loose"]
        second["loose"] = ct.load(tmp_path, second).state["loose"]
        assert ct.verify(tmp_path).ok
        shown = ct.diff(tmp_path, tmp_path)
    assert report.step == 1
    assert shown.same
    assert leaves(first) == leaves(second) == before
    for state in (first, second):
        for old, new in zip(jax.tree.leaves(nnx.state(saved["model"])), jax.tree.leaves(nnx.state(state["model"]))):
            assert old.sharding == new.sharding
    with contextlib.nullcontext() if name == "debug nans" or guarded else entered():
        jnp.sum(first["model"].dense(jnp.ones((4, 8)))).block_until_ready()


@pytest.mark.parametrize("name", ["Auto mesh", "Explicit mesh", "x64", "rbg keys", "default"])
def test_a_state_is_restored_into_an_abstract_template(tmp_path, name):
    with SETTINGS[name]():
        saved = {"model": Net(1)}
        with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
            ckpt.save(1, saved)
        template = nnx.eval_shape(lambda: Net(0))
        with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
            restored = ckpt.restore({"model": template}).state
    assert leaves(restored) == leaves(saved)
    if "mesh" in name:
        kernel = restored["model"].dense.kernel.get_raw_value()
        assert kernel.sharding.spec == P(None, "b")
        assert len(kernel.devices()) == 8


def test_what_x64_saved_is_refused_rather_than_truncated_without_it(tmp_path):
    with config(jax_enable_x64=True):
        state = {"params": {"w": jnp.arange(3.0), "n": jnp.int64(2**40)}}
        with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
            ckpt.save(1, state)
    template = {"w": jax.ShapeDtypeStruct((3,), np.float64), "n": 0}
    with pytest.raises(ct.PlacementError, match="jax_enable_x64") as caught:
        ct.load(tmp_path, {"params": template})
    assert caught.value.leaves == ("params.n", "params.w")
    on_host = ct.load(tmp_path, {"params": {"w": np.zeros(3), "n": np.int64(0)}}).state["params"]
    assert on_host["n"] == 2**40


_ALONE = """
    import os, sys
    os.environ["JAX_PLATFORMS"] = "accelerator"
    from jax._src import xla_bridge
    # A client of the CPU under another name stands for the GPU: there is no backend "cpu".
    xla_bridge.register_backend_factory("accelerator", xla_bridge.make_cpu_client, priority=500)
    import jax, jax.numpy as jnp, numpy as np
    try:
        jax.devices("cpu")
    except RuntimeError:
        pass
    else:
        raise SystemExit("there is a CPU backend")
    from flax import nnx
    import ckpttools as ct

    class Net(nnx.Module):
        def __init__(self, seed):
            self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(seed))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))

    directory = sys.argv[1]
    spec = ct.CheckpointSpec(directory=directory)
    state = lambda seed: {"model": Net(seed), "keys": jax.random.split(jax.random.key(seed), 3), "w": np.arange(3.0)}
    saved = state(1)
    with ct.open(spec, validate=lambda copy: copy["model"].dense.kernel[...]) as ckpt:
        ckpt.save(1, saved)
        ckpt.wait()
        restored = ckpt.restore(state(2)).state
    for found in (restored, ct.load(directory, state(3)).state):
        for a, b in zip(jax.tree.leaves(nnx.to_pure_dict(nnx.state(saved["model"]))),
                        jax.tree.leaves(nnx.to_pure_dict(nnx.state(found["model"])))):
            a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(saved["keys"]))
    assert ct.verify(directory).ok and ct.diff(directory, directory).same and ct.show(directory).step == 1
    ct.export_safetensors(directory, directory + "/../out.safetensors")
    print("alone ok")
"""


def test_no_cpu_backend_is_needed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_ALONE), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        check=False,
    )
    assert "alone ok" in done.stdout, done.stderr[-3000:]

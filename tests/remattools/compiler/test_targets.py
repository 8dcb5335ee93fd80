# SPDX-License-Identifier: Apache-2.0
"""Targets by name, and the errors for those that do not exist."""

import os
import subprocess
import sys

import jax
import pytest

import remattools as rt
from remattools.compiler import targets


def test_names_and_devices_give_live_targets():
    assert rt.find_target("cpu") == rt.find_target(jax.devices("cpu")[0]) or len(jax.devices("cpu")) > 1
    assert rt.find_target(None).live
    assert rt.find_target(rt.find_target("cpu")) is not None


def test_without_a_name_the_target_has_all_devices():
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "import jax.numpy as jnp, numpy as np, remattools as rt\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
        "mesh = Mesh(np.array(jax.devices()), ('data',))\n"
        "x = jnp.ones((64, 64))\n"
        "sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))\n"
        "whole, half = (rt.measure(lambda x: x @ x.T, a).argument_bytes for a in (x, sharded))\n"
        "assert whole == 64 * 64 * 4 == 2 * half, (whole, half)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_a_topology_needs_no_device(tpu):
    before = dict(os.environ)
    targets._load_topology.cache_clear()
    target = rt.find_target(tpu)
    assert (len(target.devices), target.live, target.name) == (4, False, tpu)
    assert rt.find_target("tpu:v6e").name == "tpu:v6e:2x2"
    assert rt.find_target("tpu:v4:2x2x1").devices[0].device_kind == "TPU v4"
    assert dict(os.environ) == before


def test_importing_loads_no_compiler_and_sets_no_environment():
    code = (
        "import os; before = dict(os.environ)\n"
        "import remattools, sys\n"
        "new = {k: v for k, v in os.environ.items() if before.get(k) != v and k.startswith('TPU_') and 'SKIP' in k}\n"
        "assert not new, new\n"
        "assert not {'libtpu', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        pytest.param("tpu:v55e:2x2", "tpu:v5e:2x2", id="unknown generation"),
        pytest.param("tpu:v5e:7x9", "tpu:v5e:2x2", id="unknown shape"),
        pytest.param("tpu:nonsense:a", "tpu:", id="not a shape"),
    ],
)
def test_unknown_topologies_raise_with_a_near_match(tpu, name, fix):
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target(name)
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", ["cpuu", "cpu:3", "", "gpus"])
def test_unknown_platforms_raise_with_a_near_match(name):
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target(name)
    assert "cpu" in caught.value.fix or "gpu" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        pytest.param("tpu:v9", "tpu:v5e:2x2", id="unknown generation"),
        pytest.param("v5e", "did you mean 'tpu:v5e:2x2'?", id="without platform"),
        pytest.param("tpuv5e", "did you mean 'tpu:v5e:2x2'?", id="without colon"),
        pytest.param("tpu:v5litepod-4", "did you mean 'tpu:v5e:2x2'?", id="the cloud's name"),
        pytest.param("TPU", "or without a device tpu:v2:2x2", id="capitals"),
        pytest.param("cpu:0", "did you mean 'cpu'?", id="a number"),
        pytest.param(5, '"cpu"', id="not a string"),
    ],
)
def test_misspelled_targets_suggest_the_right_one(name, fix):
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target(name)
    assert fix in caught.value.fix


@pytest.mark.parametrize(("name", "fix"), [("gpu", "pip install"), ("tpu", "tpu:v5e:2x2")])
def test_missing_devices_raise_with_a_fix(name, fix, monkeypatch):
    def absent(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", absent)
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target(name)
    assert fix in caught.value.fix


def test_missing_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    targets._load_topology.cache_clear()
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target("tpu:v5e:2x2")
    assert caught.value.fix == 'pip install "nnx-checkpointing[tpu]"'
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target("tpu:v5litepod-4")
    assert caught.value.fix.startswith("pip install \"nnx-checkpointing[tpu]\"; did you mean 'tpu:v5e:2x2'?")


def test_a_mesh_larger_than_the_target_is_refused():
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target("cpu").mesh((4096,), ("data",))
    assert "topology" in caught.value.fix


def test_a_lock_of_another_process_is_reported_as_such(tpu, monkeypatch):
    def locked(**_):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", locked)
    targets._load_topology.cache_clear()
    with pytest.raises(rt.TargetError) as caught:
        rt.find_target(tpu)
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" in caught.value.fix

# SPDX-License-Identifier: Apache-2.0
"""A state is filled from a file if every name, shape and dtype matches; otherwise nothing changes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as oracle

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves
from tests.ckpttools.store.formats.test_safetensors_format import file_with


def test_a_file_that_the_package_wrote_comes_in(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], ml_dtypes.bfloat16)}
    oracle.save_file(values, tmp_path / "b.safetensors", metadata={"format": "pt"})
    back = ct.import_safetensors(tmp_path / "b.safetensors", {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16)})
    np.testing.assert_array_equal(back["a"], values["a"])
    assert back["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back["b"], values["b"])


def test_a_mismatch_names_every_leaf_and_changes_nothing(tmp_path):
    file, model = tmp_path / "m.safetensors", nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = leaves({"m": model})
    ct.export_safetensors({"kernel": jnp.ones((3, 2)), "bais": jnp.ones(3)}, file)
    with pytest.raises(ct.StructureError) as caught:
        ct.import_safetensors(file, model)
    assert set(caught.value.mismatches) == {
        "kernel: float32[3,2] in the file, float32[2,3] in the state",
        "bias: not in the file; did you mean 'bais'?",
        "bais: in the file, not in the state",
    }
    assert leaves({"m": model}) == before
    with pytest.raises(ct.StructureError, match="float16"):
        ct.import_safetensors(file, {"kernel": jnp.ones((3, 2), jnp.float16), "bais": jnp.ones(3)})


def test_an_invalid_value_in_the_header_is_a_mismatch(tmp_path):
    (tmp_path / "m").write_bytes(file_with({"__metadata__": {"ckpttools.value.n": '{"os": 1}'}}))
    with pytest.raises(ct.StructureError, match="the value in the file cannot be read"):
        ct.import_safetensors(tmp_path / "m", {"n": 1})
    (tmp_path / "m").write_bytes(file_with({"__metadata__": {"ckpttools.value.n": "["}}))
    with pytest.raises(ct.StructureError, match="the value in the file cannot be read"):
        ct.import_safetensors(tmp_path / "m", {"n": 1})
    (tmp_path / "m").write_bytes(file_with({}))
    assert ct.import_safetensors(tmp_path / "m", {"n": 1}) == {"n": 1}


def test_an_abstract_state_gets_its_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    value = jax.device_put(jnp.arange(16.0), sharding)
    ct.export_safetensors({"w": value}, tmp_path / "m")
    abstract = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
    back = ct.import_safetensors(tmp_path / "m", abstract)
    assert back["w"].sharding == sharding
    np.testing.assert_array_equal(back["w"], value)

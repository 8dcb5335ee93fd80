# SPDX-License-Identifier: Apache-2.0
"""A run from a safetensors file: keys and values come back, and nothing is imported into a run."""

import json
import struct

import jax
import jax.numpy as jnp
import pytest

import ckpttools as ct


def test_names_become_the_paths_of_leaves(tmp_path):
    ct.export_safetensors({"layers": {"kernel": jnp.ones(3)}, "step": jnp.ones(1)}, tmp_path / "m")
    assert ct.import_run(tmp_path / "m", tmp_path / "run", step=5, item="net", names={"head": "step"}) == 2
    shown = ct.show(tmp_path / "run")
    assert (shown.step, {leaf.name for leaf in shown.leaves}) == (5, {"net.layers.kernel", "net.head"})
    assert shown.reason == "imported from m"


def test_skipped_leaves_are_not_imported(tmp_path):
    ct.export_safetensors({"a": jnp.ones(3), "b": jnp.ones(1)}, tmp_path / "m")
    assert ct.import_run(tmp_path / "m", tmp_path / "run", skip=["b"]) == 1
    assert [leaf.name for leaf in ct.show(tmp_path / "run").leaves] == ["model.a"]
    with pytest.raises(ct.SpecError, match="matches no leaf"):
        ct.import_run(tmp_path / "m", tmp_path / "other", skip=["c"])
    assert not (tmp_path / "other").exists()


def test_a_leaf_cannot_also_hold_leaves(tmp_path):
    ct.export_safetensors({"a.b": jnp.ones(1), "a": jnp.ones(2)}, tmp_path / "m")
    with pytest.raises(ct.StructureError, match="others below that name"):
        ct.import_run(tmp_path / "m", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_and_plain_values_come_back(tmp_path):
    state = {"key": jax.random.key(3), "count": 7, "w": jnp.ones(2)}
    ct.export_safetensors(state, tmp_path / "m")
    assert ct.import_run(tmp_path / "m", tmp_path / "run") == 3
    blank = {"key": jax.random.key(0), "count": 0, "w": jnp.zeros(2)}
    back = ct.load(tmp_path / "run", {"model": blank}).state["model"]
    assert back["count"] == 7
    assert jax.random.key_data(back["key"]).tolist() == jax.random.key_data(state["key"]).tolist()


def test_an_invalid_value_in_the_header_is_refused(tmp_path):
    header = json.dumps({"__metadata__": {"ckpttools.value.count": "["}}).encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ct.TensorFileError, match="the metadata of the file holds an invalid value"):
        ct.import_run(tmp_path / "m", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_run_with_steps_is_refused_before_reading(tmp_path):
    (tmp_path / "run" / "10").mkdir(parents=True)
    with pytest.raises(ct.NotRestoredError, match="holds steps") as caught:
        ct.import_run(tmp_path / "none.safetensors", tmp_path / "run")
    assert "import into a new directory" in caught.value.fix
    with pytest.raises(ct.StorageError, match="cannot be read"):  # control: an empty directory
        ct.import_run(tmp_path / "none.safetensors", tmp_path / "empty")


def test_progress_counts_bytes_and_a_header_remains(tmp_path):
    ct.export_safetensors({"a": jnp.ones(4), "b": jnp.ones(2)}, tmp_path / "m")
    calls = []
    ct.import_run(tmp_path / "m", tmp_path / "run", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] in ([16, 24], [8, 24])
    assert {total for _, total in calls} == {(tmp_path / "m").stat().st_size}

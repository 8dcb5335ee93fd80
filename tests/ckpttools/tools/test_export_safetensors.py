# SPDX-License-Identifier: Apache-2.0
"""safetensors out and in, with the format's own package as the judge of the files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors import numpy as oracle

import ckpttools as ct
from ckpttools.tools import export_safetensors
from tests.ckpttools.behaviour.examples import Net, leaves
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file

NARROW = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float16"]
WIDE = ["float32", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bool", "complex64"]


def arrays():
    found = {name: jnp.arange(6).astype(name).reshape(2, 3) for name in (*NARROW, *WIDE)}
    return {**found, "scalar": jnp.float32(0.1), "empty": jnp.zeros((0, 4)), "double": np.arange(3.0)}


@pytest.fixture
def run(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run")) as ckpt:
        ckpt.save(1, {"model": {"w": jnp.zeros(3)}, "optimizer": {"mu": jnp.ones(3)}})
        ckpt.save(2, {"model": {"w": jnp.arange(3.0)}, "optimizer": {"mu": jnp.ones(3)}})
    return tmp_path / "run"


def test_every_dtype_survives_export_and_import(tmp_path):
    state, file = arrays(), tmp_path / "a.safetensors"
    ct.export_safetensors(state, file)
    back = ct.import_safetensors(file, jax.tree.map(lambda leaf: jnp.zeros_like(leaf), state) | {"double": np.zeros(3)})
    assert leaves({"m": back}) == leaves({"m": state})
    with safetensors.safe_open(file, framework="np") as judge:
        assert set(judge.keys()) == set(state)
        assert judge.metadata() == {"format": "pt"}
        for name in (*WIDE, "float16", "scalar", "empty", "double"):
            np.testing.assert_array_equal(judge.get_tensor(name), np.asarray(state[name]))
    raw = dict(safetensors.deserialize(file.read_bytes()))
    assert raw["bfloat16"]["dtype"] == "BF16"
    assert bytes(raw["float8_e4m3fn"]["data"]) == np.asarray(state["float8_e4m3fn"]).tobytes()


def test_keys_values_and_buffers_of_a_live_model_come_back(tmp_path):
    model, fresh = Net(nnx.Rngs(0, dropout=1)), Net(nnx.Rngs(5, dropout=6))
    fresh.extra.get_raw_value()["count"] = 9
    assert leaves({"m": fresh}) != leaves({"m": model})
    names = ct.export_safetensors(model, tmp_path / "m.safetensors")
    assert "layers.0.kernel" in names
    assert ct.import_safetensors(tmp_path / "m.safetensors", fresh) is fresh
    assert leaves({"m": fresh}) == leaves({"m": model})


def test_names_are_mapped_both_ways(tmp_path):
    names = {"layers.*.kernel": "h.*.weight", "norm.**": "ln_f.**", "table": "wte"}
    model, fresh, file = Net(nnx.Rngs(0)), Net(nnx.Rngs(5)), tmp_path / "m.safetensors"
    written = ct.export_safetensors(model, file, names=names)
    assert {"h.0.weight", "h.1.weight", "layers.0.bias", "ln_f.mean", "wte"} <= set(written)
    assert leaves({"m": ct.import_safetensors(file, fresh, names=names)}) == leaves({"m": model})
    with pytest.raises(ct.StructureError, match=r"layers\.0\.kernel: not in the file"):
        ct.import_safetensors(file, fresh)


def test_leaves_can_be_left_out_on_both_sides(tmp_path):
    file = tmp_path / "m.safetensors"
    assert ct.export_safetensors({"a": jnp.ones(1), "b": {"c": jnp.ones(2)}}, file, skip=["b.**"]) == ("a",)
    back = ct.import_safetensors(file, {"a": jnp.zeros(1), "b": {"c": jnp.full(2, 7.0)}}, skip=["b.**"])
    assert back["a"].tolist() == [1]
    assert back["b"]["c"].tolist() == [7, 7]
    with pytest.raises(ct.StructureError, match="a: in the file, not in the state"):
        ct.import_safetensors(file, {})
    assert ct.import_safetensors(file, {"x": {}}, allow_extra=True) == {"x": {}}


def test_a_step_of_a_run_is_verified_and_exported(run, tmp_path):
    file = tmp_path / "m.safetensors"
    ct.export_safetensors(run, file)
    assert oracle.load_file(file)["w"].tolist() == [0, 1, 2], "the newest step"
    ct.export_safetensors(run / "1", file, item="optimizer", metadata={"who": "me"})
    assert oracle.load_file(file)["mu"].tolist() == [1, 1, 1]
    with safetensors.safe_open(file, framework="np") as judge:
        assert judge.metadata() == {"who": "me", "ckpttools.step": "1"}
    with pytest.raises(ct.StructureError, match=r"no item 'modle'.*\n.*\n.*did you mean 'model'"):
        ct.export_safetensors(run, file, item="modle")
    flip_bit(largest_file(run / "2" / "model"))
    before = file.read_bytes()
    with pytest.raises(ct.CorruptStepError, match="step 2 is corrupt"):
        ct.export_safetensors(run / "2", file)
    assert file.read_bytes() == before, "a failed export leaves the old file"
    assert len(list(tmp_path.glob(".m*"))) == 0


def test_many_leaves_are_read_a_few_at_a_time(run, tmp_path, monkeypatch):
    asked = []
    read = export_safetensors.leaf_integrity.read_verified
    monkeypatch.setattr(export_safetensors, "_BATCH_BYTES", 100)
    monkeypatch.setattr(
        export_safetensors.leaf_integrity,
        "read_verified",
        lambda entry, records: asked.append(records) or read(entry, records),
    )
    state = {f"w{number}": jnp.full(20, float(number)) for number in range(5)}
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "five")) as ckpt:
        ckpt.save(1, {"model": state})
    ct.export_safetensors(tmp_path / "five", tmp_path / "m.safetensors")
    assert [len(each["model"]) for each in asked] == [1] * 5
    assert leaves({"m": ct.import_safetensors(tmp_path / "m.safetensors", state)}) == leaves({"m": state})


def test_what_the_format_lacks_is_named(tmp_path):
    with pytest.raises(ct.LeafError, match=r"model\.a\.b is of dtype int4, which safetensors does not have"):
        ct.export_safetensors({"a": {"b": jnp.ones(2, jnp.int4)}}, tmp_path / "m")
    with pytest.raises(ct.LeafError, match="float8_e4m3b11fnuz"):
        ct.export_safetensors({"a": jnp.ones(2, jnp.float8_e4m3b11fnuz)}, tmp_path / "m")


def test_what_cannot_be_exchanged_is_refused(tmp_path, run):
    class Data:
        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    file = tmp_path / "m.safetensors"
    ct.export_safetensors({"a": jnp.ones(1)}, file)
    with pytest.raises(ct.StructureError, match="get_state"):
        ct.import_safetensors(file, {"a": jnp.ones(1), "data": Data()})
    with pytest.raises(ct.StorageError, match="cannot be read"):
        ct.import_safetensors(tmp_path / "nothing", {})
    with pytest.raises(ct.StorageError, match="could not be written"):
        ct.export_safetensors({"a": jnp.ones(1)}, tmp_path / "no" / "m.safetensors")
    (tmp_path / "plain" / "3").mkdir(parents=True)
    (tmp_path / "plain" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    for folder in (tmp_path / "plain", tmp_path / "plain" / "3"):
        with pytest.raises(ct.CheckpointError, match=r"has no manifest"):
            ct.export_safetensors(folder, file)
    with pytest.raises(ct.SpecError, match=r"skip='b' matches no leaf"):
        ct.export_safetensors({"a": jnp.ones(1)}, file, skip="b")


def test_progress_of_an_export_ends_at_the_total(run, tmp_path):
    calls = []
    ct.export_safetensors(run, tmp_path / "m", progress=lambda done, total: calls.append((done, total)))
    assert 0 < calls[-1][0] == calls[-1][1]

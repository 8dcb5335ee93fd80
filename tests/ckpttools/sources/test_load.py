# SPDX-License-Identifier: Apache-2.0
"""Surgery on real models: restored with other names, sizes and dtypes, in place and sharded, read in part, once."""

import contextlib
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.sources import load as load_module
from tests.ckpttools.behaviour.examples import Batches, leaves

WORDS, WIDTH = 10, 8


class Block(nnx.Module):
    def __init__(self, rngs, attention="attn", dtype=jnp.float32):
        setattr(self, attention, nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=dtype))


class Model(nnx.Module):
    def __init__(self, seed=0, words=WORDS, blocks="blocks", attention="attn", dtype=jnp.float32, extra=None):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(words, WIDTH, rngs=rngs, param_dtype=dtype)
        setattr(self, blocks, nnx.List([Block(rngs, attention, dtype) for _ in range(2)]))
        self.head = nnx.Linear(WIDTH, words, rngs=rngs, param_dtype=dtype)
        if extra:
            setattr(self, extra, nnx.LoRA(WIDTH, 2, WIDTH, rngs=rngs))


def with_optimizer(model):
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, ones)
    return {"model": model, "optimizer": optimizer}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one step, and what is in it."""
    directory = tmp_path_factory.mktemp("surgery") / "run"
    state = {**with_optimizer(Model()), "data": Batches(3)}
    next(state["data"])
    with ct.open(ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(7, state)
    return directory, leaves(state)


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_renamed_part_is_renamed_in_the_optimizer_too(saved):
    directory, before = saved
    state = with_optimizer(Model(1, blocks="layers", attention="attention"))
    surgery = [ct.Rename("blocks", "layers"), ct.Rename("attn", "attention")]
    with pytest.raises(ct.StructureError) as caught:
        ct.load(directory, state)
    assert caught.value.surgery
    report = ct.load(directory, state, surgery=caught.value.surgery)
    suggested = leaves(state)
    assert ct.load(directory, state, surgery=surgery).step == report.step == 7
    after = leaves(state)
    assert after == suggested
    wanted = {name.replace("blocks", "layers").replace("attn", "attention"): bits for name, bits in before.items()}
    assert after == {name: bits for name, bits in wanted.items() if not name.startswith("data")}
    renamed = {leaf.name: leaf.source for leaf in report.altered if "renamed" in leaf.action}
    assert renamed["model.layers.0.attention.kernel"] == "model.blocks.0.attn.kernel"
    assert renamed["optimizer.opt_state.0.mu.layers.1.attention.kernel"].endswith("mu.blocks.1.attn.kernel")


def test_a_larger_vocabulary_keeps_the_new_rows_of_the_model(saved):
    directory, before = saved
    state = {"model": Model(1, words=WORDS + 3)}
    fresh = np.asarray(state["model"].embed.embedding[...]).copy()
    ct.load(directory, state, surgery=[ct.Pad("embedding"), ct.Pad("head", fill=0.0)])
    embedding = np.asarray(state["model"].embed.embedding[...])
    assert embedding[:WORDS].tobytes() == before["model.embed.embedding"][2]
    assert (embedding[WORDS:] == fresh[WORDS:]).all()
    assert (np.asarray(state["model"].head.kernel[...])[:, WORDS:] == 0).all()


def test_additions_keep_their_values_and_the_rest_comes_back(saved):
    directory, before = saved
    state = {"model": Model(1, extra="lora")}
    lora = leaves({"model": state["model"].lora})
    with pytest.raises(ct.StructureError, match=r'ct.Reinit\("model.lora"\)'):
        ct.load(directory, state)
    report = ct.load(directory, state, surgery=ct.Reinit("lora"))
    after = leaves(state)
    assert leaves({"model": state["model"].lora}) == lora
    assert {name: bits for name, bits in after.items() if "lora" not in name} == {
        name: bits for name, bits in before.items() if name.startswith("model.")
    }
    assert [leaf.action for leaf in report.altered] == ["kept", "kept"]


def test_loading_a_part_leaves_the_run_unchanged(saved):
    directory, before = saved
    listing = sorted(directory.rglob("*"))
    state = {"model": Model(1, words=WORDS + 1, extra="lora"), "optimizer": "not looked at"}
    untouched = leaves({"head": state["model"].head})
    ct.load(directory, state, only="model.blocks")
    assert leaves(state)["model.blocks.1.attn.kernel"] == before["model.blocks.1.attn.kernel"]
    assert leaves({"head": state["model"].head}) == untouched
    assert sorted(directory.rglob("*")) == listing


def test_a_cast_is_done_where_it_is_declared(saved):
    directory, before = saved
    state = {"model": Model(1, dtype=jnp.bfloat16)}
    with pytest.raises(ct.StructureError, match="bfloat16"):
        ct.load(directory, state)
    ct.load(directory, state, surgery=ct.Cast("model", "float32", "bfloat16"))
    kernel = np.frombuffer(before["model.head.kernel"][2], np.float32).astype(jnp.bfloat16)
    assert leaves(state)["model.head.kernel"][2] == kernel.tobytes()


def test_surgery_places_leaves_where_the_template_says(saved):
    directory, before = saved
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = {"model": {"table": jax.device_put(jnp.zeros((12, WIDTH)), sharding)}}
    surgery = [ct.Rename("model.embed.embedding", "model.table"), ct.Pad("table", fill=2.0)]
    table = ct.load(directory, state, surgery=surgery, only="model.table").state["model"]["table"]
    assert table.sharding == sharding
    assert np.asarray(table)[:WORDS].tobytes() == before["model.embed.embedding"][2]
    assert (np.asarray(table)[WORDS:] == 2).all()


def test_an_abstract_model_is_filled_through_a_rename(saved):
    directory, before = saved
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Model(1, blocks="layers")))
    report = ct.load(directory, {"model": abstract}, surgery=ct.Rename("blocks", "layers"))
    model = nnx.merge(graphdef, report.state["model"])
    assert leaves({"m": model})["m.layers.0.attn.kernel"] == before["model.blocks.0.attn.kernel"]


def test_an_iterator_is_moved_dropped_or_kept_as_a_whole(saved):
    directory, before = saved
    state = {"batches": Batches(0)}
    ct.load(directory, state, surgery=ct.Rename("data.**", "batches.**"))
    moved = {name.replace("batches", "data"): bits for name, bits in leaves(state).items()}
    assert moved == {name: bits for name, bits in before.items() if name.startswith("data")}
    kept = {"data": Batches(0)}
    fresh = leaves(kept)
    ct.load(directory, kept, surgery=ct.Reinit("data"))
    assert leaves(kept) == fresh
    # Casts never mean the leaves of an iterator, which are its own affair.
    ct.load(directory, kept, surgery=ct.Cast("**", "int64", "int32"))
    assert leaves(kept) == {name: bits for name, bits in before.items() if name.startswith("data")}


def test_an_operation_is_done_once_in_a_run(run):
    spec = ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))
    surgery = [ct.Rename("blocks", "layers"), ct.Reinit("model.head")]
    trained = None
    for step in (8, 9):
        state = {"model": Model(step, blocks="layers")}
        with ct.open(spec) as ckpt:
            report = ckpt.restore(state, surgery=surgery)
            assert bool(report.altered) == (step == 8)
            if trained is not None:
                assert leaves(state) == trained
            state["model"].head.kernel[...] += 1
            trained = leaves(state)
            ckpt.save(step, state)
    with ct.open(spec) as ckpt:
        state = {"model": Model(0, blocks="layers")}
        assert ckpt.restore(state, 7, surgery=surgery).altered  # The old step still needs it.
        # An operation that was added since is done to the new steps.
        state = {"model": Model(0, blocks="stack")}
        assert ckpt.restore(state, 9, surgery=[*surgery, ct.Rename("layers", "stack")]).altered
        assert leaves({"h": state["model"].head})["h.kernel"] == trained["model.head.kernel"]


def test_a_run_that_begins_with_surgery_needs_none(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))
    for _ in range(2):
        with ct.open(spec) as ckpt:
            report = ckpt.restore({"model": Model(0, blocks="layers")}, surgery=ct.Rename("blocks", "layers"))
            ckpt.save((report.step or 0) + 1, {"model": Model(0, blocks="layers")})
    assert (report.step, report.altered) == (1, ())


def test_a_mismatch_with_surgery_leaves_the_model_as_it_was(saved):
    state = {"model": Model(1, blocks="layers", words=WORDS + 1)}
    before = leaves(state)
    with pytest.raises(ct.StructureError, match=r"embedding: float32\[10,8\] on disk, float32\[11,8\] here"):
        ct.load(saved[0], state, surgery=ct.Rename("blocks", "layers"))
    assert leaves(state) == before


def test_a_validation_of_kept_leaves_cannot_touch_the_live_ones(run):
    def validate(copy):
        kernel = copy["model"].head.kernel
        nnx.update(copy["model"], jax.jit(lambda s: s, donate_argnums=0)(nnx.state(copy["model"])))
        return jnp.zeros(1) * kernel[...].sum()

    state = {"model": Model(1)}
    with ct.open(ct.CheckpointSpec(directory=run), validate=validate) as ckpt:
        ckpt.restore(state, surgery=ct.Reinit("model.head"))
    assert np.isfinite(np.asarray(state["model"].head.kernel[...])).all()


def test_a_preview_lists_each_leaf_and_reads_no_array(saved, monkeypatch):
    directory, _ = saved
    monkeypatch.setattr("ckpttools.store.orbax.read", lambda *_: pytest.fail("an array was read"))
    state = {"model": Model(1, words=WORDS + 2, blocks="layers", extra="lora")}
    surgery = [ct.Rename("blocks", "layers"), ct.Pad("embedding"), ct.Drop("model.head.bias")]
    seen = ct.preview(directory, state, surgery=[*surgery, ct.Reinit("lora")])
    by_name = {leaf.name: leaf for leaf in seen.leaves}
    assert by_name["model.layers.0.attn.kernel"].action == "renamed"
    assert by_name["model.embed.embedding"].action == "padded"
    assert (by_name["model.lora.lora_a"].action, by_name[""].source) == ("kept", "model.head.bias")
    assert not seen.fits
    assert "model.head.bias: not on disk" in " ".join(seen.differences)
    again = ct.preview(directory, state, surgery=[*surgery[:2], ct.Reinit("lora"), ct.Pad("head")])
    assert again.fits
    assert again.read_bytes == 4 * (2 * (WIDTH * WIDTH + WIDTH) + WORDS * WIDTH + WIDTH * WORDS + WORDS)
    text = str(again)
    assert "model.blocks.0.attn.kernel" in text
    assert "float32[12,8]" in text
    assert "would fit it: ct.Pad(" in str(seen)
    json.dumps(again.as_dict())


def test_loading_says_what_is_missing(saved, tmp_path):
    directory, _ = saved
    state = {"model": Model(1)}
    with pytest.raises(ct.StepNotFoundError, match="does not exist"):
        ct.load(tmp_path / "none", state)
    with pytest.raises(ct.StepNotFoundError, match="is an empty directory"):
        ct.load(tmp_path, state)
    with pytest.raises(ct.StepNotFoundError, match="step 8 does not exist"):
        ct.load(directory, state, step=8)
    with pytest.raises(ct.SpecError, match="has no mode"):
        ct.load(directory, state, step=ct.best("loss"))
    for step in (8, ct.best("loss", mode="min")):
        with pytest.raises(ct.SpecError, match="was requested"):
            ct.load(directory / "7", state, step=step)
    with pytest.raises(ct.SpecError, match="not a list of operations") as caught:
        ct.load(directory, state, surgery="surgery.toml")
    assert "ct.Surgery.load(path)" in caught.value.fix
    (tmp_path / "3").mkdir()
    with pytest.raises(ct.StepNotFoundError, match="readable manifest"):
        ct.preview(tmp_path, state)
    with pytest.raises(ct.NoIntactStepError):
        ct.load(tmp_path, state)


def test_load_takes_a_step_directory_and_moves_no_damage(run):
    with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.restore({"model": Model(1)})
        ckpt.save(8, {"model": Model(2)})
    state = {"model": Model(1)}
    assert ct.load(run / "7", state).step == 7
    largest = max((run / "8" / "model").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    report = ct.load(run, state)
    assert (report.step, report.rejected[0].verdict, report.rejected[0].moved_to) == (7, "corrupt", None)
    assert (run / "8").is_dir()
    # What is read is proved, and damage elsewhere in the step does not matter: nobody reads it.
    damaged = report.rejected[0].leaves
    whole = next(name for name in leaves(state) if name not in damaged)
    assert ct.load(run / "8", state, only=whole).step == 8
    with pytest.raises(ct.CorruptStepError):
        ct.load(run / "8", state, only=damaged)


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="the kernel counts what a process reads")
def test_one_leaf_reads_its_own_bytes_only(tmp_path):
    state = {"model": {f"layer{n}": np.random.default_rng(n).random((128, 1024)) for n in range(40)}}
    with ct.open(ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))) as ckpt:
        total = ckpt.save(1, state).total_bytes
    template = {"model": {"layer5": np.zeros((128, 1024))}}

    def read_by(**options):
        before = _read_bytes()
        report = ct.load(tmp_path, template, **options)
        assert (report.state["model"]["layer5"] == state["model"]["layer5"]).all()
        return _read_bytes() - before

    read_by(only="model.layer5")  # Once before, so that no import is counted.
    assert read_by(only="model.layer5") < 0.05 * total
    template = {"model": {name: np.zeros_like(value) for name, value in state["model"].items()}}
    assert read_by() > 0.9 * total


def _read_bytes():
    text = pathlib.Path(f"/proc/{os.getpid()}/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


@pytest.mark.parametrize("listings", [2, 99])
def test_a_reader_whose_steps_were_all_deleted_lists_them_again(tmp_path, monkeypatch, listings):
    """Beside a training that keeps few steps; the control gives up, since each listing is out of date again."""
    with ct.open(ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, {"w": np.full(2, 1)})
        real, calls = load_module.open_source, []

        def save_another(source):
            found = real(source)
            if len(calls) < listings:
                entered = found.__enter__()
                calls.append(ckpt.save(len(calls) + 2, {"w": np.full(2, len(calls) + 2)}).step)
                for entry in entered.steps.entries:
                    shutil.rmtree(entry.path)
                return contextlib.nullcontext(entered)
            return found

        monkeypatch.setattr(load_module, "open_source", save_another)
        if listings == 2:
            assert ct.load(tmp_path, {"w": np.zeros(2, int)}).state["w"].tolist() == [3, 3]
        else:
            with pytest.raises(ct.NoIntactStepError, match="was removed while it was read"):
                ct.load(tmp_path, {"w": np.zeros(2, int)})
            assert len(calls) == 5

# SPDX-License-Identifier: Apache-2.0
"""What differs between two steps: names, forms and values, and nothing is read that is known to be equal."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import orbax


def save(folder, step, state):
    with ct.open(ct.CheckpointSpec(directory=folder, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.restore({})
        ckpt.save(step, state)


BASE = {
    "frozen": jnp.arange(8.0),
    "small": jnp.ones(4),
    "large": jnp.ones(4),
    "zero": jnp.zeros(2),
    "gone": jnp.ones(1),
    "shape": jnp.ones(3),
    "dtype": jnp.ones(3),
    "scalar": jnp.array(2),
    "signed": jnp.array([0.0]),
    "key": jax.random.key(0),
    "same": "text",
    "epoch": 1,
    "empty": jnp.zeros((0, 2)),
}
CHANGED = {
    "small": BASE["small"] + 0.01,
    "large": BASE["large"].at[1].set(jnp.nan),
    "zero": jnp.array([0.0, 3.0]),
    "new": jnp.ones(1),
    "shape": jnp.ones(4),
    "dtype": np.ones(3, np.float16),
    "scalar": jnp.array(5),
    "signed": jnp.array([-0.0]),
    "key": jax.random.key(1),
    "epoch": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    save(folder, 1, {"m": BASE})
    save(folder, 2, {"m": {**{name: BASE[name] for name in BASE if name != "gone"}, **CHANGED}})
    return folder


def test_a_step_is_equal_to_itself(run):
    report = ct.diff(run / "1", run, steps=(None, 1))
    assert (report.same, report.equal) == (True, len(BASE))
    assert "0 changed" in str(report)


def test_structure_forms_and_values_are_compared(run):
    report = ct.diff(run, run, steps=(1, 2))
    assert (report.removed, report.added) == (("m.gone",), ("m.new",))
    assert {(leaf.name, leaf.before, leaf.after) for leaf in report.reformed} == {
        ("m.shape", "float32[3]", "float32[4]"),
        ("m.dtype", "float32[3]", "float16[3]"),
    }
    changed = {leaf.name: leaf for leaf in report.changed}
    assert set(changed) == {"m.small", "m.large", "m.zero", "m.scalar", "m.signed", "m.key", "m.epoch"}
    assert changed["m.small"].max_abs == pytest.approx(0.01, rel=1e-4)
    assert changed["m.small"].relative == pytest.approx(0.01, rel=1e-4)
    assert changed["m.small"].changed == 4
    assert math.isinf(changed["m.zero"].relative)
    assert math.isnan(changed["m.large"].relative)
    assert (changed["m.scalar"].max_abs, changed["m.scalar"].relative) == (3, 1.5)
    assert (changed["m.signed"].max_abs, changed["m.signed"].changed) == (0, 0)
    assert (changed["m.epoch"].before, changed["m.epoch"].after) == ("1", "2")
    assert {leaf.name for leaf in report.changed[:2]} == {"m.zero", "m.large"}
    assert report.equal == 3
    text = str(report)
    assert "- m.gone" in text
    assert "! m.shape: float32[3] to float32[4]" in text
    assert "0.01" in text
    json.dumps(report.as_dict())


def test_what_has_equal_digests_is_not_read(run, monkeypatch):
    read = []
    plain = orbax.read

    def spy(folder, records):
        read.extend(".".join(map(str, record.path)) for leaves in records.values() for record in leaves)
        return plain(folder, records)

    monkeypatch.setattr(orbax, "read", spy)
    ct.diff(run, run, steps=(1, 2))
    assert "small" in read
    assert not {"frozen", "shape", "gone", "new"} & set(read)


def test_many_changes_are_cut_in_the_text(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, {"m": {f"w{n}": jnp.full(1, float(step * n)) for n in range(1, 25)}})
    report = ct.diff(tmp_path / "1", tmp_path / "2")
    assert len(report.changed) == 24
    assert "and 4 smaller changes" in str(report)


def test_large_steps_are_read_in_batches(run, monkeypatch):
    monkeypatch.setattr("ckpttools.tools.diff._BATCH_BYTES", 1)
    assert len(ct.diff(run, run, steps=(1, 2)).changed) == 7


def test_an_unverified_step_is_not_compared(run, tmp_path):
    from orbax.checkpoint import v1 as ocp

    with ocp.Context():
        ocp.save_checkpointables(tmp_path / "5", {"m": {"w": np.ones(2)}})
    with pytest.raises(ct.CheckpointError, match="plain Orbax") as caught:
        ct.diff(tmp_path, run)
    assert "ct.adopt" in caught.value.fix


def test_progress_of_a_diff_ends_at_the_total(run):
    calls = []
    ct.diff(run, run, steps=(1, 2), progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert 0 < calls[-1][0] == calls[-1][1]

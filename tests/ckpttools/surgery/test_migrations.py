# SPDX-License-Identifier: Apache-2.0
"""Old formats are read, old states are migrated, and what is newer than this program is an error and no damage."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves
from tests.golden.make import STEPS, make, make_state

GOLDEN = sorted(path for path in (pathlib.Path(__file__).parents[2] / "golden").iterdir() if path.name[:6] == "format")
VERSIONS = {
    1: ct.StateVersion(1),
    2: ct.StateVersion(2, [ct.Migration(1, ct.Rename("model.a", "model.b"))]),
    3: ct.StateVersion(3, [ct.Migration(1, ct.Rename("model.a", "model.b")), ct.Migration(2, ct.Rename("b", "c"))]),
}


@pytest.mark.parametrize("golden", GOLDEN, ids=[path.name for path in GOLDEN])
def test_every_released_format_is_read_to_the_bit(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "run")
    spec = ct.CheckpointSpec(directory=tmp_path / "run", state_version=ct.StateVersion(2, [ct.Migration(1)]))
    assert ct.verify(tmp_path / "run").ok
    for step in STEPS:
        state = make_state(0)
        with ct.open(spec) as ckpt:
            report = ckpt.restore(state, step)
        assert leaves(report.state) == leaves(make_state(step))
        assert report.metrics == {"loss": 1.0 / step}
        assert state["data"].state["seed"] == 2**70
    assert [listed.pinned for listed in ct.ls(tmp_path / "run")] == [True, False]


def test_the_golden_run_of_the_present_format_is_reproducible(tmp_path):
    make(tmp_path / "run")
    golden = GOLDEN[-1]
    for step in STEPS:
        assert ct.diff(golden / str(step), tmp_path / "run" / str(step)).same
        fields = [
            (shown.reason, shown.metrics, list(shown.leaves))
            for shown in (ct.show(directory, step) for directory in (golden, tmp_path / "run"))
        ]
        assert repr(fields[0]) == repr(fields[1])


def spec_for(directory, version):
    return ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False), state_version=version)


def save(directory, version, step, name):
    with ct.open(spec_for(directory, VERSIONS[version])) as ckpt:
        ckpt.restore({})
        ckpt.save(step, {"model": {name: jnp.full(2, float(step))}})


def test_migrations_are_applied_in_order_from_the_steps_version(tmp_path):
    save(tmp_path, 1, 1, "a")
    save(tmp_path, 2, 2, "b")
    save(tmp_path, 3, 3, "c")
    with ct.open(spec_for(tmp_path, VERSIONS[3])) as ckpt:
        for step in (1, 2, 3):
            report = ckpt.restore({"model": {"c": jnp.zeros(2)}}, step)
            assert report.state["model"]["c"][0] == step
            assert bool(report.altered) == (step < 3)
    loaded = ct.load(tmp_path, {"model": {"c": jnp.zeros(2)}}, step=1, state_version=VERSIONS[3])
    assert loaded.state["model"]["c"][0] == 1
    # The control: without the migrations the old names do not fit.
    with pytest.raises(ct.StructureError, match=r"model\.c"):
        ct.load(tmp_path, {"model": {"c": jnp.zeros(2)}}, step=1)


def test_a_newer_state_version_raises_and_is_not_moved(tmp_path):
    save(tmp_path, 2, 1, "b")
    save(tmp_path, 3, 2, "c")
    with ct.open(spec_for(tmp_path, VERSIONS[2])) as ckpt:
        with pytest.raises(
            ct.VersionError, match="step 2 has version 3; this program supports versions up to 2"
        ) as caught:
            ckpt.restore({"model": {"b": jnp.zeros(2)}})
        assert "newer program" in caught.value.fix
        assert ckpt.restore({"model": {"b": jnp.zeros(2)}}, 1).step == 1
    assert (tmp_path / "2").is_dir()


def test_a_state_without_a_migration_names_the_missing_one(tmp_path):
    save(tmp_path, 1, 1, "a")
    late = ct.StateVersion(3, [ct.Migration(2, ct.Rename("b", "c"))])
    with ct.open(spec_for(tmp_path, late)) as ckpt:
        with pytest.raises(ct.VersionError, match="has version 1; the migrations begin at 2") as caught:
            ckpt.restore({"model": {"c": jnp.zeros(2)}})
        assert "ct.Migration(1" in caught.value.fix

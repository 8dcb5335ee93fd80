# SPDX-License-Identifier: Apache-2.0
"""Any damage to any file is detected and named, or harmless; plain Orbax restores a flipped bit silently."""

import contextlib
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.store import manifest
from tests.ckpttools.behaviour import faults


@pytest.fixture(scope="module", params=[False, True], ids=["uncompressed", "compressed"])
def pristine(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    faults.write_run(directory, compression=request.param)
    return directory


def check(pristine, work, *, count):
    found = list(faults.trials(pristine, work, count=count, seed=3))
    assert [trial for trial in found if trial.outcome not in ("detected", "harmless")] == []
    assert {trial.kind for trial in found} == set(faults.KINDS)
    assert sum(trial.outcome == "detected" for trial in found) > count / 2


def test_damage_of_every_kind(pristine, tmp_path):
    check(pristine, tmp_path / "work", count=40)


# In a few of a thousand failed loads TensorStore ends a read in its own thread after Orbax has closed its loop:
# what uvloop prints then cannot be caught, and says nothing about the restore.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.long
def test_two_thousand_damages(pristine, tmp_path):
    check(pristine, tmp_path / "work", count=2000)


def test_a_step_without_its_manifest_is_damaged_not_foreign(tmp_path):
    faults.write_run(tmp_path / "run")
    trial = faults.try_damage(tmp_path / "run", tmp_path / "work", "ckpttools.manifest", "deleted", random.Random(0))
    assert trial.outcome == "detected"


@contextlib.contextmanager
def _naming(text):
    """Check that an error names `text`."""
    try:
        yield
    except ct.CheckpointError as error:
        if text not in error.what:
            raise AssertionError(error.what) from error
        raise


@pytest.mark.parametrize("leaf", ["key", "mu", "count"])
def test_a_leaf_under_another_name_in_orbax_is_not_found(leaf, tmp_path):
    """A random flip hits these few letters once in thousands of trials; Orbax then returns the template."""
    faults.write_run(tmp_path)
    path = tmp_path / str(faults.NEWER) / "optimizer" / "_METADATA"
    wrong = chr(ord(leaf[0]) ^ 2) + leaf[1:]
    path.write_text(path.read_text().replace(f'[{{"key": "{leaf}"', f'[{{"key": "{wrong}"'))
    with ct.open(faults.spec_for(tmp_path)) as ckpt:
        report = ckpt.restore(faults.state_at(0))
    (rejected,) = report.rejected
    assert report.step == faults.GOOD
    assert "optimizer/_METADATA" in rejected.files


def test_every_flipped_bit_of_the_seal_is_named_or_harmless(tmp_path):
    """A random flip hits these few bytes once in hundreds of trials."""
    faults.write_run(tmp_path)
    path = tmp_path / str(faults.NEWER) / "ckpttools.manifest"
    data, before, passed = path.read_bytes(), manifest.read(path.parent), 0
    for position in range(8 * (data.index(b"\n") + 1)):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << (position % 8)
        path.write_bytes(changed)
        read = before
        with contextlib.suppress(ct.CheckpointError), _naming("ckpttools.manifest"):
            read = manifest.read(path.parent)
            passed += 1
        assert read == before
    assert passed < 100, "only the key of the format's second mention may be damaged unseen"


def test_plain_orbax_restores_a_flipped_bit_silently(tmp_path):
    """The control: the same flip in the same kind of file."""
    state = {"large": jnp.arange(3000.0) * 20}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {"large": jax.ShapeDtypeStruct((3000,), jnp.float32, sharding=sharding)}
    v1.save(tmp_path / "step", state)
    silent = 0
    path = max((p for p in (tmp_path / "step").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    for position in np.linspace(0.2, 0.8, 12):
        changed = bytearray(data)
        changed[int(len(data) * position)] ^= 1
        path.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = v1.load(tmp_path / "step", template)
        silent += not np.array_equal(restored["large"], state["large"])
    assert silent > 6

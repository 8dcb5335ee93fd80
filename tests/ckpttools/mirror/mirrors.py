# SPDX-License-Identifier: Apache-2.0
"""Save to a mirror, damage it, and restore from it: helpers of the mirror tests."""

import dataclasses
import pathlib
import time
import warnings

import jax.numpy as jnp
import numpy as np

import ckpttools as ct
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file

STATE = {"model": {"w": jnp.arange(4096.0), "b": jnp.arange(3.0)}}


def state_at(step):
    return {"model": {name: value + step for name, value in STATE["model"].items()}}


def save(spec, *steps, **options):
    """A session that saves steps and closes; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ct.open(spec) as ckpt:
            ckpt.restore(STATE) if spec.directory.exists() and any(spec.directory.glob("[0-9]*")) else None
            for step in steps:
                ckpt.save(step, state_at(step), **options)
                ckpt.wait()
        return ckpt.mirror_status, [str(each.message) for each in caught]


def restore(spec, **options):
    with ct.open(spec) as ckpt:
        report = ckpt.restore(STATE, **options)
    if report.step is not None:
        np.testing.assert_array_equal(report.state["model"]["w"], state_at(report.step)["model"]["w"])
    return report


def restore_offline(spec):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = restore(spec)
    assert report.mirror_error
    assert "only local steps were considered" in str(caught[-1].message)
    return report.step


def restore_locally(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return restore(spec).step


def damage(spec, step):
    flip_bit(largest_file(spec.directory / str(step) / "model"))


def nas(spec, step):
    """The directory of a copy at a mirror on the disk."""
    (found,) = (pathlib.Path(spec.mirror.url.removeprefix("file://"))).glob(f"{step}-*")
    return found


def changed(spec, **fields):
    return dataclasses.replace(spec, mirror=dataclasses.replace(spec.mirror, **fields))


def wait_for(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

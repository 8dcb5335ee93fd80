# SPDX-License-Identifier: Apache-2.0
"""Sizes on one device of a mesh: the same per device as without one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from remattools.compiler.partition import WHOLE_ARRAYS, find_device_sizes
from remattools.tracing import pure_call
from tests.remattools.models import Tower, loss

ROWS = 8


def _make_call(devices, kind, spec="data"):
    """Return a model and a batch that give every device the same, whatever their number."""
    model = nnx.eval_shape(lambda: Tower(depth=3))
    if devices == 1:
        return model, jax.ShapeDtypeStruct((ROWS, 4, 8), jnp.float32)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    sharding = NamedSharding(mesh, PartitionSpec(spec))
    return model, jax.ShapeDtypeStruct((ROWS * devices, 4, 8), jnp.float32, sharding=sharding)


MESHES = [
    pytest.param(4, AxisType.Auto, id="Auto, 4 devices"),
    pytest.param(8, AxisType.Auto, id="Auto, 8 devices"),
    pytest.param(8, AxisType.Explicit, id="Explicit, 8 devices"),
]


@pytest.mark.parametrize("rules", [pytest.param(None, id="plain"), pytest.param("nothing_saveable", id="regions")])
@pytest.mark.parametrize(("devices", "kind"), MESHES)
def test_residuals_and_timeline_are_per_device(devices, kind, rules):
    reports, totals = [], []
    for count in (1, devices):
        model, x = _make_call(count, kind)
        if rules is not None:
            rt.apply(model, rules, on="layers.*")
        saved, live = rt.residuals(loss, model, x), rt.timeline(loss, model, x, differentiate=True)
        rows = [(row.path, row.name, row.shape, row.bytes) for row in saved.fold() if row.kind == "computed"]
        reports.append(rows)
        totals.append((saved.total_bytes, live.peak_bytes, live.argument_bytes))
    # Explicit axes add operations to the traced program.
    assert kind == AxisType.Explicit or reports[0] == reports[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.15)


def test_a_replicated_batch_is_whole_on_every_device():
    alone, replicated = (_make_call(1, None), _make_call(4, AxisType.Auto, spec=None))
    whole = ROWS * 4
    assert replicated[1].shape[0] == whole
    one = rt.residuals(loss, *alone).computed_bytes
    # A few residuals do not grow with the batch.
    assert rt.residuals(loss, *replicated).computed_bytes == pytest.approx(4 * one, rel=0.05)


def test_without_a_mesh_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("remattools.compiler.partition.lower", None)
    call = pure_call.stage(loss, _make_call(1, None))
    assert find_device_sizes(call, differentiate=True) is WHOLE_ARRAYS


def test_explicit_axes_need_no_compile(monkeypatch):
    monkeypatch.setattr("remattools.compiler.partition.lower", None)
    call = pure_call.stage(loss, _make_call(8, AxisType.Explicit))
    sizes = find_device_sizes(call, differentiate=True)
    assert (sizes.devices, sizes.shapes) == (8, {})
    with pytest.raises(TypeError):  # control: Auto axes do
        find_device_sizes(pure_call.stage(loss, _make_call(8, AxisType.Auto)), differentiate=True)

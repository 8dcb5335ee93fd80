# SPDX-License-Identifier: Apache-2.0
"""The live buffers at the peak account for the compiler's temporaries, and say who made them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import remattools as rt
from remattools.compiler.hlo.live_buffers import find_operation, find_phase, select_op_name

WIDTH, TOKENS = 32, 128
NOTHING = {"layers.*": "nothing_saveable"}


class _Block(nnx.Module):
    def __init__(self, rngs, dropout):
        self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return x + self.out(self.drop(jax.nn.softmax(q @ k.swapaxes(-1, -2))) @ v)


class _Net(nnx.Module):
    def __init__(self, *, dropout=0.0, scan=False):
        rngs = nnx.Rngs(0)
        self.scan = scan
        if scan:
            self.layers = nnx.vmap(lambda r: _Block(r, dropout), in_axes=0)(rngs.split(3))
        else:
            self.layers = nnx.List([_Block(rngs, dropout) for _ in range(3)])

    def __call__(self, x):
        if self.scan:
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        for layer in self.layers:
            x = layer(x)
        return x


def _loss(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit(donate_argnums=(0, 1))
def _step(model, optimizer, x):
    value, gradients = nnx.value_and_grad(_loss)(model, x)
    optimizer.update(model, gradients)
    return value


def _measure(*, rules=None, mesh=None, step=False, **options):
    model = nnx.eval_shape(lambda: _Net(**options))
    sharding = None
    if mesh is not None:
        devices = jax.make_mesh(mesh, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        sharding = NamedSharding(devices, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, TOKENS, WIDTH), jnp.float32, sharding=sharding)
    if rules is not None:
        rt.apply(model, rules)
    if step:
        optimizer = nnx.eval_shape(lambda model: nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param), model)
        return rt.measure(_step, model, optimizer, x, target="cpu")
    return rt.measure(_loss, model, x, differentiate=True, target="cpu")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"rules": NOTHING}, id="nothing saved"),
        pytest.param({"dropout": 0.1}, id="dropout"),
        pytest.param({"dropout": 0.1, "rules": NOTHING}, id="dropout, nothing saved"),
        pytest.param({"scan": True}, id="scan"),
        pytest.param({"step": True, "rules": NOTHING}, id="whole donated step"),
        pytest.param({"mesh": (4, 1)}, id="mesh (4, 1)"),
        pytest.param({"mesh": (2, 2), "rules": NOTHING}, id="mesh (2, 2)"),
    ],
)
def test_live_buffers_explain_the_temporaries(options):
    measured = _measure(**options)
    assert measured.explained_share >= 0.95, str(measured)
    assert measured.explained_bytes == sum(row.bytes for row in measured.live)
    assert measured.unexplained_bytes == measured.temp_bytes - measured.explained_bytes


def test_rows_name_module_operation_and_shape_on_one_device():
    rows = _measure(mesh=(4, 1), dropout=0.1, rules=NOTHING).live
    bits = [row for row in rows if row.shape == f"u32[4,{TOKENS},{TOKENS}]"]  # 16 rows over 4 devices
    assert bits
    assert all(row.path.endswith(".drop") and "_bernoulli/_uniform" in row.operation for row in bits)


@pytest.mark.parametrize(
    ("rules", "path", "phase"),
    [
        pytest.param(None, "layers.[0:3]", "forward", id="plain"),
        pytest.param(NOTHING, "layers.2", "recomputed", id="nothing saved"),
    ],
)
def test_rows_merge_equal_layers_and_tell_recomputed_values(rules, path, phase):
    scores = f"f32[16,{TOKENS},{TOKENS}]"
    (row,) = [row for row in _measure(rules=rules).live if (row.operation, row.shape) == ("div", scores)]
    assert (row.path, row.phase) == (path, phase)
    assert row.bytes == row.count * 16 * TOKENS * TOKENS * 4


def test_the_report_states_what_is_not_explained():
    text = str(_measure())
    assert "live at the peak of the compiled program" in text
    assert "not explained" in text or "too much" in text


def test_a_measurement_keeps_its_live_buffers_in_json():
    measured = _measure()
    assert measured.live
    assert rt.Measurement.from_dict(measured.as_dict()) == measured


@pytest.mark.parametrize(
    ("op_name", "operation", "phase"),
    [
        pytest.param("jit(f)/jvp(rt:.)/rt:layers.0/dot_general", "dot_general", "forward", id="in a module"),
        pytest.param(
            "jit(f)/rt:drop/jit(_bernoulli)/jit(_uniform)/shift_right_logical",
            "_bernoulli/_uniform/shift_right_logical",
            "forward",
            id="in functions",
        ),
        pytest.param(
            "jit(f)/transpose(jvp(rt:.))/rt:a/checkpoint/rematted_computation/rt-region/sin",
            "sin",
            "recomputed",
            id="recomputed",
        ),
        pytest.param("jit(f)/transpose(jvp(rt:.))/rt:a/mul", "mul", "backward", id="backward"),
        pytest.param("jit(f)/transpose(jvp())/mul;jit(f)/jvp()/add", "mul", "backward", id="joined names"),
        pytest.param("jit(f)/rt:a/(rt:b/sin:rt:c/dot_general)", "dot_general", "forward", id="merged names"),
        pytest.param("jit(f)/add", "add", "forward", id="without a module"),
        pytest.param("", "", "forward", id="without a name"),
    ],
)
def test_a_traced_operation_is_read_from_its_name(op_name, operation, phase):
    one = select_op_name(op_name)
    assert (find_operation(one), find_phase(one)) == (operation, phase)

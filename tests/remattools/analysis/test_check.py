# SPDX-License-Identifier: Apache-2.0
"""`check` reports rules that do not help, and only those."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from tests.remattools.models import MLP, Block, Tower, inputs, loss


def _make_model():
    return nnx.eval_shape(lambda: Tower(depth=3))


def _get_codes(report):
    return {finding.code for finding in report.findings}


X = inputs(32, 16)


@pytest.fixture(autouse=True, scope="module")
def _compile_the_plain_model_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMATTOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_rules_that_work_are_ok_and_reverted():
    model = _make_model()
    before = nnx.graphdef(model)
    report = rt.check(loss, model, X, rules={"layers.*": "nothing_saveable"}, target="cpu")
    assert report.ok, str(report)
    assert report.temp_bytes[1] < report.temp_bytes[0]
    assert report.residual_bytes[1] < report.residual_bytes[0]
    assert nnx.graphdef(model) == before
    assert "ok: the rules free what they should." in str(report)


def test_without_rules_the_applied_ones_are_checked():
    model = rt.apply(_make_model(), {"layers.*": "nothing_saveable"})
    before = nnx.graphdef(model)
    report = rt.check(loss, model, X, target="cpu")
    assert report.ok, str(report)
    assert report.temp_bytes[1] < report.temp_bytes[0]
    assert nnx.graphdef(model) == before


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        pytest.param({"layers.*": "everything_saveable"}, "nothing_freed", id="saves everything"),
        pytest.param({".": "nothing_saveable"}, "no_lower_peak", id="one region around everything"),
        pytest.param({"layers.*": False}, "no_region", id="without rules"),
        pytest.param({"layers.*": rt.Remat(prevent_cse=False)}, "undone", id="merged by the compiler"),
        pytest.param({"layers.*": rt.Remat(offload=("mlp.up",))}, "offload_ignored", id="cpu without host memory"),
        pytest.param(
            {"layers.*.mlp": "everything_saveable", "layers.*.attention": "nothing_saveable"},
            "useless_rule",
            id="useless",
        ),
        pytest.param({"layers.*": "nothing_saveable", "layers.*.mlp": "nothing_saveable"}, "warning", id="nested"),
    ],
)
def test_rules_without_effect_are_reported(rules, code):
    report = rt.check(loss, _make_model(), X, rules=rules, target="cpu")
    assert code in _get_codes(report), str(report)
    assert code in str(report)
    assert not report.ok
    assert report.as_dict()["ok"] is False


def test_an_offload_that_works_is_not_reported(tpu):
    rules = {"layers.*": rt.Remat(offload=("mlp.up",))}
    report = rt.check(loss, nnx.eval_shape(lambda: Tower(depth=1)), inputs(), rules=rules, target=tpu)
    assert "offload_ignored" not in _get_codes(report), str(report)
    assert report.host_bytes > 0


@pytest.mark.parametrize("rules", [{"layers.*": rt.Remat(group=2)}, {"layers.*": rt.Remat(group="sqrt")}])
def test_groups_that_work_are_ok(rules):
    model = nnx.eval_shape(lambda: Tower(depth=4))
    report = rt.check(loss, model, X, rules=rules, target="cpu")
    assert report.ok, str(report)
    assert report.residual_bytes[1] < 0.5 * report.residual_bytes[0]


def test_on_chip_temporaries_do_not_look_like_undone_recomputation(tpu):
    model, x = nnx.eval_shape(lambda: Tower(depth=2, width=128)), inputs(8, 128, 128)
    report = rt.check(loss, model, x, rules={"layers.*": "nothing_saveable"}, target=tpu)
    assert report.temp_bytes[0] == 0
    assert report.ok, str(report)
    assert report.compiled_peak_bytes[1] < report.compiled_peak_bytes[0]
    undone = rt.check(loss, model, x, rules={"layers.*": rt.Remat(prevent_cse=False)}, target=tpu)
    assert "undone" in _get_codes(undone), str(undone)  # control


class _Twice(nnx.Module):
    """Calls one block twice: on the same values, or on what it returned."""

    def __init__(self, same):
        rngs = nnx.Rngs(0)
        self.layers, self.same = nnx.List([Block(8, rngs) for _ in range(2)]), same

    def __call__(self, x):
        once = self.layers[0](x)
        return self.layers[1](once + self.layers[0](x if self.same else once))


@pytest.mark.parametrize(
    ("same", "is_reported"), [pytest.param(True, True, id="same values"), pytest.param(False, False, id="control")]
)
def test_regions_that_recompute_the_same_values_are_reported(same, is_reported):
    model = nnx.eval_shape(lambda: _Twice(same))
    report = rt.check(loss, model, X, rules={"layers.*": "nothing_saveable"}, target="cpu")
    assert ("repeated" in _get_codes(report)) is is_reported, str(report)
    assert not is_reported or "layers.0 is called 2 times" in str(report)


def test_regions_in_equal_blocks_are_not_repeats():
    rules = {"layers.*": "dots_saveable", "layers.*.mlp": "nothing_saveable"}
    assert "repeated" not in _get_codes(rt.check(loss, _make_model(), X, rules=rules, target="cpu"))


def test_a_graphdef_split_off_before_the_rules_is_reported():
    model = Tower()
    graphdef, _ = nnx.split(model)

    def run_state(model, x):
        return loss(nnx.merge(graphdef, nnx.state(model)), x)

    assert _get_codes(rt.check(run_state, model, X, rules={"layers.*": "nothing_saveable"}, target="cpu")) == {
        "no_region"
    }


def test_a_call_without_a_model_raises():
    with pytest.raises(rt.MeasureError) as caught:
        rt.check(jnp.sum, jnp.ones(3), rules={"layers.*": "nothing_saveable"})
    assert "pass the model" in caught.value.fix


def test_repr_shows_the_verdict_and_the_codes():
    report = rt.check(loss, _make_model(), X, rules={"layers.*": "everything_saveable"}, target="cpu")
    assert repr(report).startswith("CheckReport(target='cpu', ok=False, findings=[nothing_freed")


def _train(model, x):
    value, gradients = nnx.value_and_grad(loss)(model, x)
    nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), gradients))
    return value


@pytest.mark.parametrize("wrap", [lambda fn: fn, nnx.jit], ids=["plain", "jitted"])
def test_a_whole_step_is_judged_by_its_peak(wrap):
    model, x = nnx.eval_shape(lambda: Tower(6, 32, block=MLP)), jax.ShapeDtypeStruct((64, 32, 32), jnp.float32)
    rules = {"layers.*": "nothing_saveable"}
    report = rt.check(wrap(_train), model, x, rules=rules, differentiate=False, target="cpu")
    assert report.ok, str(report)
    assert report.temp_bytes[1] < report.temp_bytes[0]
    assert "residuals" not in str(report)
    useless = rt.check(wrap(_train), model, x, differentiate=False, target="cpu")
    assert [finding.code for finding in useless.findings] == ["no_region"]  # control


def test_rules_that_still_run_out_of_memory_are_not_ok(tpu):
    model, x = nnx.eval_shape(lambda: Tower(2, 1024, block=MLP)), jax.ShapeDtypeStruct((2**21, 1, 1024), jnp.float32)
    report = rt.check(loss, model, x, rules={"layers.*": "nothing_saveable"}, target=tpu)
    assert [finding.code for finding in report.findings] == ["out_of_memory"]
    assert 'budget="fit"' in report.findings[0].message


class _Step(nnx.Module):
    def __init__(self):
        self.p = nnx.Param(jnp.float32(0.8))

    def __call__(self, x):
        a = jnp.sin(self.p * x)
        return x + a + jnp.cos(self.p * a)


class _Scan(nnx.Module):
    def __init__(self):
        self.step = _Step()

    def __call__(self, x):
        axes = (nnx.StateAxes({...: None}), nnx.Carry)
        return nnx.scan(lambda m, x: m(x), in_axes=axes, out_axes=nnx.Carry, length=20)(self.step, x)


class _Sim(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([_Scan() for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("inner", "is_ok"),
    [
        pytest.param("step", True, id="regions inside a loop inside a region"),
        pytest.param("blocks.[0:1]", False, id="control, a rule without which nothing changes"),
    ],
)
def test_a_rule_is_useless_only_if_the_peak_is_no_lower_with_it(inner, is_ok):
    rules = {"blocks.*": "nothing_saveable", inner: "nothing_saveable"}
    report = rt.check(lambda m, x: jnp.mean(m(x)), _Sim(), jnp.ones((300, 10)), rules=rules, target="cpu")
    assert ("useless_rule" not in _get_codes(report)) is is_ok
    assert report.ok is is_ok, str(report)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_regions_that_work_on_a_mesh_are_ok(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model = _make_model()

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    x = jax.ShapeDtypeStruct(
        (8 * X.shape[0], *X.shape[1:]), X.dtype, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    rules = {"layers.*": "nothing_saveable"}
    alone, sharded = (rt.check(loss, *args, rules=rules, target="cpu") for args in ((_make_model(), X), (model, x)))
    assert sharded.ok, str(sharded)
    # Under Explicit axes constants of the traced program are whole on every device.
    assert sharded.residual_bytes == pytest.approx(alone.residual_bytes, rel=0.0 if kind == AxisType.Auto else 0.1)


class _Stack(nnx.Module):
    """Layers that a scan runs."""

    def __init__(self):
        make = nnx.split_rngs(splits=6)(nnx.vmap(lambda rngs: MLP(256, rngs)))
        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_offloads_are_judged_by_what_leaves_the_device(tpu):
    model, x = nnx.eval_shape(_Stack), jax.ShapeDtypeStruct((16384, 256), jnp.float32)
    works = rt.check(loss, model, x, rules={"layers": rt.Remat(offload=("up",))}, target=tpu)
    assert works.ok, str(works)
    assert works.notes == ()
    idle = rt.check(loss, model, x, rules={"layers": rt.Remat(offload=("down",))}, target=tpu)
    assert [finding.code for finding in idle.findings] == ["offload_ignored"], str(idle)
    assert "'down' is offloaded in layers" in str(idle)
    both = rt.check(loss, model, x, rules={"layers": rt.Remat(offload=("up", "down"))}, target=tpu)
    assert both.ok, str(both)
    assert "note: 'down' is offloaded in layers" in str(both)

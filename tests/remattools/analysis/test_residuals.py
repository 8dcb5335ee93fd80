# SPDX-License-Identifier: Apache-2.0
"""`residuals`: the totals of the linearised program, by module path."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.rules.paths import format_path
from remattools.transform.modules import find_modules
from tests.remattools.models import Tower, inputs, loss


def _count_linearised_bytes(fn, *args):
    """Count the constants of the linear program: what JAX itself saves."""
    _, linear = jax.linearize(fn, *args)
    return sum(constant.nbytes for constant in jax.make_jaxpr(linear)(*args).consts)


def _count_model_bytes(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return _count_linearised_bytes(lambda p: loss(nnx.merge(graphdef, p, rest), x), params)


@jax.custom_vjp
def _double(x):
    return 2 * x


_double.defvjp(lambda x: (2 * x, jnp.cos(x)), lambda saved, g: (g * saved,))


def _scanned(weights, x):
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, weights)[0])


def _scanned_remat(weights, x):
    body = jax.checkpoint(lambda c, w: (jnp.sin(jnp.cos(c @ w)), None))
    return jnp.sum(jax.lax.scan(body, x, weights)[0])


WEIGHTS, X = jnp.ones((5, 8, 8)), jnp.ones((4, 8))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda w, x: jnp.sum(jnp.sin(x @ w[0])), id="plain"),
        pytest.param(lambda w, x: jnp.sum(jax.jit(jnp.sin)(x @ w[0])), id="jit"),
        pytest.param(_scanned, id="scan"),
        pytest.param(lambda w, x: jnp.sum(jax.checkpoint(lambda w: jnp.sin(jnp.cos(x @ w)))(w[0])), id="remat"),
        pytest.param(_scanned_remat, id="remat in scan"),
        pytest.param(lambda w, x: jnp.sum(_double(x @ w[0])), id="custom derivative"),
        pytest.param(lambda w, x: jnp.sum(jax.nn.relu(x @ w[0])), id="custom jvp"),
        pytest.param(
            lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda y: jnp.sum(jnp.sin(y)), jnp.sum, x @ w[0]), id="branches"
        ),
    ],
)
def test_totals_are_those_of_the_linearised_program(fn):
    assert rt.residuals(fn, WEIGHTS, X).total_bytes == _count_linearised_bytes(lambda w: fn(w, X), WEIGHTS) > 0


def _penalty(w, x):
    return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(x @ w[0]) ** 2))(x) ** 2)


def _solved(w, x):
    def half(_, b):
        return b / 2

    return jnp.sum(jax.lax.custom_linear_solve(lambda v: v * 2, x @ w[0], half, half) ** 2)


def _nested_scans(w, x):
    def outer(c, wi):
        c, _ = jax.lax.scan(lambda c, _: (jnp.sin(jnp.cos(c @ wi)), None), c, None, length=3)
        return c, jnp.tanh(c)

    return jnp.sum(jax.lax.scan(outer, x, w)[1])


def _mixed_types(w, x):
    halves = [jnp.sin(x.astype(kind) @ w[0].astype(kind)) for kind in (jnp.bfloat16, jnp.float16)]
    spectrum = jnp.abs(jnp.fft.fft(x @ w[1]))
    order = jnp.argsort(x @ w[2], axis=-1)
    noise = jax.random.normal(jax.random.key(0), x.shape)
    picked = jnp.take_along_axis(spectrum, order, -1) * noise
    return jnp.sum(picked) + sum(jnp.sum(half.astype(jnp.float32)) for half in halves)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(_penalty, id="a penalty on a gradient"),
        pytest.param(jax.jit(_penalty), id="jitted"),
        pytest.param(_solved, id="a linear solve"),
        pytest.param(_nested_scans, id="scan in scan"),
        pytest.param(lambda w, x: jnp.sum(jax.vmap(lambda w: jnp.sin(jnp.cos(x @ w)))(w)), id="vmap"),
        pytest.param(_mixed_types, id="bfloat16, float16, complex, integers, keys"),
    ],
)
def test_totals_of_unusual_losses(fn):
    """JAX saves scalar constants; under tracing they are part of the program."""
    _, linear = jax.linearize(lambda w: fn(w, X), WEIGHTS)
    saved = sum(value.nbytes for value in jax.make_jaxpr(linear)(WEIGHTS).consts if value.shape)
    assert rt.residuals(fn, WEIGHTS, X).total_bytes == saved > 0


def test_a_step_that_returns_its_loss_is_refused():
    def step(weights, x):
        value, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(x @ w[0])))(weights)
        return value, weights - gradient

    for fn in (step, jax.jit(step)):
        with pytest.raises(rt.MeasureError, match="computes a gradient itself"):
            rt.residuals(fn, WEIGHTS, X)


@pytest.mark.parametrize("policy", [None, "nothing_saveable", "dots_saveable", "everything_saveable"])
def test_totals_of_models_are_those_of_the_linearised_program(policy):
    model, x = Tower(), inputs()
    if policy is not None:
        rt.apply(model, {"layers.*": policy})
    report = rt.residuals(loss, model, x)
    assert report.total_bytes == _count_model_bytes(model, x)
    assert rt.residuals(lambda x: loss(model, x), x).total_bytes == report.total_bytes


class _Wrapped(nnx.Module):
    """A tower that is not the root, with something before and after its blocks."""

    def __init__(self):
        self.encoder, self.out = Tower(depth=4), nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.sin(self.out(self.encoder(x)))


@pytest.mark.parametrize("group", [2, 3, "sqrt"])
@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        pytest.param(lambda: Tower(depth=4), "layers.*", id="root"),
        pytest.param(_Wrapped, "encoder.layers.*", id="deep"),
    ],
)
def test_totals_of_groups_are_those_of_the_linearised_program(make, pattern, group):
    model, x = make(), inputs()
    plain = rt.residuals(loss, model, x)
    rt.apply(model, {pattern: rt.Remat(group=group)})
    report = rt.residuals(loss, model, x)
    assert report.total_bytes == _count_model_bytes(model, x)
    assert report.computed_bytes < 0.7 * plain.computed_bytes
    modules = {format_path(entry.path) for entry in find_modules(model)}
    computed = {row.path for row in report.rows if row.kind == "computed"}
    assert computed <= modules
    assert pattern.replace("*", "1") in computed or group != 2
    assert rt.timeline(loss, model, x, differentiate=True).peak_bytes < 0.95 * (
        rt.timeline(loss, make(), x, differentiate=True).peak_bytes
    )


class _Stacked(nnx.Module):
    def __init__(self):
        self.stack = nnx.vmap(lambda keys: nnx.Linear(8, 8, rngs=keys))(nnx.Rngs(0).split(5))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: jnp.sin(jnp.cos(layer(x))), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.stack
        )


def test_totals_of_grouped_scans_are_those_of_the_linearised_program():
    model, x = _Stacked(), inputs()
    plain = rt.residuals(loss, model, x)
    rt.apply(model, {"stack": rt.Remat(group=2)})
    report = rt.residuals(loss, model, x)
    assert report.total_bytes == _count_model_bytes(model, x)
    assert report.computed_bytes < plain.computed_bytes
    assert "no_region" not in {finding.code for finding in rt.check(loss, model, x, target="cpu").findings}


@pytest.mark.parametrize(
    ("policy", "fewer"),
    [
        pytest.param("nothing_saveable", True, id="nothing"),
        pytest.param("dots_saveable", True, id="dots"),
        pytest.param("everything_saveable", False, id="control"),
    ],
)
def test_remat_saves_fewer_bytes(policy, fewer):
    model, x = nnx.eval_shape(Tower), inputs()
    plain = rt.residuals(loss, model, x).computed_bytes
    with rt.applied(model, {"layers.*": policy}):
        assert (rt.residuals(loss, model, x).computed_bytes < 0.7 * plain) is fewer


def test_rows_have_module_paths_and_equal_layers_are_merged():
    rows = rt.residuals(loss, Tower(depth=4), inputs()).fold()
    by_name = {(row.path, row.name): row for row in rows}
    cosine = by_name["layers.[0:4].mlp", "cos"]
    assert (cosine.count, cosine.shape, cosine.bytes) == (4, (4, 6, 16), 4 * 4 * 6 * 16 * 4)
    assert "layers.*.mlp" in cosine.reason
    kernel = by_name["layers.[0:4].mlp.up.kernel", ""]
    assert (kernel.kind, kernel.count, kernel.reason) == ("parameter", 4, "is a parameter")


def test_values_inside_regions_have_full_paths():
    model = rt.apply(nnx.eval_shape(Tower), {"layers.*": "dots_saveable"})
    paths = dict(rt.residuals(loss, model, inputs()).by_module())
    assert "layers.[0:3].attention.qkv" in paths
    reasons = {row.reason for row in rt.residuals(loss, model, inputs()).rows}
    assert "by the policy of region layers.1" in reasons


def test_iterations_of_a_scan_are_counted():
    rows = rt.residuals(_scanned, WEIGHTS, X).rows
    cosine = next(row for row in rows if row.name == "cos")
    assert cosine.shape == (5, 4, 8)
    assert "each of 5 iterations" in cosine.reason


def test_checkpoint_names_are_shown():
    def run_named(weights, x):
        return jnp.sum(jnp.exp(checkpoint_name(jnp.sin(x @ weights[0]), "grown")))

    policy = jax.checkpoint_policies.save_only_these_names("grown")
    rows = rt.residuals(jax.checkpoint(run_named, policy=policy), WEIGHTS, X).rows
    assert "@grown" in {row.name for row in rows}


def test_offloaded_values_count_as_host_memory():
    model, x = nnx.eval_shape(Tower), inputs()
    rt.apply(model, {"layers.*": rt.Remat(offload=("mlp.up",))})
    report = rt.residuals(loss, model, x)
    offloaded = [row for row in report.rows if row.host]
    assert [(row.path, row.name, row.reason) for row in offloaded] == [
        (f"layers.{i}.mlp.up", "add", "offloaded to host memory") for i in range(3)
    ]
    assert report.host_bytes == sum(row.bytes for row in offloaded) > 0
    with rt.applied(model, {"layers.*": rt.Remat(save=("mlp.up",))}):  # control
        saved = rt.residuals(loss, model, x)
    assert (saved.host_bytes, saved.computed_bytes) == (0, report.computed_bytes + report.host_bytes)


def test_the_model_is_not_changed():
    model = rt.apply(Tower(), {"layers.*": "dots_saveable"})
    before = nnx.graphdef(model)
    first = rt.residuals(loss, model, inputs())
    assert nnx.graphdef(model) == before
    nnx.grad(loss)(model, inputs())  # no tracer was left in a cache
    assert rt.residuals(loss, model, inputs()) == first


def test_the_table_lists_the_largest_modules():
    text = str(rt.residuals(loss, Tower(), inputs()))
    assert "layers.[0:3].norm" in text
    assert "computed and saved" in text


def test_repr_shows_the_totals():
    report = rt.residuals(loss, Tower(), inputs())
    assert repr(report) == f"ResidualReport({len(report.rows)} rows, total_bytes={report.total_bytes})"


def test_jitted_losses_have_residuals_by_module():
    model, x = Tower(), inputs()
    assert rt.residuals(nnx.jit(loss), model, x).total_bytes == rt.residuals(loss, model, x).total_bytes


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        pytest.param(lambda: rt.residuals(nnx.grad(loss), Tower(), inputs()), "pass the loss", id="a gradient"),
        pytest.param(lambda: rt.residuals(lambda x: jnp.argmax(x), X), "return a loss", id="no gradient"),
        pytest.param(lambda: rt.residuals(lambda n: n + 1, jnp.arange(3)), "pass the model", id="integers"),
    ],
)
def test_calls_without_residuals_raise_with_a_fix(call, fix):
    with pytest.raises(rt.MeasureError) as caught:
        call()
    assert fix in caught.value.fix


_LARGE = """
import resource, time, jax, jax.numpy as jnp
from flax import nnx
import remattools as rt
bfloat = dict(param_dtype=jnp.bfloat16, use_bias=False)

class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q, self.o = (nnx.Linear(4096, 4096, rngs=rngs, **bfloat) for _ in range(2))
        self.k, self.v = (nnx.Linear(4096, 1024, rngs=rngs, **bfloat) for _ in range(2))
    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, -1, 128) for f in (self.q, self.k, self.v))
        return self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1))

class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.up = (nnx.Linear(4096, 14336, rngs=rngs, **bfloat) for _ in range(2))
        self.down = nnx.Linear(14336, 4096, rngs=rngs, **bfloat)
    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.RMSNorm(4096, rngs=rngs, param_dtype=jnp.bfloat16) for _ in range(2))
        self.attention, self.mlp = Attention(rngs), Mlp(rngs)
    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class Llama(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(128256, 4096, rngs=rngs, param_dtype=jnp.bfloat16)
        self.layers = nnx.List([Layer(rngs) for _ in range(32)])
        self.head = nnx.Linear(4096, 128256, rngs=rngs, **bfloat)
    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

model = nnx.eval_shape(Llama)
size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
assert size > 8e9, size
tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
start = time.process_time()
report = rt.residuals(lambda m, t: jax.nn.logsumexp(m(t).astype(jnp.float32)).mean(), model, tokens)
seconds = time.process_time() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
assert any(row.path.startswith("layers.[0:32]") and row.count >= 32 for row in report.fold())
print(seconds, peak, report.computed_bytes)
"""


def test_a_model_of_eight_billion_parameters_takes_seconds():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _LARGE], check=True, capture_output=True, text=True, env=env)
    seconds, peak_gib, computed = map(float, done.stdout.split())
    assert seconds < 20
    assert peak_gib < 2
    assert computed > 100 * 2**30


def test_partials_have_the_residuals_of_their_function():
    model, x = Tower(), inputs()
    whole = rt.residuals(loss, model, x).total_bytes
    assert rt.residuals(functools.partial(loss, model), x).total_bytes == whole


def test_models_with_random_keys_and_stacked_layers():
    class Dropped(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.stack = nnx.vmap(lambda keys: nnx.Linear(8, 8, rngs=keys))(rngs.split(4))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            x = nnx.scan(lambda x, layer: jnp.sin(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
            return self.dropout(x)

    model, x = Dropped(), inputs()
    before = jax.tree.map(str, nnx.to_pure_dict(nnx.state(model, nnx.RngState)))
    rows = rt.residuals(loss, model, x).rows
    assert any(row.shape == (4, *x.shape) and "each of 4 iterations" in row.reason for row in rows)
    assert jax.tree.map(str, nnx.to_pure_dict(nnx.state(model, nnx.RngState))) == before
    assert rt.measure(loss, model, x, differentiate=True, run=True, repeats=1, target="cpu").step_s > 0

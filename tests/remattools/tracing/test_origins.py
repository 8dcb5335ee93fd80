# SPDX-License-Identifier: Apache-2.0
"""Where the values of a program come from."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs
from remattools.tracing import origins, pure_call
from tests.remattools.models import Tower, inputs, loss


def find_output_origin(fn, *args):
    call = pure_call.stage(fn, args)
    program = origins.trace_with_paths(call, lambda result: result[1][:1])
    finder = origins.OriginFinder(program, call)
    return finder.find_origin(jaxprs.open_jaxpr(program).outvars[0])


def test_a_computed_value_has_module_and_primitive():
    origin = find_output_origin(lambda model, x: model.layers[1].mlp.up(x), Tower(), inputs())
    assert (origin.kind, origin.path, origin.region) == ("computed", "layers.1.mlp.up", None)


def test_arguments_and_parameters_are_distinguished():
    model, x = Tower(depth=1), inputs()
    assert find_output_origin(lambda model, x: x, model, x).kind == "argument"
    origin = find_output_origin(lambda model, x: model.head.bias[...], model, x)
    assert (origin.kind, origin.path) == ("parameter", "head.bias")


def test_values_inside_a_region_name_the_region():
    model = rt.apply(Tower(depth=1), {"layers.*": "nothing_saveable"})
    call = pure_call.stage(loss, [model, inputs()])
    program = origins.trace_with_paths(call, origins.select_loss_or_floats)
    (region,) = [equation for equation in jaxprs.open_jaxpr(program).eqns if jaxprs.is_region(equation)]
    (_, inner), *_ = jaxprs.find_subjaxprs(region)
    stacks = [str(region.source_info.name_stack)]
    located = {
        origins.locate([*stacks, str(equation.source_info.name_stack)]) for equation in jaxprs.open_jaxpr(inner).eqns
    }
    assert {place for _, place in located} == {("layers", 0)}
    assert ("layers", 0, "mlp") in {path for path, _ in located}


def test_values_of_a_scan_count_its_iterations():
    def run(x):
        return jax.lax.scan(lambda carry, row: (carry, jnp.sin(row)), 0.0, x)[1]

    assert find_output_origin(run, jnp.ones((5, 2))).iterations == 5


def test_a_gradient_penalty_is_a_loss_unlike_a_step():
    def step(model, x):
        return nnx.value_and_grad(loss)(model, x)[0]

    def penalty(model, x):
        return jnp.sum(jax.grad(lambda x: loss(model, x))(x) ** 2)

    def trace(fn):
        return origins.trace_with_paths(pure_call.stage(fn, [Tower(depth=1), inputs()]), origins.select_loss_or_floats)

    origins.check_no_gradient(trace(penalty), "reason")  # control
    with pytest.raises(rt.MeasureError, match="computes a gradient itself"):
        origins.check_no_gradient(trace(step), "reason")

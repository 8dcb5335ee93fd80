# SPDX-License-Identifier: Apache-2.0
"""What has to hold for any model under any rule: the same training, the same state, the same inference.

Used by the tests of this folder on models that others wrote. `Subject` is one such
model with its inputs; the plain model's results are computed once and kept, since
every rule is compared with them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs
from tests.remattools.exactness import assert_same_values


def mean_square(outputs: Any) -> jax.Array:
    """A loss that depends on every floating output."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "dtype")]
    squares = [jnp.mean(jnp.square(jnp.abs(leaf))) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(squares, start=jnp.zeros(()))


def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The default use of a model: its call."""
    return model(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model that somebody else wrote, small.

    Attributes:
        make: Builds it; always the same one.
        inputs: Arrays of one batch, by name.
        use: How it is used in training: `use(model, **inputs)`.
        static: Arguments of `use` that are no arrays.
        infer: Another use, without gradients (decoding with a cache); None if there is none.
    """

    make: Callable[[], Any]
    inputs: Mapping[str, Any]
    use: Callable[..., Any] = call
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    infer: Callable[..., Any] | None = None

    def model(self) -> Any:
        """A fresh instance, plain."""
        return nnx.clone(self._built)

    @functools.cached_property
    def _built(self) -> Any:
        """With weights that are nowhere zero: some models start with branches that are off."""
        model = self.make()
        number = 0
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param) and jnp.issubdtype(variable.get_value().dtype, jnp.inexact):
                value = np.asarray(variable.get_value())
                noise = np.random.default_rng(number).normal(size=value.shape).astype(value.dtype)
                variable.set_value(jnp.asarray(value + noise.astype(value.dtype) / 20))
                number += 1
        return model

    @functools.cached_property
    def trained(self) -> Any:
        """Two train steps of the plain model."""
        return train(self, self.model())

    @functools.cached_property
    def regions(self) -> int:
        """Regions that the model has by itself."""
        return regions(self, self.model())

    @functools.cached_property
    def inferred(self) -> Any:
        """Inference of the plain model."""
        return self._infer(self.model())

    def _infer(self, model: Any) -> Any:
        assert self.infer is not None
        return nnx.jit(functools.partial(self.infer, **self.static))(model, **self.inputs)


def train(subject: Subject, model: Any) -> Any:
    """Losses, gradients and state of two steps with momentum; Adam would divide noise by noise."""
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, inputs: Any) -> Any:
        def loss(model: Any) -> jax.Array:
            return mean_square(subject.use(model, **inputs, **subject.static))

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value, nnx.to_pure_dict(grads)

    results = [step(model, optimizer, dict(subject.inputs)) for _ in range(2)]
    return results, pure(model), pure(optimizer)


def pure(module: Any) -> Any:
    """The whole state as a tree of arrays."""
    return nnx.to_pure_dict(nnx.state(module))


def regions(subject: Subject, model: Any) -> int:
    """How many regions the forward pass has."""
    graphdef, state = nnx.split(model)

    def forward(state: Any, inputs: Any) -> Any:
        return mean_square(subject.use(nnx.merge(graphdef, state, copy=True), **inputs, **subject.static))

    return _count(jax.make_jaxpr(forward)(state, dict(subject.inputs)))


def _count(program: Any) -> int:
    equations = jaxprs.open_jaxpr(program).eqns
    inside = sum(_count(inner) for equation in equations for _, inner in jaxprs.find_subjaxprs(equation))
    return inside + sum(map(jaxprs.is_region, equations))


def check(subject: Subject, rules: Any, expected: int, **options: Any) -> None:
    """Under `rules` the model trains and infers exactly as without, in `expected` regions.

    The count is the control: a rule that does nothing has none.
    """
    ruled = rt.apply(subject.model(), rules, **options)
    assert regions(subject, ruled) == subject.regions + expected
    results, state, moments = train(subject, ruled)
    plain_results, plain_state, plain_moments = subject.trained
    assert_same_values(results, plain_results)
    assert_same_values(state, plain_state)
    assert_same_values(moments, plain_moments)
    if subject.infer is not None:
        again = rt.apply(subject.model(), rules, **options)
        assert_same_values(subject._infer(again), subject.inferred)
        assert_same_values(pure(again), pure(subject.model()))

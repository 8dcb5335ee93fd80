# SPDX-License-Identifier: Apache-2.0
"""Surgery on tunix's models: what a mismatch suggests is done and fits, on one device and sharded over eight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from tests.wild.test_tunix import MODELS, VOCABULARY, build

pytestmark = pytest.mark.wild
FAMILIES = ["llama3", "qwen3", "qwen3-moe", "gemma", "gemma3", "gemma4"]


class Wrapped(nnx.Module):
    """A model as a part of another, with something new beside it."""

    def __init__(self, model: Any) -> None:
        self.backbone, self.value_head = model, nnx.Linear(8, 1, rngs=nnx.Rngs(5))


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def larger(name: str) -> Any:
    cls, config = MODELS[name]
    field = "num_embed" if hasattr(config, "num_embed") else "vocab_size"
    return build(cls, dataclasses.replace(config, **{field: VOCABULARY + 8}))


def sharded(model: Any) -> Any:
    """Every variable split over eight devices along its first axis that allows it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))

    def place(leaf: jax.Array) -> jax.Array:
        axis = next((axis for axis, size in enumerate(leaf.shape) if size and size % 8 == 0), None)
        names = [None] * leaf.ndim
        if axis is not None:
            names[axis] = "x"
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names)))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    return model


def suggested(folder: Any, state: dict) -> tuple:
    with pytest.raises(ct.StructureError) as caught:
        ct.load(folder, state)
    return caught.value.surgery


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    model = build(*MODELS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    with ct.open(ct.CheckpointSpec(directory=folder, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, {"model": model})
    return request.param, folder, arrays(model)


@pytest.mark.parametrize("place", [lambda model: model, sharded], ids=["one device", "sharded"])
def test_a_larger_vocabulary(family, place):
    name, folder, before = family
    model = place(larger(name))
    fresh = arrays(model)
    placed = {key: leaf[...].sharding for key, leaf in nnx.to_flat_state(nnx.state(model))}
    surgery = suggested(folder, {"model": model})
    assert {type(operation) for operation in surgery} == {ct.Pad}
    ct.load(folder, {"model": model}, surgery=surgery)
    for key, array in arrays(model).items():
        block = tuple(map(slice, before[key].shape))
        assert (array[block] == before[key]).all()
        outside = np.ones(array.shape, bool)
        outside[block] = False
        assert (array[outside] == fresh[key][outside]).all()
    assert placed == {key: leaf[...].sharding for key, leaf in nnx.to_flat_state(nnx.state(model))}


def test_the_model_becomes_a_part_of_another_in_half_the_precision(family):
    name, folder, before = family
    model = Wrapped(build(*MODELS[name]))
    half = lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf  # noqa: E731
    nnx.update(model.backbone, jax.tree.map(half, nnx.state(model.backbone)))
    head = arrays(model.value_head)
    surgery = [ct.Rename("model.**", "model.backbone.**"), ct.Cast("model", "float32", "bfloat16")]
    with pytest.raises(ct.StructureError, match="value_head"):
        ct.load(folder, {"model": model}, surgery=surgery)
    ct.load(folder, {"model": model}, surgery=[*surgery, ct.Reinit("value_head")])
    assert all((arrays(model.value_head)[key] == array).all() for key, array in head.items())
    for key, array in arrays(model.backbone).items():
        assert array.dtype != np.float32
        assert (array == before[key].astype(array.dtype)).all()


def test_another_family_lists_every_leaf(family):
    name, folder, _ = family
    other = build(*MODELS["gemma2" if name != "gemma" else "llama3"])
    state = {"model": other}
    surgery = suggested(folder, state)
    report = ct.load(folder, state, surgery=surgery)
    assert len(report.altered) > 3

# SPDX-License-Identifier: Apache-2.0
"""Finding the modules of a model, and every path to each."""

from flax import nnx

from remattools.transform.modules import find_modules
from tests.remattools.models import Tower


def find_paths(model):
    return [entry.paths for entry in find_modules(model)]


def test_modules_come_in_the_order_of_nnx_with_containers_marked():
    entries = find_modules(Tower(depth=1))
    assert [entry.path for entry in entries][:4] == [(), ("head",), ("layers",), ("layers", 0)]
    assert [entry.path for entry in entries if entry.container] == [("layers",)]
    assert "Block" in entries[3].class_names


def test_a_shared_module_has_every_path():
    model = Tower(depth=2)
    model.first = model.layers[0]
    (shared,) = [entry for entry in find_modules(model) if entry.module is model.first]
    assert set(shared.paths) == {("first",), ("layers", 0)}


def test_a_module_that_refers_to_its_parent_ends():
    model = Tower(depth=1)
    model.layers[0].parent = model
    assert find_modules(model)[0].paths[0] == ()


def test_modules_in_plain_containers_are_found():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert find_paths({"a": [linear]}) == [[("a", 0)]]
    assert find_paths({"a": [3]}) == find_paths(3) == []

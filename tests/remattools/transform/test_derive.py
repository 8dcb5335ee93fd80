# SPDX-License-Identifier: Apache-2.0
"""A user's code does not notice the generated subclasses."""

import pickle

import jax.numpy as jnp
from flax import nnx

import remattools as rt
from remattools.transform.derive import derive, get_base_class, is_swapped
from tests.remattools.models import Block, Tower
from tests.remattools.transform.hosts import Host, check_exact


def test_a_derived_class_has_the_names_of_its_base():
    cls = derive(Block, {"depth": 3})
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Block", "Block", Block.__module__)
    assert cls.depth == 3
    assert cls is not Block
    assert issubclass(cls, Block)
    assert not is_swapped(cls), "only `swap` marks its classes"


def test_swapped_classes_know_their_base_and_pickle_by_recipe():
    cls = type(rt.apply(Tower(), "nothing_saveable", on="."))
    assert is_swapped(cls)
    assert get_base_class(cls) is Tower
    assert get_base_class(Tower) is Tower
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_registries_metaclasses_and_slots_see_no_new_class():
    registry: list[type] = []

    class Meta(type(nnx.Module)):
        def __new__(mcs, name, bases, namespace, **kwargs):
            cls = super().__new__(mcs, name, bases, namespace, **kwargs)
            registry.append(cls)
            return cls

    class Registered(nnx.Module, metaclass=Meta):
        __slots__ = ()

        def __init_subclass__(cls, *, kind, **kwargs):
            super().__init_subclass__(**kwargs)
            registry.append(cls)
            cls.kind = kind

    class Leaf(Registered, kind="leaf"):
        def __init__(self, width, rngs):
            self.proj = nnx.Linear(width, width, rngs=rngs)

        def __call__(self, x):
            return jnp.sin(self.proj(x))

    before = list(registry)
    check_exact(Leaf, lambda m, x: m.layers[1](m.layers[0](x)))
    assert registry == before
    ruled = rt.apply(Host(Leaf, None), {"layers.*": "nothing_saveable"})
    assert ruled.layers[0].kind == "leaf"

# SPDX-License-Identifier: Apache-2.0
"""google's grain, unedited: every kind of its iterators goes on where the saved one stood."""

import grain
import grain.python as older
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct

pytestmark = pytest.mark.wild
BATCHES = 8


def numbers():
    return grain.MapDataset.range(40).shuffle(seed=3).map(lambda x: np.full(2, x)).repeat(2).batch(4)


def mixed():
    return iter(grain.IterDataset.mix([numbers().to_iter_dataset(), numbers().to_iter_dataset()], [0.3, 0.7]))


def window():
    return iter(grain.experimental.WindowShuffleIterDataset(numbers().to_iter_dataset(), window_size=5, seed=1))


def packed():
    rows = numbers().to_iter_dataset().map(lambda batch: {"x": batch[:, 0]})
    return iter(grain.experimental.FirstFitPackIterDataset(rows, length_struct={"x": 4}, num_packing_bins=2))


def loader():
    sampler = older.IndexSampler(50, shard_options=older.NoSharding(), shuffle=True, num_epochs=3, seed=1)
    source = older.RangeDataSource(0, 50, 1)
    return iter(older.DataLoader(data_source=source, sampler=sampler, operations=[older.Batch(4)]))


ITERATORS = {"map": lambda: iter(numbers().to_iter_dataset()), "mixed": mixed, "window": window, "packed": packed}


def take(iterator, count):
    return [jax.tree.map(np.asarray, next(iterator)) for _ in range(count)]


def same(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


@pytest.mark.parametrize("make", [*ITERATORS.values(), loader], ids=[*ITERATORS, "loader"])
@pytest.mark.parametrize("at", [0, 3])
def test_an_iterator_goes_on_where_it_was_saved(tmp_path, make, at):
    expected = take(make(), BATCHES)
    iterator, w = make(), jnp.ones(2)
    take(iterator, at)
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"data": iterator, "train": {"data": iterator, "w": w}})
        assert same(take(iterator, 2), expected[at : at + 2]), "saving takes nothing away"
    fresh, used = make(), make()
    take(used, 1)
    with ct.open(spec) as ckpt:
        ckpt.restore({"data": fresh, "train": {"data": used, "w": w}})
    assert same(take(fresh, BATCHES - at), expected[at:])
    assert same(take(used, BATCHES - at), expected[at:])
    if at:
        assert not same(take(make(), BATCHES - at), expected[at:]), "the control: from the beginning"

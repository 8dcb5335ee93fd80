# SPDX-License-Identifier: Apache-2.0
"""Changes that people make to a state, each with the value that every leaf must have afterwards.

Used by the test of suggestions and by benchmarks/ckpt_surgery.py. Every float on disk has a value of its own, so a leaf
that lands at a wrong place is seen.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx

import ckpttools as ct
from ckpttools.spec.operations import Operation, as_code
from ckpttools.surgery.make_plan import make_restore_plan
from ckpttools.surgery.plan import Changes, RestorePlan
from ckpttools.surgery.suggest import find_suggestion
from ckpttools.surgery.suggestion import Suggestion
from ckpttools.tree import flatten, snapshot
from ckpttools.tree.write_back import fill_state

type Leaves = dict[str, np.ndarray[Any, Any]]
type State = dict[str, Any]
type Origin = Callable[[str, Leaves], Any]
"""From the name of a leaf and the leaves on disk to the value it must have: an array, the name of a leaf on disk, or
None for the value of the new state."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        name: What was done.
        old: Makes the state that is saved.
        new: Makes the state that is loaded into.
        origin: Where each leaf must come from.
    """

    name: str
    old: Callable[[], State]
    new: Callable[[], State]
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one change.

    Attributes:
        suggested: The suggested operations as code.
        right: Whether every leaf has the value it must have.
        kept: Share of the floats on disk that are in the state afterwards, from 0 to 1.
        possible: Share that the right answer keeps.
        wrong: A leaf with a wrong value, or why nothing was loaded.
    """

    suggested: tuple[str, ...]
    right: bool
    kept: float
    possible: float
    wrong: str = ""


def read_leaves(state: State) -> Leaves:
    """Return all arrays of a state by name; typed keys as their data."""
    found = {}
    for item, value in state.items():
        tree = nnx.to_pure_dict(nnx.state(value)) if isinstance(value, nnx.Pytree) else value
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))) for key in path]
            is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            found[".".join([item, *names])] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return found


def fill_with_values(state: State, seed: int) -> State:
    """Give every float of a state a value of its own, and every counter the same number of updates."""
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.full_like(leaf, 7) if seed == 0 and leaf.dtype == jnp.int32 else leaf

    filled = {}
    for item, value in state.items():
        if isinstance(value, nnx.Pytree):
            nnx.update(value, jax.tree.map(fill, nnx.state(value)))
            filled[item] = value
        else:
            filled[item] = jax.tree.map(fill, value)
    return filled


type Load = Callable[[State, State], tuple[tuple[Any, ...] | None, State]]
"""Saves the first state and loads it into the second with what the error suggests: the surgery, the filled state."""


def try_change(change: Change, load: Load) -> Outcome:
    """Save the old state, load the new one with what the error suggests, and compare every leaf.

    Args:
        change: The change.
        load: `load_from_disk`, or `load_from_memory`, which plans and computes the same without a run.
    """
    old = fill_with_values(change.old(), 0)
    new = fill_with_values(change.new(), 1)
    stored, fresh = read_leaves(old), read_leaves(new)
    expected = {}
    for name, leaf in fresh.items():
        value = change.origin(name, stored)
        expected[name] = leaf if value is None else stored[value] if isinstance(value, str) else value
    possible = _measure_kept(stored, expected)
    surgery, filled = load(old, new)
    if surgery is None:
        return Outcome((), possible == 0, 0.0, possible, "nothing was suggested")
    after = read_leaves(filled)
    wrong = next((name for name, value in expected.items() if not _is_equal(after[name], value)), "")
    code = tuple(map(as_code, surgery))
    return Outcome(code, not wrong, _measure_kept(stored, after), possible, wrong)


def load_from_disk(old: State, new: State) -> tuple[tuple[Any, ...] | None, State]:
    """Load through a run on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        run = pathlib.Path(scratch) / "run"
        with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
            ckpt.save(1, old)
        try:
            return (), dict(ct.load(run, new).state)
        except ct.StructureError as error:
            surgery = error.surgery
        return (surgery, dict(ct.load(run, new, surgery=surgery).state)) if surgery else (None, new)


def load_from_memory(old: State, new: State) -> tuple[tuple[Any, ...] | None, State]:
    """Load by the same plan and the same steps, with arrays that never were on the disk."""
    taken = snapshot.take(old, None).items
    templates = {item: flatten.flatten_item(value, template=True) for item, value in new.items()}

    def replan(operations: Sequence[Operation]) -> RestorePlan:
        return make_restore_plan(taken, templates, Changes(surgery=ct.Surgery(operations)))

    plan = replan(())
    suggestion = find_suggestion(plan, replan) if plan.differences else Suggestion()
    if plan.differences and not suggestion:
        return None, new
    plan = replan(suggestion.operations)
    arrays = {
        item: {record.path: taken[item].host_arrays[record.path] for record in records if record.is_in_orbax}
        for item, records in plan.collect_records().items()
    }
    return suggestion.operations, fill_state(new, plan.make_host_items(templates, arrays))


def _is_equal(one: Any, other: Any) -> bool:
    return one.shape == np.shape(other) and one.dtype == other.dtype and bool((one == other).all())


def _measure_kept(stored: Leaves, after: Leaves) -> float:
    floats = [leaf.astype(np.float32).ravel() for leaf in after.values() if _is_float(leaf)]
    there = np.concatenate([np.zeros(0, np.float32), *floats])
    kept = total = 0
    for leaf in stored.values():
        if _is_float(leaf):
            values = leaf.astype(np.float32).ravel()
            half = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            kept += int((np.isin(values, there) | np.isin(half, there)).sum()) * leaf.dtype.itemsize
            total += leaf.nbytes
    return kept / total if total else 1.0


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


# States


class Net(nnx.Module):
    """Two layers of different shapes."""

    def __init__(self) -> None:
        self.first, self.second = nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1))


def trained(tx: optax.GradientTransformation, model: Callable[[], Any] = Net) -> Callable[[], State]:
    """Return a maker of a model and its optimizer."""

    def make() -> State:
        net = model()
        return {"model": net, "optimizer": nnx.Optimizer(net, tx, wrt=nnx.Param)}

    return make


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Return an array whose values are filled in later."""
    return jnp.zeros(shape, dtype)


def linear(inputs: int, outputs: int) -> State:
    """Return a kernel and a bias."""
    return {"kernel": array(inputs, outputs), "bias": array(outputs)}


def torch_linear(inputs: int, outputs: int) -> State:
    """Return a weight as PyTorch stores it, and a bias."""
    return {"weight": array(outputs, inputs), "bias": array(outputs)}


def block(width: int = 4) -> State:
    """Return a transformer's block."""
    return {
        "attn": {name: linear(width, width) for name in ("q", "k", "v", "o")},
        "mlp": {"up": linear(width, 2 * width), "down": linear(2 * width, width)},
        "norm": {"scale": array(width), "bias": array(width)},
    }


def tower(depth: int = 3, key: str = "layers") -> State:
    """Return unrolled blocks with an embedding and a head."""
    return {
        "embed": {"embedding": array(11, 4)},
        key: {str(n): block() for n in range(depth)},
        "head": linear(4, 6),
    }


def scanned(depth: int = 3, key: str = "layers") -> State:
    """Return the blocks of a scan with an embedding and a head."""
    layers = jax.tree.map(lambda *each: jnp.stack(each), *(block() for _ in range(depth)))
    return {**tower(depth, key), key: layers}


def sequence(*layers: Any) -> Callable[[], State]:
    """Return a maker of a model that is an `nnx.Sequential`: sizes are linear layers, "drop" is dropout."""

    def make() -> State:
        rngs = nnx.Rngs(0)
        made = [
            nnx.Dropout(0.1, rngs=nnx.Rngs(5)) if each == "drop" else nnx.Linear(*each, rngs=rngs) for each in layers
        ]
        return {"model": nnx.Sequential(*made)}

    return make


def adam_of(params: State) -> State:
    """Return params with the state of optax.adam as plain pytrees."""
    return {"model": params, "opt": optax.adam(1e-3).init(params)}


# Where leaves come from


def same(name: str, old: Leaves) -> Any:
    """Take the leaf of the same name, if there is one of the same form."""
    return name if name in old else None


def renamed(*pairs: tuple[str, str]) -> Origin:
    """Take the leaf whose name has each new part replaced by an old one."""

    def origin(name: str, old: Leaves) -> Any:
        before = name
        for new, part in pairs:
            before = before.replace(new, part)
        return before if before in old else None

    return origin


def stacked_from(
    old_key: str, new_key: str, transposed: bool = False, names: tuple[tuple[str, str], ...] = ()
) -> Origin:
    """Stack the layers below one key."""

    def origin(name: str, old: Leaves) -> Any:
        for new, part in names:
            name = name.replace(new, part)
        if f".{new_key}." not in name:
            return same(name, old)
        head, _, tail = name.partition(f".{new_key}.")
        found = []
        while (each := f"{head}.{old_key}{'.' if old_key else ''}{len(found)}.{tail}") in old:
            found.append(old[each].T if transposed and old[each].ndim == 2 else old[each])
        return np.stack(found)

    return origin


def unstacked_from(key: str, new_key: str) -> Origin:
    """Take one layer of a stacked leaf."""

    def origin(name: str, old: Leaves) -> Any:
        if f".{new_key}." not in name:
            return same(name, old)
        head, _, tail = name.partition(f".{new_key}.")
        number, _, rest = tail.partition(".")
        return old[f"{head}.{key}.{rest}"][int(number)]

    return origin


def fresh_where(*words: str, otherwise: Origin = same) -> Origin:
    """Keep the new value where a name has one of the words."""
    return lambda name, old: None if any(word in name for word in words) else otherwise(name, old)


def block_of(new: Callable[[], State], *words: str) -> Origin:
    """Put the shared block of a leaf of another size into the new leaf."""
    fresh = read_leaves(fill_with_values(new(), 1))

    def origin(name: str, old: Leaves) -> Any:
        if name not in old or not any(word in name for word in words):
            return same(name, old)
        value = fresh[name].copy()
        where = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, old[name].shape))
        value[where] = old[name][where]
        return value

    return origin

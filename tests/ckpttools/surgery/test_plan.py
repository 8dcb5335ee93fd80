# SPDX-License-Identifier: Apache-2.0
"""Which leaf goes where, decided from names and forms alone; and what a mismatch suggests."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.spec.operations import as_code
from ckpttools.surgery import array_operations, make_plan, resize, suggest
from ckpttools.surgery.plan import Changes
from ckpttools.tree import flatten
from ckpttools.tree.leaf_paths import to_names
from ckpttools.tree.leaves import describe
from ckpttools.tree.records import Record


def stored(state):
    items = {}
    for item, value in state.items():
        flat = flatten.flatten_item(value)
        records = tuple(describe(item, leaf) for leaf in flat.leaves)
        items[item] = types.SimpleNamespace(records=records, skeletons=flat.skeletons)
    return items


def plan(disk, state, operations=(), **options):
    templates = {item: flatten.flatten_item(value, template=True) for item, value in state.items()}
    return make_plan.make_restore_plan(
        stored(disk), templates, Changes(surgery=ct.Surgery(operations), **options)
    )


def sources(made):
    return {".".join(leaf.path): ".".join(leaf.source.stored_path) if leaf.source else None for leaf in made.placed_leaves}


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nested(*paths, form=None):
    tree_of: dict = {}
    for path in paths:
        *parents, last = path.split(".")
        at = tree_of
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = form or leaf(2)
    return tree_of


@pytest.mark.parametrize(
    ("old", "new", "operation"),
    [
        pytest.param("m.enc.w", "m.dec.w", ct.Rename("m.enc", "m.dec"), id="a part above"),
        pytest.param("m.enc.w", "m.dec.w", ct.Rename("enc", "dec"), id="at any depth"),
        pytest.param("m.0.q.w", "m.0.attn.q.w", ct.Rename("q", "attn.q"), id="one more level"),
        pytest.param("m.b.3.q.w", "m.layers.3.wq", ct.Rename("m.b.*.q.w", "m.layers.*.wq"), id="a star"),
        pytest.param("m.x.y.q", "m.z.x.y.q", ct.Rename("m.**.q", "m.z.**.q"), id="two stars"),
        pytest.param("m.q", "m.z.q", ct.Rename("m.**.q", "m.z.**.q"), id="two stars of nothing"),
        pytest.param("m.v_proj", "m.attn.v", ct.Rename("m.{q,v}_proj", "m.attn.*"), id="braces"),
        pytest.param("m.h12.w", "m.h.12.w", ct.Rename("m.h*", "m.h.*"), id="inside a segment"),
        pytest.param("m.w", "n.w", ct.Rename("m.**", "n.**"), id="an item"),
        pytest.param("m.a.a.w", "m.b.a.w", ct.Rename("a", "b"), id="the outermost"),
        pytest.param("m.a.w", "n.w", ct.Rename("m.a", "n"), id="a part becomes an item"),
    ],
)
def test_a_rename_means_everything_below(old, new, operation):
    made = plan(nested(old), nested(new), [operation])
    assert made.differences == ()
    assert sources(made) == {new: old}
    assert plan(nested(old), nested(new)).differences  # the control


def test_slices_count_integer_segments():
    disk, state = nested("m.l.0.w", "m.l.1.w", "m.l.2.w"), nested("m.l.0.w", "m.l.1.w", "m.top.2.w")
    assert sources(plan(disk, state, [ct.Rename("m.l.[-1]", "m.top.*")]))["m.top.2.w"] == "m.l.2.w"


def test_operations_are_applied_in_order():
    disk, state = nested("m.a", "m.b"), nested("m.a", "m.b")
    swap = [ct.Rename("m.a", "m.t"), ct.Rename("m.b", "m.a"), ct.Rename("m.t", "m.b")]
    assert sources(plan(disk, state, swap)) == {"m.a": "m.b", "m.b": "m.a"}


def test_what_is_dropped_or_kept_is_not_read():
    disk, state = nested("m.enc.w", "m.old.w", "m.head.w"), nested("m.enc.w", "m.head.k", "m.lora.a")
    state = {"m": jax.tree.map(lambda each: jnp.ones(each.shape), state["m"])}
    made = plan(disk, state, [ct.Drop("m.old"), ct.Reinit("{head,lora}")])
    assert made.differences == ()
    assert [record.path for record in made.collect_records()["m"]] == [("enc", "w")]
    assert {".".join(source.stored_path) for source in made.dropped_leaves} == {"m.old.w", "m.head.w"}


def test_only_looks_at_nothing_else():
    disk, state = nested("m.enc.w", "m.old.w"), nested("m.enc.w", "m.new.w", "opt.mu.w")
    made = plan(disk, state, only=("m.enc",))
    assert (made.differences, list(made.collect_records())) == ((), ["m"])
    lacking = plan(disk, nested("m.enc.w", "m.enc.b"), only=("m.enc",))
    assert [str(each) for each in lacking.differences] == ["m.enc.b: not on disk"]


@pytest.mark.parametrize(
    "operation",
    [ct.Rename("m.encoder.w", "m.x"), ct.Drop("m.encodr"), ct.Cast("m.encodr", "int8", "int32"), ct.Reinit("m.encodr")],
    ids=lambda operation: type(operation).__name__,
)
def test_a_pattern_that_means_nothing_names_the_closest(operation):
    with pytest.raises(ct.StructureError, match="matches nothing") as caught:
        plan(nested("m.encode.k"), nested("m.encode.k"), [operation])
    assert "'m.encode" in caught.value.fix
    with pytest.raises(ct.StructureError, match=r"only='m\.x' matches nothing in the state"):
        plan(nested("m.y"), nested("m.y"), only=("m.x",))


def test_a_rename_loses_no_leaf():
    with pytest.raises(ct.StructureError, match=r"the name m.b: m.a and m.b|the name m.b: m.b and m.a") as caught:
        plan(nested("m.a", "m.b"), nested("m.b"), [ct.Rename("m.a", "m.b")])
    assert "ct.Drop" in caught.value.fix


def test_a_cast_is_allowed_for_that_very_dtype():
    disk, state = (
        {"m": {"w": leaf(2), "n": leaf(dtype=jnp.int32)}},
        {"m": {"w": leaf(2, dtype=jnp.bfloat16), "n": leaf()}},
    )
    cast = ct.Cast("m", "float32", "bfloat16")
    assert [str(each) for each in plan(disk, state, [cast]).differences] == ["m.n: int32[] on disk, float32[] here"]
    assert len(plan(disk, state, [ct.Cast("m", "float16", "bfloat16")]).differences) == 2


def test_a_migration_passes_over_what_a_run_does_not_have():
    first = ct.Surgery([ct.Rename("ema", "average"), ct.Reinit("m.new.x"), ct.Rename("m.a", "m.b")])
    second = ct.Surgery([ct.Rename("m.b", "m.c"), ct.Rename("m.new", "m.newer")])
    state = {"m": {"c": jnp.ones(2), "newer": {"x": jnp.ones(3)}}}
    made = plan(nested("m.a"), state, migrations=(first, second))
    assert made.differences == ()
    assert sources(made) == {"m.c": "m.a", "m.newer.x": None}


# Arrays


def altered(array, operations, template):
    record = Record(path=("w",), kind="array", shape=array.shape, dtype=array.dtype.name)
    shape = resize.compute_shape("m.w", operations, array.shape, template.shape)
    target = Record(path=("w",), kind="array", shape=shape, dtype=template.dtype.name)
    return array_operations.apply("m.w", operations, record, array, target, template)


ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_pad_and_slice_take_and_place_blocks():
    wide = np.full((5, 2), 9, np.float32)
    assert altered(ROWS, [ct.Pad("w")], wide)[:, 0].tolist() == [0, 2, 4, 9, 9]
    assert altered(ROWS, [ct.Pad("w", fill=-1, start=(1,))], wide)[:, 0].tolist() == [-1, 0, 2, 4, -1]
    assert altered(ROWS, [ct.Slice("w")], np.zeros((2, 2), np.float32)).tolist() == [[0, 1], [2, 3]]
    assert altered(ROWS, [ct.Slice("w", start=(1,))], np.zeros((2, 2), np.float32)).tolist() == [[2, 3], [4, 5]]
    both = [ct.Pad("w", fill=7), ct.Slice("w", start=(0, 1))]
    assert altered(ROWS, both, np.zeros((4, 1), np.float32)).tolist() == [[1], [3], [5], [7]]
    assert altered(ROWS, both, ROWS).tolist() == ROWS.tolist()


def test_a_cast_comes_before_the_fill():
    template = np.full((4, 2), 1.5, jnp.bfloat16)
    made = altered(ROWS, [ct.Pad("w"), ct.Cast("w", "float32", "bfloat16")], template)
    assert (made.dtype, made[3, 0]) == (template.dtype, 1.5)


@pytest.mark.parametrize(
    ("values", "to", "text"),
    [
        pytest.param([1.0, 2.5], "int32", r"2.5 at \[1\] would become 2", id="a fraction"),
        pytest.param([1.0, float("nan")], "int32", "nan", id="nan"),
        pytest.param([1e30], "float16", "would become inf", id="too large"),
        pytest.param(np.array([300], np.int32), "int8", "300", id="too wide"),
        pytest.param(np.array([1, 9], np.int32), "int4", r"9 at \[1\] would become -7", id="four bits"),
        pytest.param(np.array([2**24 + 1], np.int32), "float32", "16777217", id="an int that is rounded"),
        pytest.param(np.array([1 + 1j], np.complex64), "float32", "1j", id="an imaginary part"),
    ],
)
def test_a_cast_that_loses_the_value_is_refused(values, to, text):
    array = values if isinstance(values, np.ndarray) else np.array(values, np.float32)
    with pytest.raises(ct.StructureError, match=text):
        altered(array, [ct.Cast("w", array.dtype.name, to)], np.zeros(array.shape, jnp.dtype(to)))
    whole = np.array([1, 2], array.dtype)
    assert altered(whole, [ct.Cast("w", array.dtype.name, to)], np.zeros(2, jnp.dtype(to))).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("operation", "shape"),
    [(ct.Slice("w", start=(2,)), (2, 2)), (ct.Pad("w", start=(3,)), (5, 2)), (ct.Slice("w", start=(0, 0, 1)), (2, 2))],
    ids=["slice", "pad", "rank"],
)
def test_a_block_that_leaves_its_array_is_refused(operation, shape):
    with pytest.raises(ct.StructureError, match="exceeds an array") as caught:
        altered(ROWS, [operation], np.zeros(shape, np.float32))
    assert "is the last position that fits" in caught.value.fix


@pytest.mark.parametrize("operation", [ct.Reinit("m.w"), ct.Pad("m.w")], ids=["reinit", "pad"])
def test_an_abstract_state_has_no_values_to_keep(operation):
    def restore():
        made = plan(nested("m.w"), {"m": {"w": leaf(5)}}, [operation])
        made.make_host_items(["m"], {"m": {("w",): np.zeros(2, np.float32)}})

    with pytest.raises(ct.StructureError, match="abstract") as caught:
        restore()
    assert "initialised model" in caught.value.fix


# Suggestions: what they say is done, and fits.


def mismatch(disk, state, asked=()):
    here = [
        to_names((item, *part.path)) for item, value in state.items() for part in flatten.flatten_item(value).leaves
    ]
    with pytest.raises(ct.StructureError) as caught:
        suggest.require_match(3, plan(disk, state, asked), here, lambda more: plan(disk, state, [*asked, *more]), asked)
    return caught.value


BLOCKS = [f"m.blocks.{n}.{part}" for n in range(12) for part in ("attn.q", "attn.k", "mlp.up", "mlp.down")]
LAYERS = [name.replace("blocks", "layers") for name in BLOCKS]


@pytest.mark.parametrize(
    ("disk", "state", "expected"),
    [
        pytest.param(nested(*BLOCKS), nested(*LAYERS), ['ct.Rename("m.blocks", "m.layers")'], id="a part above"),
        pytest.param(
            nested(*BLOCKS),
            nested(*[name.replace("attn", "attention") for name in BLOCKS]),
            ['ct.Rename("m.blocks.*.attn", "m.blocks.*.attention")'],
            id="in every block",
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*[name.replace("attn", "attention") for name in LAYERS]),
            ['ct.Rename("m.blocks", "m.layers")', 'ct.Rename("m.blocks.*.attn", "m.layers.*.attention")'],
            id="a part and what is below it",
        ),
        pytest.param(
            nested("m.enc.w", "m.dec.w", "m.dec.b"), nested("m.enc.w"), ['ct.Drop("m.dec")'], id="a part too much"
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*BLOCKS, *[f"m.blocks.{n}.lora.{part}" for n in range(12) for part in "ab"]),
            ['ct.Reinit("m.blocks.*.lora")'],
            id="additions",
        ),
        pytest.param(
            {"m": {"enc": {"emb": leaf(10, 4), "k": leaf(3)}}},
            {"m": {"net": {"emb": leaf(12, 4), "k": leaf(3)}}},
            ['ct.Pad("m.net.emb")', 'ct.Rename("m.enc", "m.net")'],
            id="another name and longer",
        ),
        pytest.param(
            nested("m.emb", form=leaf(10, 4)), nested("m.emb", form=leaf(12, 4)), ['ct.Pad("m.emb")'], id="longer"
        ),
        pytest.param(
            nested("m.emb", form=leaf(10, 4)),
            nested("m.emb", form=leaf(8, 6)),
            ['ct.Pad("m.emb")', 'ct.Slice("m.emb")'],
            id="longer and shorter",
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*BLOCKS, form=leaf(2, dtype=jnp.bfloat16)),
            ['ct.Cast("m.**", "float32", "bfloat16")'],
            id="another dtype",
        ),
        pytest.param(
            nested("m.0.norm_a", "m.1.norm_a", "m.2.norm_a"),
            nested("m.0.norm_b", "m.1.norm_b", "m.2.other", "m.2.more"),
            ['ct.Drop("m.2.norm_b")', 'ct.Reinit("m.2")', 'ct.Rename("m.*.norm_a", "m.*.norm_b")'],
            id="more is renamed than is missing",
        ),
        pytest.param(nested("m.w", form=leaf(4)), nested("m.w", form=leaf(2, 2)), ['ct.Reinit("m.w")'], id="rank"),
        pytest.param(
            nested("params.w", "params.b"), nested("m.w", "m.b"), ['ct.Rename("params.**", "m.**")'], id="item"
        ),
        pytest.param(nested("m.w"), nested("m.w", "opt.mu", "opt.nu"), ['ct.Reinit("opt.**")'], id="no such item"),
        pytest.param(
            nested("m.a.w", "m.a.keep"), nested("m.b.w", "m.a.keep"), ['ct.Rename("m.a.w", "m.b.w")'], id="not the rest"
        ),
        pytest.param(
            {"m": {"a": {"x": leaf(2)}, "b": {"y": leaf(3)}}},
            {"m": {"a": {"y": leaf(3)}, "b": {"x": leaf(2)}}},
            ['ct.Rename("m.a.x", "m.b.x")', 'ct.Rename("m.b.y", "m.a.y")'],
            id="names that cross",
        ),
        pytest.param(nested("m.w", form=leaf(2, 3)), nested("m.w", form=leaf(3, 2)), ['ct.Reinit("m.w")'], id="turned"),
        pytest.param(
            nested("m.w", form=leaf(2, dtype=jnp.int4)),
            nested("m.w", form=leaf(2, dtype=jnp.int8)),
            ['ct.Cast("m.**", "int4", "int8")'],
            id="a rare dtype",
        ),
        pytest.param(
            {"m": {"a.b": leaf(2), "c": leaf(3)}},
            {"m": {"a.c": leaf(2), "c": leaf(3)}},
            ['ct.Rename("m.a*b", "m.a*c")'],
            id="dots in names",
        ),
        pytest.param(
            {"m": {"b[0]": leaf(3), "k": leaf(1)}}, {"m": {"k": leaf(1)}}, ['ct.Drop("m.b*0*")'], id="brackets in names"
        ),
    ],
)
def test_the_suggested_surgery_fits(disk, state, expected):
    state = jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), state)
    error = mismatch(disk, state)
    assert sorted(map(as_code, error.surgery)) == sorted(expected)
    assert all(line in error.fix for line in expected)
    assert plan(disk, state, error.surgery).differences == ()


def test_no_surgery_is_suggested_that_would_touch_what_fits():
    """`m.a*` also means `m.ab`, which came back as it should; no pattern means the one alone."""
    error = mismatch({"m": {"a*": leaf(2), "ab": leaf(2)}}, {"m": {"ab": jnp.ones(2)}})
    assert error.surgery == ()
    assert "surgery=" not in error.fix
    assert error.mismatches == ("m.a*: on disk, not in the state passed in",)


def test_a_suggestion_goes_on_from_what_was_asked_for():
    disk, state = nested("m.enc.w", "m.old.w"), nested("m.net.w")
    state = jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), state)
    error = mismatch(disk, state, [ct.Rename("m.enc", "m.net")])
    assert list(map(as_code, error.surgery)) == ['ct.Rename("m.enc", "m.net")', 'ct.Drop("m.old")']
    assert plan(disk, state, error.surgery).differences == ()


@pytest.mark.parametrize(
    ("fill", "dtype"),
    [(0.5, "int32"), (float("nan"), "int32"), (2**40, "int32"), (1e39, "float32"), (9, "int4"), (2, "bool")],
)
def test_a_fill_that_the_array_cannot_hold_is_refused(fill, dtype):
    record = Record(path=("w",), kind="array", shape=(2,), dtype=dtype)
    target = Record(path=("w",), kind="array", shape=(3,), dtype=dtype)
    with pytest.raises(ct.StructureError, match=f"{dtype} cannot hold") as caught:
        array_operations.apply("m.w", [ct.Pad("m.w", fill=fill)], record, np.ones(2, jnp.dtype(dtype)), target, None)
    assert 'fill="template"' in caught.value.fix

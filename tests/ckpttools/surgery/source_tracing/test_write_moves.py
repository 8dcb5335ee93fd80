# SPDX-License-Identifier: Apache-2.0
"""Operations give each leaf the name that its trace says, one at a time, and are as few as that allows."""

import itertools

import pytest

from ckpttools.spec.operations import as_code
from ckpttools.surgery.renaming import Parts, rename_leaf
from ckpttools.surgery.source_tracing.kinds import PLACE
from ckpttools.surgery.source_tracing.tracing import Trace
from ckpttools.surgery.source_tracing.write_moves import MAX_OPERATIONS, TooManyOperationsError, write_moves


def split(name):
    return tuple(name.split("."))


def rename(old, new, how="rename"):
    return Trace(how=how, old=split(old), new=split(new), sources=(split(old),), targets=(split(new),))


def write(moves, staying=(), *, allow_parts=True):
    names = [split(name) for name in (*moves, *staying)]
    return write_moves([rename(*move) for move in moves.items()], names, allow_parts=allow_parts)


def apply_renames(operations, names):
    """Return what each name becomes; two leaves must never have one name."""
    now = {name: split(name) for name in names}
    for operation in operations:
        matches = Parts(now.values()).match(operation.pattern)
        now = {name: rename_leaf(operation, path, matches) for name, path in now.items()}
        assert len(set(now.values())) == len(now), f"{operation} gives two leaves one name"
    return {name: ".".join(path) for name, path in now.items()}


BLOCKS = [f"m.blocks.{number}.{part}" for number in range(12) for part in ("attn.q", "mlp.up")]


@pytest.mark.parametrize(
    ("moves", "staying", "count"),
    [
        pytest.param({name: name.replace("blocks", "layers") for name in BLOCKS}, [], 1, id="a part above"),
        pytest.param({name: name.replace("attn", "att") for name in BLOCKS if "attn" in name}, [], 1, id="each layer"),
        pytest.param({"m.a.x": "m.b.x", "m.a.y": "m.b.y"}, ["m.c"], 1, id="a part"),
        pytest.param({"m.a.x": "m.b.x"}, ["m.a.y"], 1, id="one leaf of a part"),
        pytest.param({"m.a": "m.b", "m.b": "m.c"}, [], 2, id="a chain"),
        pytest.param({"m.a": "m.b", "m.b": "m.a"}, [], 3, id="two that swap"),
        pytest.param({"m.a.x": "m.b.x", "m.b.x": "m.a.x"}, ["m.a.y", "m.b.y"], 3, id="leaves that swap"),
        pytest.param({"m.x.0.w": "m.x.1.w", "m.x.1.w": "m.x.2.w"}, ["m.y"], 2, id="a sequence that moves up"),
        pytest.param(
            {"m.a.x": "m.d", "m.d": "m.e", "m.a.y": "m.b.y", "m.a.w": "m.b.w"}, [], 3, id="out of a renamed part"
        ),
        pytest.param({"m.0.w": "m.0.v", "m.1.w": "m.1.v"}, ["m.2.w"], 2, id="not in each layer"),
        pytest.param({"m.w": "n.w", "m.b": "n.b"}, ["o.m.w"], 1, id="an item"),
        pytest.param({"m.enc.w": "m.net.w", "n.enc.w": "n.net.w"}, ["o.enc.w"], 2, id="not at any depth"),
        pytest.param({f"{at}.enc.w": f"{at}.net.w" for at in ("m", "opt.mu", "opt.nu")}, [], 1, id="at any depth"),
    ],
)
def test_renames_give_each_leaf_its_new_name(moves, staying, count):
    operations = write(moves, staying)
    assert apply_renames(operations, [*moves, *staying]) == moves | {name: name for name in staying}
    assert len(operations) == count


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:], ids=str)
def test_every_exchange_of_names_is_written(order):
    moves = {f"m.{'abcd'[old]}": f"m.{'abcd'[new]}" for old, new in enumerate(order) if old != new}
    staying = [f"m.{'abcd'[at]}" for at in range(4) if order[at] == at]
    assert apply_renames(write(moves, staying), [*moves, *staying]) == moves | {name: name for name in staying}


def test_without_parts_each_leaf_is_renamed():
    moves = {"m.a.x": "m.b.x", "m.a.y": "m.b.y"}
    assert len(write(moves, allow_parts=False)) == 2
    assert len(write(moves)) == 1, "control"


def test_a_list_that_nobody_would_read_is_not_written():
    words = [a + b for a, b in itertools.product("abcdefghijklmnop", repeat=2)]
    moves = {f"m.{word}": f"m.{word[::-1]}_{word}" for word in words}
    few = dict(list(moves.items())[:MAX_OPERATIONS])
    with pytest.raises(TooManyOperationsError):
        write(moves)
    assert len(write(few)) == MAX_OPERATIONS, "control"


@pytest.mark.parametrize(
    ("how", "old", "new", "fields", "expected"),
    [
        ("stack", f"m.l.{PLACE}.w", "m.l.w", {"axis": 1}, 'ct.Stack("m.l.*.w", "m.l.w", axis=1)'),
        ("unstack", "m.l.w", f"m.l.{PLACE}.w", {}, 'ct.Unstack("m.l.w", "m.l.*.w")'),
        ("merge", f"m.{PLACE}.w", "m.qk.w", {"axis": -1, "pieces": ("q", "k")}, 'ct.Merge("m.{q,k}.w", "m.qk.w")'),
        (
            "split",
            "m.qk.w",
            f"m.{PLACE}.w",
            {"axis": -2, "pieces": ("q", "k"), "sizes": (4, 2)},
            'ct.Split("m.qk.w", "m.{q,k}.w", axis=-2, sizes=(4, 2))',
        ),
    ],
    ids=["stack", "unstack", "merge", "split"],
)
def test_a_join_names_its_axis_and_pieces(how, old, new, fields, expected):
    def fill(name):
        return tuple(split(name.replace(PLACE, each)) for each in fields.get("pieces", "01"))

    sources, targets = (tuple(dict.fromkeys(fill(name))) for name in (old, new))
    one = Trace(how=how, old=split(old), new=split(new), sources=sources, targets=targets, **fields)
    (operation,) = write_moves([one], sources, allow_parts=False)
    assert as_code(operation) == expected


def test_joins_of_all_leaves_of_a_part_are_one_operation():
    traces, stored = [], []
    for leaf in ("w", "b"):
        sources = tuple(split(f"m.l.{number}.{leaf}") for number in range(2))
        old, new = ("m", "l", PLACE, leaf), ("m", "l", leaf)
        traces.append(Trace(how="stack", old=old, new=new, sources=sources, targets=(new,)))
        stored += sources
    assert list(map(as_code, write_moves(traces, stored, allow_parts=True))) == ['ct.Stack("m.l.*", "m.l")']
    assert len(write_moves(traces, stored, allow_parts=False)) == 2, "control"


def test_a_copy_comes_last_and_uses_the_new_name():
    moved, copied = rename("m.enc.w", "m.net.w"), rename("m.net.w", "ema.net.w", how="copy")
    operations = write_moves([copied, moved], [split("m.enc.w")], allow_parts=False)
    assert list(map(as_code, operations)) == ['ct.Rename("m.enc.w", "m.net.w")', 'ct.Copy("m.net.w", "ema.net.w")']

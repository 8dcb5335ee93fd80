# SPDX-License-Identifier: Apache-2.0
"""The action Tile: what it accepts, how it combines with a Remat, and its form in files."""

import pytest

from remattools import Remat, RuleError, RuleFileError, Rules, Tile


def test_eight_pieces_are_the_default():
    assert Tile() == Tile(8) == Tile(pieces=8)
    assert repr(Tile()) == "Tile()"
    assert repr(Tile(4, accumulate=None)) == "Tile(4, accumulate=None)"
    assert eval(repr(Tile(rows=512, axis=1)), {"Tile": Tile}) == Tile(rows=512, axis=1)


@pytest.mark.parametrize(
    ("tile", "size", "pieces"),
    [
        pytest.param(Tile(8), 64, 8, id="divides"),
        pytest.param(Tile(8), 61, 8, id="the last piece is shorter"),
        pytest.param(Tile(8), 9, 5, id="no piece is empty"),
        pytest.param(Tile(8), 3, 3, id="fewer rows than pieces"),
        pytest.param(Tile(rows=10), 61, 7, id="by rows"),
        pytest.param(Tile(rows=64), 61, 1, id="one piece is no cut"),
    ],
)
def test_pieces_are_counted_for_an_axis(tile, size, pieces):
    assert tile.count_pieces(size) == pieces


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pieces": 4, "rows": 4}, "both given"),
        ({"pieces": 1}, "pieces=1"),
        ({"pieces": True}, "pieces=True"),
        ({"rows": 0}, "rows=0"),
        ({"axis": -1}, "axis=-1"),
        ({"axis": "sequence"}, "axis='sequence'"),
        ({"accumulate": "bfloat16"}, "accumulate='bfloat16'"),
        ({"keep_rows": 1}, "keep_rows=1"),
    ],
)
def test_invalid_arguments_are_refused_when_it_is_built(fields, message):
    with pytest.raises(RuleError, match=message):
        Tile(**fields)


def test_it_combines_with_a_remat_in_either_order():
    assert Remat(save=("o",)) & Tile(4) == Tile(4) & Remat(save=("o",)) == Remat(save=("o",), tile=Tile(4))
    assert repr(Remat(save=("o",)) & Tile(4)) == "Remat(save=('o',)) & Tile(4)"
    with pytest.raises(TypeError):
        Remat() & 3


def test_alone_it_recomputes_nothing_else():
    ((_, action),) = Rules({"layers.*.attn": Tile(4)})
    assert action.is_tile_alone
    assert repr(action) == "Tile(4)"
    assert not (Remat() & Tile(4)).is_tile_alone


def test_a_group_is_not_computed_in_pieces():
    with pytest.raises(RuleError, match="group=4"):
        Remat(group=4) & Tile()


RULES = {
    "alone": Tile(4, axis=1),
    "alone on every second module": Remat("everything_saveable", every_n=2, tile=Tile()),
    "with a policy": Remat("nothing_saveable") & Tile(rows=512),
    "with names": Remat(save=("o",)) & Tile(keep_rows=False),
    "with a region that saves nothing": Remat() & Tile(accumulate=None),
}


@pytest.mark.parametrize("action", RULES.values(), ids=RULES)
def test_files_hold_it(action):
    rules = Rules({"layers.*.attn": action, "@loss": Tile(16)})
    assert Rules.from_toml(rules.to_toml()) == rules


def test_a_short_rule_reads_as_written():
    text = '[remat.rules]\n"layers.*.attn" = { tile = { pieces = 4 } }\n"@loss" = { tile = {} }\n'
    assert Rules.from_toml(text) == Rules({"layers.*.attn": Tile(4), "@loss": Tile()})


@pytest.mark.parametrize(
    ("entry", "message"),
    [("8", "tile = 8 is not a table"), ("{ piece = 8 }", "pieces"), ("{ pieces = 1 }", "pieces=1")],
)
def test_a_file_with_a_wrong_tile_names_the_line(entry, message):
    with pytest.raises(RuleFileError, match="line 2") as error:
        Rules.from_toml(f'[remat.rules]\n"layers.*" = {{ tile = {entry} }}\n')
    assert message in str(error.value)

# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: mapped by patterns with stars, skipped, and plain values from the metadata."""

import pytest

import ckpttools as ct
from ckpttools.tools import tensor_names
from ckpttools.tree.records import Record


def records(*names):
    return [Record(path=tuple(name.split(".")), kind="array") for name in names]


LAYERS = records("layers.0.kernel", "layers.1.kernel", "norm.scale", "table")


def test_leaves_keep_their_names_without_a_map():
    assert list(tensor_names.name_leaves(LAYERS, None)) == ["layers.0.kernel", "layers.1.kernel", "norm.scale", "table"]


def test_stars_stand_for_what_they_matched():
    names = {"layers.*.kernel": "h.*.weight", "norm.**": "ln.**", "table": "wte"}
    assert list(tensor_names.name_leaves(LAYERS, names)) == ["h.0.weight", "h.1.weight", "ln.scale", "wte"]


def test_the_first_pattern_that_matches_counts():
    names = {"layers.0.**": "first.**", "layers.**": "rest.**"}
    assert list(tensor_names.name_leaves(LAYERS[:2], names)) == ["first.kernel", "rest.1.kernel"]


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        pytest.param({"tabel": "wte"}, ct.SpecError, "names has 'tabel', which match no leaf", id="no match"),
        pytest.param({"layers.*.kernel": "h"}, ct.SpecError, "has 1 and 0 stars", id="stars"),
        pytest.param({"table": "norm.scale"}, ct.StructureError, "two leaves have the name 'norm.scale'", id="twice"),
    ],
)
def test_wrong_name_maps_are_refused(names, error, text):
    with pytest.raises(error, match=text):
        tensor_names.name_leaves(LAYERS, names)


def test_skipped_leaves_are_left_out():
    assert tensor_names.exclude_skipped(LAYERS, ["layers.**", "table"]) == (LAYERS[2],)
    assert tensor_names.exclude_skipped(LAYERS, "layers.**") == tuple(LAYERS[2:]), "one pattern as a string"
    assert tensor_names.exclude_skipped(LAYERS, []) == tuple(LAYERS), "control"
    with pytest.raises(ct.SpecError, match="skip='tabel' matches no leaf") as caught:
        tensor_names.exclude_skipped(LAYERS, ["tabel"])
    assert "table" in caught.value.fix


def test_a_value_comes_from_the_metadata_if_it_is_there():
    kept = Record(path=("count",), kind="value", value=1)
    assert tensor_names.read_value("count", kept, {}) == (kept, None)
    found, line = tensor_names.read_value("count", kept, {"ckpttools.value.count": "7"})
    assert (found.path, found.value, line) == (("count",), 7, None)


@pytest.mark.parametrize("text", ["[", '{"os": 1}', "[" * 100_000], ids=["not JSON", "not a value", "too deep"])
def test_an_invalid_value_is_reported_and_the_states_kept(text):
    kept = Record(path=("count",), kind="value", value=1)
    found, line = tensor_names.read_value("count", kept, {"ckpttools.value.count": text})
    assert found == kept
    assert line.startswith("count: the value in the file cannot be read")

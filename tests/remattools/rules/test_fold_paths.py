# SPDX-License-Identifier: Apache-2.0
"""Paths that differ in indices only become one pattern, which matches these paths and no others."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remattools.rules.fold_paths import format_paths, mask_path, mask_text, merge_rows
from remattools.rules.paths import Pattern, format_path, match, parse_path


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["."], "."),
        (["layers.0", "layers.1", "layers.2"], "layers.[0:3]"),
        (["a.0.b", "a.2.b", "a.4.b"], "a.[0:5:2].b"),
        (["a.0", "a.1", "a.3"], "a.{0,1,3}"),
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], "a.[0:2].[0:2]"),
        (["a.0.0", "a.0.1", "a.1.0"], "a.0.[0:2], a.1.0"),
        (["dec_0.mlp", "dec_1.mlp", "dec_3.mlp"], "dec_{0,1,3}.mlp"),
        (["h9", "h10"], "h{9,10}"),
    ],
)
def test_folded_paths_mean_these_and_no_others(paths, text):
    assert format_paths(paths) == text


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_folded_path_matches_what_it_was_made_of(indices):
    every = [parse_path(f"dec_{i}.layers.{j}") for i in range(5) for j in range(4)]
    chosen = {f"dec_{i}.layers.{j}" for i, j in indices}
    patterns = format_paths(sorted(chosen)).split(", ")
    assert {format_path(every[n]) for pattern in patterns for n in match(Pattern.parse(pattern), every)} == chosen


def test_paths_with_equal_masks_differ_in_indices_only():
    assert mask_path("layers.3.attn") == mask_path("layers.10.attn") == ("layers", "#", "attn")
    assert mask_path("dec_0.mlp") == mask_path("dec_12.mlp") != mask_path("enc_0.mlp")
    assert mask_path("conv2d.w") != mask_path("conv3d.w")  # a number inside a name is not an index


def test_indices_in_a_sentence_are_masked():
    assert mask_text("shares parameters with layers.12, layers.3.") == "shares parameters with layers.#, layers.#."
    assert mask_text("float32x is unchanged") == "float32x is unchanged"
    assert mask_text("h0: 7 values", mark="N") == "hN: N values"


@dataclasses.dataclass(frozen=True)
class Value:
    path: str
    name: str
    bytes: int
    count: int = 1


def test_equal_layers_become_one_row_and_others_stay_apart():
    rows = [Value("a.0", "x", 2), Value("a.0", "y", 5), Value("a.1", "x", 2), Value("b", "x", 1)]
    assert merge_rows(rows, lambda row: row.name) == [
        Value("a.0", "y", 5),
        Value("a.[0:2]", "x", 4, 2),
        Value("b", "x", 1),
    ]
    largest = merge_rows(rows, lambda row: row.name, bytes=lambda group: max(row.bytes for row in group))
    assert Value("a.[0:2]", "x", 2, 2) in largest

# SPDX-License-Identifier: Apache-2.0
"""Figures: their formats, and what to install without matplotlib."""

import pytest

import remattools as rt
from remattools.analysis import plot


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_figure_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure{suffix}"
    with plot.open_figure(path) as axes:
        axes.plot([0, 1], [1, 0])
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])


def test_another_suffix_is_refused_before_drawing(tmp_path):
    with pytest.raises(rt.MeasureError) as caught, plot.open_figure(tmp_path / "a.txt"):
        pytest.fail("the block ran")
    assert caught.value.fix == "plot.svg"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rt.MeasureError) as caught:
        plot.check_path(tmp_path / "a.png")
    assert "[plot]" in caught.value.fix

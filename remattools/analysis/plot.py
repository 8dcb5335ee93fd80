# SPDX-License-Identifier: Apache-2.0
"""One figure in a file, with matplotlib where it is installed (the extra `[plot]`)."""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from ..errors import MeasureError


@contextlib.contextmanager
def open_figure(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Axes to draw on; written to `path` at the end, PNG, SVG or PDF by its ending.

    Raises:
        MeasureError: If matplotlib is not installed, or the ending means no picture.
    """
    check_path(path)
    # Not at the top: importing the package must not import an extra. The object interface opens no window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    yield axes
    drawing.savefig(path, dpi=150)


def check_path(path: str | os.PathLike[str]) -> None:
    """See that a figure can be drawn into that file, before what it is to show is measured.

    Raises:
        MeasureError: If matplotlib is not installed, or the ending means no picture.
    """
    if pathlib.Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise MeasureError(
            what=f"{os.fspath(path)!r} does not end in .png, .svg or .pdf.",
            why="the ending says what kind of picture to write.",
            fix="plot.svg",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MeasureError(
            what="a plot needs matplotlib, which is not installed.",
            why="it is an extra, since measuring does without.",
            fix='pip install "nnx-checkpointing[plot]"',
        )

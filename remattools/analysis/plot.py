# SPDX-License-Identifier: Apache-2.0
"""Draw one figure into a file with matplotlib, which is an extra (`[plot]`)."""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from ..errors import MeasureError


@contextlib.contextmanager
def open_figure(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield matplotlib axes to draw on, and write the figure to `path` afterwards.

    Args:
        path: File to write; its suffix, .png, .svg or .pdf, sets the format.

    Raises:
        MeasureError: If matplotlib is not installed, or the suffix is another.
    """
    check_path(path)
    # Not at the top: importing the package must not import an extra. The object interface needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    figure.savefig(path, dpi=150)


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a figure can be drawn into a file, before a long measurement.

    Raises:
        MeasureError: If matplotlib is not installed, or the suffix is not .png, .svg or .pdf.
    """
    if pathlib.Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise MeasureError(
            what=f"{os.fspath(path)!r} does not end in .png, .svg or .pdf.",
            why="the suffix sets the format of the figure.",
            fix="plot.svg",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MeasureError(
            what="a plot needs matplotlib, which is not installed.",
            why="matplotlib is an optional extra.",
            fix='pip install "nnx-checkpointing[plot]"',
        )

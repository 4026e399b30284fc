"""What all pictures have in common: colours, a grid of panels, files that are whole or not there.

Colours are told apart with any colour vision (Okabe and Ito's palette; viridis for depth).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
MARKERS = "osD^vP*X<>"


def grid(panels: int, columns: int, xlabel: str) -> tuple[Figure, Sequence[Axes]]:
    """A figure with `panels` axes in rows of `columns`, each with the same label along the bottom."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis in axes:
        axis.set_xlabel(xlabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=8)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in the format of the path's suffix; the same figure gives the same file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with mpl.rc_context({"svg.hashsalt": "moxe"}):  # names inside an SVG are random otherwise
        figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(temporary, path)
    return path

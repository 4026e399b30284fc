"""What all pictures have in common: colours, a grid of panels, files that are whole or not there.

Colours are told apart with any colour vision (Okabe and Ito's palette; viridis for depth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moxe.files import moved_when_whole

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)
MARKERS = "osD^vP*X<>"
# A picture to look at, and one for print.
FORMATS = ("png", "svg")


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


def save_all(figures: Mapping[str, Figure], output_dir: Path, formats: Sequence[str]) -> list[Path]:
    """Write each figure by its name in each format, and make the folder if it is not there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return [save(figure, output_dir / f"{name}.{suffix}") for name, figure in figures.items() for suffix in formats]


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in the format of the path's suffix; the same figure gives the same file."""
    suffix = path.suffix.removeprefix(".")
    # Names inside an SVG are random without a salt.
    with moved_when_whole(path) as unfinished, mpl.rc_context({"svg.hashsalt": "moxe"}):
        figure.savefig(unfinished, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    return path

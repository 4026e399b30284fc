"""Pictures of a run, drawn from its metrics.jsonl alone.

losses: every term of the loss over training, as in the paper's Figure 3. utilisation: the load of every expert of every
layer, as in Figure 8. routing: difficulty, router entropy and the share of the mLSTM experts, by layer. gradients: the
norm of the gradient of each part of the model, where the lines hold it. speed: tokens a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from moxe.observability.figures import BLUE, FORMATS, GREY, MARKERS, ORANGE, grid, save_all
from moxe.observability.metrics import read_run

_GROUP_M, _GROUP_S = BLUE, ORANGE
# Title and key of each panel of losses and of routing.
LOSS_PANELS = (
    ("Cross-entropy (nats a token)", "lm_loss"),
    ("Router z-loss", "z_loss"),
    ("Load balancing (1 = uniform)", "load_balancing_loss"),
    ("Difficulty loss", "difficulty_loss"),
    ("Group loss", "group_loss"),
)
ROUTING_PANELS = (
    ("Difficulty, mean", "difficulty_mean"),
    ("Difficulty, variance", "difficulty_variance"),
    ("Router entropy (1 = uniform)", "router_entropy"),
    ("Share of group M (mLSTM)", "mlstm_share"),
)


def draw_run(metrics_path: str | Path, output_dir: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw the pictures of the run whose metrics.jsonl this is.

    Args:
        metrics_path: of a run that is finished, goes on, or was killed.
        output_dir: made if it is not there, once everything is drawn.
        formats: endings of the files.

    Returns:
        The files written: losses, utilisation, routing, gradients and speed, as far as the lines hold them; of a model
        without routers neither utilisation nor routing.

    Raises:
        UserError: if there is no such file, no training line in it, or a damaged line.
    """
    run = read_run(metrics_path)
    training = run.training
    figures = {"losses": _draw_losses(training, run.validation)}
    if training[0]["layers"]:
        figures |= {"utilisation": _draw_utilisation(training), "routing": _draw_routing(training)}
    if "gradient_norms" in training[-1]:
        figures["gradients"] = _draw_gradients(training)
    if any(map(math.isfinite, _column(training, "tokens_per_second"))):
        figures["speed"] = _draw_speed(training)
    return save_all(figures, Path(output_dir), formats)


def _draw_losses(training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Figure:
    panels = [panel for panel in LOSS_PANELS if panel[1] in training[0]]
    figure, axes = grid(len(panels) + 1, columns=3, xlabel="step")
    for axis, (title, key) in zip(axes, panels, strict=False):
        axis.plot(_column(training, "step"), _column(training, key), color=BLUE, label="training", linewidth=1.5)
        if validation:
            axis.plot(
                _column(validation, "step"),
                _column(validation, f"validation_{key}"),
                color=ORANGE,
                label="validation",
                marker="o",
                markersize=4,
                linestyle="--",
            )
        axis.set_title(title)
    axes[0].legend(frameon=False)
    last = axes[len(panels)]
    last.plot(_column(training, "step"), _column(training, "gradient_norm"), color=GREY, linewidth=1.5)
    last.set_title("Gradient norm before clipping")
    last.set_ylim(bottom=0)
    return figure


def _draw_utilisation(training: list[dict[str, Any]]) -> Figure:
    """A layer's loads as bands that fill the height: group M from below, group S from above, divided by a line."""
    steps = _column(training, "step")
    num_layers = len(training[0]["layers"])
    num_experts = len(training[0]["layers"][0]["load"])
    names = [f"{'M' if expert < num_experts / 2 else 'S'}{expert}" for expert in range(num_experts)]
    colors = [*_shades(_GROUP_M, num_experts // 2), *_shades(_GROUP_S, num_experts - num_experts // 2)]
    figure, axes = grid(num_layers, columns=min(3, num_layers), xlabel="step")
    for layer, axis in enumerate(axes):
        load = np.array([record["layers"][layer]["load"] for record in training])  # [lines, E]
        axis.stackplot(steps, load.T, colors=colors, edgecolor="white", linewidth=0.4)
        axis.plot(steps, load[:, : num_experts // 2].sum(1), color="black", linewidth=1.8)
        axis.axhline(0.5, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
        axis.set(xlim=(steps[0], steps[-1]) if len(steps) > 1 else None, ylim=(0, 1))
        axis.set_title(f"Layer {layer}")
        axis.margins(x=0)
        top = load[-1].cumsum()
        for expert, share in enumerate(load[-1]):
            if share > 0.03:
                axis.annotate(
                    f"{names[expert]} {share:.0%}",
                    (1.01, top[expert] - share / 2),
                    xycoords=("axes fraction", "data"),
                    fontsize=7,
                    verticalalignment="center",
                )
    figure.suptitle(
        "Share of the assignments each expert receives\n"
        "blue: group M (mLSTM), orange: group S (sLSTM), black: the border between them (dashed: one half)",
        fontsize=10,
    )
    return figure


def _draw_routing(training: list[dict[str, Any]]) -> Figure:
    first = training[0]["layers"]
    panels = [panel for panel in ROUTING_PANELS if first[0][panel[1]] is not None]
    figure, axes = grid(len(panels), columns=2, xlabel="step")
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(first)))
    for axis, (title, key) in zip(axes, panels, strict=True):
        for layer, color in enumerate(colors):
            axis.plot(
                _column(training, "step"),
                [record["layers"][layer][key] for record in training],
                color=color,
                marker=MARKERS[layer % len(MARKERS)],
                markersize=4,
                markevery=max(1, len(training) // 12),
                linewidth=1.5,
                label=f"layer {layer}",
            )
        axis.set_title(title)
    axes[-1].axhline(0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes[0].legend(frameon=False, fontsize=7, ncols=math.ceil(len(first) / 5))
    return figure


def _draw_gradients(training: list[dict[str, Any]]) -> Figure:
    figure, (axis,) = grid(1, columns=1, xlabel="step")
    figure.set_size_inches(8.4, 4.4)
    parts = list(training[-1]["gradient_norms"])
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(parts)))
    for index, (part, color) in enumerate(zip(parts, colors, strict=True)):
        axis.plot(
            _column(training, "step"),
            [record.get("gradient_norms", {}).get(part, math.nan) for record in training],
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(training) // 12),
            linewidth=1.5,
            label=part.replace("_", " "),
        )
    axis.plot(_column(training, "step"), _column(training, "gradient_norm"), color=GREY, linewidth=2, label="all")
    axis.set_title("Gradient norm before clipping, by part")
    if any(0 < norm < math.inf for norm in _column(training, "gradient_norm")):
        axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_speed(training: list[dict[str, Any]]) -> Figure:
    """The median too: the first lines of a run are slower, and so is one that shares the machine for a while."""
    speed = _column(training, "tokens_per_second")
    figure, (axis,) = grid(1, columns=1, xlabel="step")
    figure.set_size_inches(6.4, 3.6)
    axis.plot(_column(training, "step"), speed, color=BLUE, linewidth=1.5)
    median = np.median([value for value in speed if math.isfinite(value)])
    axis.axhline(median, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
    axis.set_title("Tokens a second")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def _shades(color: str, count: int) -> list[tuple[float, float, float]]:
    """`count` shades of a colour, from dark to light."""
    red, green, blue = to_rgb(color)
    lightness = [0.7 * index / max(1, count - 1) for index in range(count)]
    return [(red + (1 - red) * add, green + (1 - green) * add, blue + (1 - blue) * add) for add in lightness]


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record.get(key, math.nan) for record in records]

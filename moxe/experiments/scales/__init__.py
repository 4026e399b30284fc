"""The scales of the experiments: what data, how long, which learning rates to choose from, how large each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moxe.recipe import Recipe, load_recipe, make_recipe

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """One scale.

    Args:
        name: tiny, small or paper.
        seeds: how many, unless the command says otherwise.
        learning_rates: what each model of Table 1 chooses its learning rate from.
        lambada_examples: the first so many texts of LAMBADA; None: all.
        data, training: the sections of every run's recipe.
        models: the `model` section of each architecture, by name.
    """

    name: str
    seeds: int
    learning_rates: tuple[float, ...]
    lambada_examples: int | None
    data: dict[str, Any]
    training: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def recipe(self, model: dict[str, Any], training: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> Recipe:
        """The recipe of one run: this scale's sections, `model`, what the grid decides, and the user's overrides."""
        sections = {"model": model, "data": self.data, "training": {**self.training, **training}}
        return make_recipe(sections, overrides, name=self.name)


def load_scale(name: str) -> Scale:
    """A scale by its name, with the model sections of the recipes that it names."""
    content = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    models = {
        model: load_recipe(settings).model if isinstance(settings, str) else settings
        for model, settings in content.pop("models").items()
    }
    rates = tuple(content.pop("learning_rates"))
    return Scale(name=name, learning_rates=rates, models=models, **content)

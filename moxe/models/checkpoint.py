"""Loading a saved model, strictly: exactly the weights that its configuration asks for, or a sentence why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from moxe.errors import UserError
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_config(folder: str | Path) -> MoxEConfig:
    """The configuration in a checkpoint folder.

    Raises:
        UserError: no such folder, no config.json in it, or one that is not of a MoxE model.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(f"there is no checkpoint folder {str(folder)!r}")
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: a checkpoint is the folder that holds config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is not a checkpoint: it holds no config.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise UserError(f"{path} must hold a JSON object")
        model_type = settings.get("model_type")
        if model_type != MoxEConfig.model_type:
            raise UserError(f"{path} has model_type {model_type!r}, but a MoxE model has {MoxEConfig.model_type!r}")
        return MoxEConfig.from_dict(settings)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # no JSON, no UTF-8, or what MoxEConfig refuses
        raise UserError(f"{path} is not valid: {error}") from None


def load_model(folder: str | Path, *, device: str | torch.device | None = None) -> MoxEForCausalLM:
    """The model in a checkpoint folder, in evaluation mode.

    `from_pretrained` gives random values to weights it does not find; here they are refused.

    Args:
        folder: what `save_pretrained` or a training run wrote.
        device: where to put it; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: what `load_config` refuses; weights that are absent, unreadable, or not exactly those of the
            configuration by name and shape.
    """
    folder = Path(folder).expanduser()
    config = load_config(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{str(folder)!r} holds no weights: {_WEIGHTS[0]} is missing")
    try:
        with _quiet_transformers():
            loaded = MoxEForCausalLM.from_pretrained(
                folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {str(folder)!r} cannot be read: {error}") from None
    model, found = cast(tuple[MoxEForCausalLM, dict[str, Any]], loaded)
    for name, saved, expected in sorted(found["mismatched_keys"]):
        raise UserError(
            f"the weights in {str(folder)!r} do not fit its config.json: {name} is {list(saved)}, "
            f"but the configuration asks for {list(expected)}"
        )
    for name in sorted(found["missing_keys"]):
        raise UserError(f"the weights in {str(folder)!r} do not fit its config.json: {name} is missing")
    for name in sorted(found["unexpected_keys"]):
        raise UserError(f"the weights in {str(folder)!r} do not fit its config.json: it has no place for {name}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    nn.Module.to(model, device)  # the method itself, since pyright loses the type of transformers' wrapper of it
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report of the weights that do not fit, which is refused in one sentence, and no bar for a second's work."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

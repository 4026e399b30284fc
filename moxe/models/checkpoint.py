"""Loading a saved model, strictly: exactly the weights that its configuration asks for, or a sentence why not."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from moxe.errors import UserError, shown
from moxe.manifest import require_unchanged
from moxe.models.architectures import architecture_of, architecture_of_type, build_model
from moxe.models.configuration_moxe import PASSED_BY_TRANSFORMERS

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_READ = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_DTYPES_OF_WEIGHTS = ("F32", "F64", "BF16", "F16")  # the same in the words of safetensors
# What transformers writes into every configuration beside the settings of the model; it means nothing here.
_WITHOUT_EFFECT = {field.name for field in dataclasses.fields(PreTrainedConfig)} | PASSED_BY_TRANSFORMERS


def load_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration in a checkpoint folder.

    Raises:
        UserError: no such folder, no config.json in it, one that is of no architecture that moxe has, or not the one
            in the folder's manifest.
    """
    return _load_config(_existing(folder), ("config.json",))


def _existing(folder: str | Path) -> Path:
    folder = Path(os.path.expanduser(folder))
    if not folder.exists():
        raise UserError(f"there is no checkpoint folder {str(folder)!r}")
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: a checkpoint is the folder that holds config.json")
    return folder


def _load_config(folder: Path, files_to_verify: tuple[str, ...]) -> PreTrainedConfig:
    present = [path.name for pattern in files_to_verify for path in folder.glob(pattern)]
    require_unchanged(folder, files_to_verify, required=present)  # one that is not listed was put there later
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is not a checkpoint: it holds no config.json")
    settings = _read_json(path)
    try:
        architecture = architecture_of_type(settings.get("model_type"))
    except UserError as error:
        raise UserError(f"{path} is of no model that moxe has: {error}") from None
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"{path} is not valid: dtype={shown(dtype)} is not one of: {', '.join(_DTYPES)}")
    of_model = {name: value for name, value in settings.items() if not _is_of_transformers(name)}
    try:
        return architecture.build_config({**of_model, "dtype": dtype})
    except ValueError as error:
        raise UserError(f"{path} is not valid: {error}") from None


def _is_of_transformers(name: str) -> bool:
    return name in _WITHOUT_EFFECT or name.startswith("_")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise UserError(f"{path} is not valid: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def load_model(folder: str | Path, *, device: str | torch.device | None = None) -> Any:
    """The model in a checkpoint folder, in evaluation mode.

    `from_pretrained` gives random values to weights it does not find; here they are refused. What the files hold is
    compared before memory is asked for, so that a configuration of a size that nobody saved costs nothing.

    Args:
        folder: what `save_pretrained` or a training run wrote.
        device: where to put it; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: what `load_config` refuses; a file that is not the one in the folder's manifest; weights that are
            absent, unreadable, or not exactly those of the configuration by name and shape.
    """
    folder = _existing(folder)
    config = _load_config(folder, _READ)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{str(folder)!r} holds no weights: {_WEIGHTS[0]} is missing")
    if (folder / "adapter_config.json").exists():  # with peft installed, transformers would follow it to another model
        raise UserError(f"{str(folder)!r} holds an adapter_config.json: moxe reads whole models only")
    files = [_WEIGHTS[0]] if (folder / _WEIGHTS[0]).is_file() else _files_of_index(folder / _WEIGHTS[1])
    try:
        _check_headers(folder, files, config)
        with _quiet_transformers():
            model = architecture_of(config).model_class.from_pretrained(
                folder, config=config, generation_config=_generation_config(folder), use_safetensors=True
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {str(folder)!r} cannot be read: {error}") from None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    nn.Module.to(model, device)  # the method itself, since pyright loses the type of transformers' wrapper of it
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    settings = _read_json(path)
    known = vars(GenerationConfig())
    try:
        return GenerationConfig.from_dict({name: value for name, value in settings.items() if name in known})
    except Exception as error:  # transformers has no error of its own for a value of the wrong type
        raise UserError(f"{path} is not valid: {error}") from None


def _files_of_index(path: Path) -> list[str]:
    """The files of weights that an index names; they lie beside it."""
    index = _read_json(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not isinstance(index.get("metadata"), dict):
        raise UserError(f"{path} is not an index of weights")
    for name in places.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{path} names {shown(name)}, which is not a .safetensors file of its folder")
        if not (path.parent / name).is_file():
            raise UserError(f"the weights in {str(path.parent)!r} are not whole: {shown(name)} is missing")
    return sorted(set(places.values()))


def _check_headers(folder: Path, files: list[str], config: PreTrainedConfig) -> None:
    """By their headers, the files hold the weights that the configuration asks for, each in a dtype of weights."""
    with torch.device("meta"):
        model = build_model(config)
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    found: set[str] = set()
    misfit = f"the weights in {str(folder)!r} do not fit its config.json:"
    for file in files:
        with safe_open(folder / file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, it is no mapping
                weight = weights.get_slice(name)
                shape, dtype = weight.get_shape(), weight.get_dtype()
                if name not in expected:
                    raise UserError(f"{misfit} it has no place for {shown(name)}")
                if shape != expected[name]:
                    raise UserError(f"{misfit} {name} is {shape}, but the configuration asks for {expected[name]}")
                if dtype not in _DTYPES_OF_WEIGHTS:
                    choices = ", ".join(_DTYPES_OF_WEIGHTS)
                    raise UserError(f"{folder / file} holds {name} in the dtype {dtype}, not one of: {choices}")
                found.add(name)
    for name, _ in (*model.named_parameters(), *model.named_buffers()):  # a tied weight comes once
        if name in expected and name not in found:  # a buffer that is computed anew is in no file
            raise UserError(f"{misfit} {name} is missing")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report of what was loaded, which was compared before, and no bar for a second's work."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

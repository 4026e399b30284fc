"""The one mechanism of configuration: a recipe file and overrides become typed, checked objects.

A recipe is YAML with the sections `model` (an `architecture`, and names of its configuration class, MoxEConfig unless
another is named), `data` (DataConfig) and `training` (TrainingConfig).
What it leaves out keeps its default; an override such as `--training.learning_rate 1e-3` wins over both. A name that
does not exist or a value of another type is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import PreTrainedConfig

from moxe.data.config import DataConfig
from moxe.errors import UserError, shown
from moxe.files import write_whole
from moxe.models.architectures import DEFAULT, Architecture, architecture_named
from moxe.training.config import TrainingConfig

Overrides = Sequence[tuple[str, str]] | Mapping[str, Mapping[str, Any]]

_SECTIONS = {"data": DataConfig, "training": TrainingConfig}
_PACKAGED = Path(__file__).parent / "recipes"
# Every configuration has a default `vocab_size`, but a recipe that does not set it means: whatever the tokenizer has.
_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Recipe:
    """Everything that decides a run.

    `model` holds the name of its `architecture` and the settings of that configuration by name; those in which a
    tokenizer has a say (`vocab_size` and the ids of special tokens) are there only when the recipe sets them.
    """

    model: dict[str, Any]
    data: DataConfig
    training: TrainingConfig

    @property
    def architecture(self) -> Architecture:
        """What `model.architecture` names."""
        return architecture_named(self.model["architecture"])

    @property
    def name(self) -> str:
        """The name of the run: the name of the recipe file unless `training.name` is set."""
        assert self.training.name is not None  # load_recipe fills it in
        return self.training.name

    @property
    def run_dir(self) -> Path:
        """The folder the run writes."""
        return Path(os.path.expanduser(self.training.output_dir)) / self.name

    def model_config(self, vocab_size: int | None = None, **special_tokens: int | None) -> PreTrainedConfig:
        """The configuration of the model for a tokenizer of `vocab_size` tokens.

        Args:
            vocab_size: tokens of the tokenizer; None: not known, so `model.vocab_size` must be set, or
                `data.tokenizer` be `train`, whose size is `data.vocab_size`.
            special_tokens: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer.

        Raises:
            UserError: if the recipe's `model.vocab_size` is smaller than the tokenizer, or none is known.
        """
        settings = {**special_tokens, **self.model}
        if "vocab_size" not in settings:
            if vocab_size is None and self.data.tokenizer == "train":
                vocab_size = self.data.vocab_size
            if vocab_size is None:
                raise UserError(
                    "the vocabulary is only known once the tokenizer "
                    f"{self.data.tokenizer!r} is loaded: set model.vocab_size"
                )
            settings["vocab_size"] = vocab_size
        elif vocab_size is not None and settings["vocab_size"] < vocab_size:
            raise UserError(
                f"model.vocab_size={settings['vocab_size']} is smaller than the tokenizer, which has {vocab_size} "
                "tokens: leave model.vocab_size out to take the tokenizer's size"
            )
        return _build_model_config(self.architecture, settings)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The resolved recipe: every setting of every section."""
        return {
            "model": dict(self.model),
            "data": dataclasses.asdict(self.data),
            "training": dataclasses.asdict(self.training),
        }

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML, which `load_recipe` reads back to an equal one."""
        write_whole(Path(path), yaml.dump(self.to_dict(), Dumper=_ExactDumper, sort_keys=False, allow_unicode=True))


def recipe_names() -> list[str]:
    """Names of the recipes that come with moxe."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml"))


def load_recipe(name_or_path: str | Path = "default", overrides: Overrides = ()) -> Recipe:
    """Read a recipe, lay the overrides over it and check every name, type and size.

    Args:
        name_or_path: the name of a packaged recipe (see `recipe_names`) or the path of a YAML file.
        overrides: pairs such as `("training.learning_rate", "3e-3")`, whose values are text as typed on a command line,
            or a nested mapping such as `{"training": {"learning_rate": 3e-3}}`.

    Raises:
        UserError: for a recipe, section or key that does not exist (with the nearest valid name), or a value of a wrong
            type or out of range.
    """
    path = _find(str(name_or_path))
    return make_recipe(_read(path), overrides, name=path.stem)


def make_recipe(sections: Mapping[str, Mapping[str, Any]], overrides: Overrides = (), *, name: str) -> Recipe:
    """As `load_recipe`, of settings by section that are at hand; `name` is that of the run unless they name it."""
    sections = {section: dict(values) for section, values in _checked_sections(sections, "the recipe").items()}
    architecture = architecture_named(_architecture_name(sections, overrides))
    for section, values in _nested(overrides, architecture).items():
        sections.setdefault(section, {}).update(values)

    typed = {name: _typed_section(name, values, architecture) for name, values in sections.items()}
    settings = typed.get("training", {})
    if settings.get("name") is None:
        settings["name"] = name
    training = TrainingConfig(**settings)
    defaults = architecture.setting_defaults()
    model: dict[str, Any] = {"architecture": architecture.name}
    model.update((key, value) for key, value in defaults.items() if key not in _FROM_TOKENIZER)
    model.update(typed.get("model", {}))
    recipe = Recipe(model=model, data=DataConfig(**typed.get("data", {})), training=training)
    positions, length = model.get("max_position_embeddings"), recipe.data.sequence_length
    if positions is not None and positions < length:
        raise UserError(
            f"model.max_position_embeddings={positions} is less than data.sequence_length={length}: a model of "
            f"{architecture.label} reads no more tokens than it has positions"
        )
    if "vocab_size" in model or recipe.data.tokenizer == "train":
        recipe.model_config()
    else:
        _build_model_config(architecture, model)
    return recipe


def setting_types(section: str, architecture: Architecture | None = None) -> dict[str, Any]:
    """The keys of a section and the Python type of each, in the order of their definition.

    Args:
        architecture: whose settings the section `model` takes; None: the default one's.
    """
    if section == "model":
        return {"architecture": str, **(architecture or architecture_named(DEFAULT)).setting_types()}
    if section in _SECTIONS:
        return get_type_hints(_SECTIONS[section])
    raise UserError(_unknown("section", section, ("model", *_SECTIONS)))


def _architecture_name(sections: Mapping[str, Mapping[str, Any]], overrides: Overrides) -> Any:
    """`model.architecture`, which says what else the section `model` may hold; recipes were written before it was."""
    if isinstance(overrides, Mapping):
        overridden = _checked_sections(overrides, "the override").get("model", {})
    else:
        overridden = {key.removeprefix("model."): value for key, value in overrides if key.startswith("model.")}
    return overridden.get("architecture", sections.get("model", {}).get("architecture", DEFAULT))


def _find(name_or_path: str) -> Path:
    packaged = _PACKAGED / f"{name_or_path}.yaml"
    if name_or_path in recipe_names():
        return packaged
    path = Path(os.path.expanduser(name_or_path))
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"the recipe {shown(name_or_path)} cannot be read: {error.strerror}") from None
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"there is no recipe file {shown(name_or_path)}")
    raise UserError(_unknown("recipe", name_or_path, recipe_names()))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    return {section: dict(values) for section, values in _checked_sections(content, f"the recipe {path}").items()}


def _parse(text: str) -> Any:
    """The value of a YAML document, by a loader that makes plain values only and runs nothing.

    Raises:
        yaml.YAMLError: for what is no YAML, or no value of the type it claims to be.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML lets a later key silently win over an earlier one of the same name; in a recipe that is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        # What is no mapping (`!!map [1]`) and keys that cannot be keys are refused by the method that this one extends.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in keys:
                    problem = f"the key {shown(key)} is set twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
                keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError):  # a month 13, `!!int x`, 5,000 digits
            problem = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _ExactDumper(yaml.SafeDumper):
    """PyYAML writes the line breaks of Unicode between single quotes, where they are read back as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(letter in data for letter in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_ExactDumper.add_representer(str, _ExactDumper.represent_str)


def _checked_sections(content: Any, owner: str) -> Mapping[str, Mapping[str, Any]]:
    """`content` if it is a mapping of known sections to mappings; an empty section counts as one without settings."""
    if not isinstance(content, Mapping):
        raise UserError(f"{owner} is {shown(content)}, but a mapping of sections is expected: model, data, training")
    for section, values in content.items():
        setting_types(str(section))
        if values is not None and not isinstance(values, Mapping):
            raise UserError(f"{owner} sets the section {section} to {shown(values)}, but a mapping is expected")
    return {section: values or {} for section, values in content.items()}


def _nested(overrides: Overrides, architecture: Architecture) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(overrides, Mapping):
        return _checked_sections(overrides, "the override")
    nested: dict[str, dict[str, Any]] = {}
    for dotted, text in overrides:
        section, dot, key = dotted.partition(".")
        if not dot:
            example = "training.learning_rate"
            raise UserError(f"the override {shown(dotted)} must be written as section.key, such as {example}")
        types_of_keys = setting_types(section, architecture)
        if key not in types_of_keys:
            raise UserError(_unknown(f"setting {section}", key, types_of_keys))
        nested.setdefault(section, {})[key] = _from_command_line(f"{section}.{key}", text, types_of_keys[key])
    return nested


def _from_command_line(dotted: str, text: str, hint: Any) -> Any:
    """Text from a command line as the YAML value it stands for; text is taken as it is where text is expected."""
    kinds = _alternatives(hint)
    if types.NoneType in kinds and text.lower() in ("null", "none", "~"):
        return None
    if any(get_origin(kind) is list for kind in kinds) and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if any(kind is str or get_origin(kind) is Literal for kind in kinds):
        return text
    try:
        return _parse(text)
    except yaml.YAMLError:
        raise UserError(_wrong_type(dotted, text, hint)) from None


def _typed_section(section: str, values: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    types_of_keys = setting_types(section, architecture)
    typed = {}
    for key, value in values.items():
        if key not in types_of_keys:
            raise UserError(_unknown(f"setting {section}", str(key), types_of_keys))
        if isinstance(value, str) and "\0" in value:  # which ends a path for the operating system
            raise UserError(f"{section}.{key}={shown(value)} must not hold a NUL character")
        try:
            typed[key] = _convert(value, types_of_keys[key])
        except OverflowError:
            raise UserError(f"{section}.{key}={shown(value)} is too large: a whole number is below 2**63") from None
        except (TypeError, ValueError):
            raise UserError(_wrong_type(f"{section}.{key}", value, types_of_keys[key])) from None
    return typed


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, where nothing is lost by it; else ValueError, TypeError or OverflowError.

    YAML 1.1 reads `3e-3` and `1e6` as text (it wants `3.0e-3`), so text that is a number counts as one.
    """
    kinds = _alternatives(hint)
    if len(kinds) > 1:
        for kind in kinds:
            try:
                return _convert(value, kind)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if hint is types.NoneType:
        if value is not None:
            raise TypeError
        return None
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise TypeError
        return [_convert(item, get_args(hint)[0]) for item in value]
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        number = float(value)
        if hint is float:
            return number
        if isinstance(value, int) or number.is_integer():
            whole = value if isinstance(value, int) else int(number)
            if not -(2**63) <= whole < 2**63:
                raise OverflowError
            return whole
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise TypeError


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; None first, so that it is never tried as something else."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(sorted(get_args(hint), key=lambda kind: kind is not types.NoneType))
    return (hint,)


def _wrong_type(dotted: str, value: Any, hint: Any) -> str:
    return f"{dotted}={shown(value)} must be {_describe(hint)}"


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    described = []
    for kind in sorted(_alternatives(hint), key=lambda kind: kind is types.NoneType):
        if get_origin(kind) is Literal:
            described.append("one of " + ", ".join(get_args(kind)))
        elif get_origin(kind) is list:
            item = get_args(kind)[0]
            described.append("a list of " + (", ".join(get_args(item)) if get_args(item) else names[item]))
        else:
            described.append(names[kind])
    return " or ".join(described)


def _unknown(what: str, name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    nearest = difflib.get_close_matches(name, valid, n=1)
    joint = "." if what.startswith("setting ") else " "
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(valid)}"
    return f"there is no {what}{joint}{name}: {hint}"


def _build_model_config(architecture: Architecture, settings: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return architecture.build_config({key: value for key, value in settings.items() if key != "architecture"})
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model: {error}") from None

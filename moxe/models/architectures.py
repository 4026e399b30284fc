"""The architectures that a recipe can name: of each its configuration, its model, and what a recipe may set."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union, cast, get_args, get_origin

from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig
from transformers.activations import ACT2FN

from moxe.errors import UserError, shown
from moxe.models.baselines import Gemma2ForCausalLM, LlamaForCausalLM, Qwen2MoeForCausalLM
from moxe.models.configuration_moxe import LARGEST_NUM_LAYERS, MoxEConfig, RecurrentConfig
from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.models.modeling_xlstm import XLSTMForCausalLM


@dataclass(frozen=True)
class Architecture:
    """What `model.architecture` of a recipe stands for.

    Args:
        name: as a recipe writes it.
        label: as a report writes it.
        config_class, model_class: of transformers, or of the same make.
        left_out: settings of the configuration class that a recipe does not have.
    """

    name: str
    label: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    left_out: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it is made of the blocks of moxe, which carry a recurrent state and have a backend."""
        return issubclass(self.config_class, RecurrentConfig)

    def setting_types(self) -> dict[str, Any]:
        """The names that the `model` section may set beside `architecture`, and the Python type of each.

        They are the fields that the configuration class itself declares, but for `left_out` and those that hold a
        structure.
        """
        # Only the annotations of the class itself: those it inherits name things that exist for type checkers alone.
        hints = inspect.get_annotations(self.config_class, eval_str=True)
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        own = [field.name for field in dataclasses.fields(self.config_class) if field.name not in inherited]
        return {name: hints[name] for name in own if name not in self.left_out and _is_plain(hints[name])}

    def setting_defaults(self) -> dict[str, Any]:
        """What each of `setting_types` is where a recipe does not set it."""
        of_class = {field.name: field.default for field in dataclasses.fields(self.config_class)}
        return {name: of_class[name] for name in self.setting_types()}

    def build_config(self, settings: Mapping[str, Any]) -> Any:
        """The configuration with these settings; what they leave out has the default of the class.

        Raises:
            ValueError: for a value that the model cannot have, naming it.
        """
        if not self.is_ours:
            _check_num_layers(settings.get("num_hidden_layers"))
        try:
            config = self.config_class(**settings)
        except ValueError:
            raise
        except Exception as error:  # those of transformers have no base but Exception; the last line is the sentence
            raise ValueError(str(error).strip().splitlines()[-1].strip().rpartition("Error: ")[2]) from None
        if not self.is_ours:
            _check_settings(config, self.setting_types())
        return config


_ALL = (
    Architecture("moxe", "MoxE", MoxEConfig, MoxEForCausalLM),
    Architecture("xlstm", "xLSTM", XLSTMConfig, XLSTMForCausalLM),
    Architecture("gemma2", "Gemma 2", Gemma2Config, Gemma2ForCausalLM),
    Architecture(
        "qwen2_moe",
        "Qwen1.5-MoE",
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        # Training always asks for them, to have the routers' loss; generation in transformers fails where they are on.
        left_out=("output_router_logits",),
    ),
    Architecture("llama", "Llama", LlamaConfig, LlamaForCausalLM),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
DEFAULT = "moxe"

# Far beyond any model, so that no product of two sizes overflows where memory is asked for.
_LARGEST_SIZE = 2**24
_ACTIVATIONS = ("hidden_act", "hidden_activation")
_POSITIVE = ("rms_norm_eps", "final_logit_softcapping", "attn_logit_softcapping")
_NOT_NEGATIVE = ("initializer_range", "router_aux_loss_coef", "attention_dropout")
_OFF_WHEN_NULL = ("final_logit_softcapping", "attn_logit_softcapping")


def architecture_named(name: Any) -> Architecture:
    """The architecture that a recipe calls `name`.

    Raises:
        UserError: if there is none.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"model.architecture={shown(name)} must be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture that a configuration is of.

    Raises:
        UserError: if it is of none.
    """
    return architecture_of_type(config.model_type)


def architecture_of_type(model_type: Any) -> Architecture:
    """The architecture whose config.json says this `model_type`.

    Raises:
        UserError: if there is none.
    """
    for architecture in _ALL:
        if architecture.config_class.model_type == model_type:
            return architecture
    known = ", ".join(architecture.config_class.model_type for architecture in _ALL)
    raise UserError(f"model_type {shown(model_type)} is not one of: {known}")


def build_model(config: PreTrainedConfig) -> Any:
    """A model with fresh weights, as `training` makes it."""
    return cast(Any, architecture_of(config).model_class)(config)


def _is_plain(hint: Any) -> bool:
    """Whether a recipe can write a value of this type: a number, text, a yes or no, null, or a list of those."""
    if get_origin(hint) in (Union, types.UnionType, list):
        return all(_is_plain(kind) for kind in get_args(hint))
    return hint in (int, float, str, bool, types.NoneType)


def _check_num_layers(value: Any) -> None:
    """Before the configuration is made, which holds a list with an entry for each layer."""
    if isinstance(value, int) and value > LARGEST_NUM_LAYERS:
        raise ValueError(f"num_hidden_layers={shown(value)} must be at most {LARGEST_NUM_LAYERS}")


def _check_settings(config: Any, setting_types: Mapping[str, Any]) -> None:
    """What the configurations of transformers let pass and their models then fail on, or train wrongly with."""
    for name, hint in setting_types.items():
        value = getattr(config, name)
        is_size = hint is int or name in ("head_dim", "num_key_value_heads")
        if (is_size or (name == "sliding_window" and _has_windows(config))) and (
            value is None or not 1 <= value <= _LARGEST_SIZE
        ):
            raise ValueError(f"{name}={shown(value)} must be from 1 to {_LARGEST_SIZE}")
        if name in _ACTIVATIONS and value not in ACT2FN:
            raise ValueError(f"{name}={shown(value)} is not one of: {', '.join(sorted(ACT2FN))}")
        if name in (*_POSITIVE, *_NOT_NEGATIVE) and not (value is None and name in _OFF_WHEN_NULL):
            lowest = "above 0" if name in _POSITIVE else "at least 0"
            in_range = value is not None and (value > 0 or (value == 0 and name in _NOT_NEGATIVE))
            if not in_range or value == float("inf"):
                raise ValueError(f"{name}={shown(value)} must be a finite number {lowest}")
    if config.attention_dropout >= 1:
        raise ValueError(f"attention_dropout={config.attention_dropout} must be below 1")
    if config.model_type == "qwen2_moe":
        _check_experts(config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} is not divisible by "
            f"num_key_value_heads={config.num_key_value_heads}"
        )


def _has_windows(config: Any) -> bool:
    """Whether the mask of a sliding window has to be made; Gemma 2 makes it even where no layer uses it."""
    is_on = config.model_type == "gemma2" or config.use_sliding_window
    return is_on or "sliding_attention" in config.layer_types


def _check_experts(config: Any) -> None:
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than num_experts={config.num_experts}"
        )
    sparse = set(range(config.decoder_sparse_step - 1, config.num_hidden_layers, config.decoder_sparse_step))
    if not sparse - set(config.mlp_only_layers):
        raise ValueError(
            f"decoder_sparse_step={config.decoder_sparse_step} and mlp_only_layers={shown(config.mlp_only_layers)} "
            f"leave none of num_hidden_layers={config.num_hidden_layers} with experts"
        )

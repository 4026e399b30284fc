"""MoxE: a language model of xLSTM experts with entropy-aware routing.

After `import moxe` the Auto classes of transformers know it too: `AutoModelForCausalLM.from_pretrained(folder)` works.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moxe.models.configuration_moxe import MoxEConfig
    from moxe.models.configuration_xlstm import XLSTMConfig
    from moxe.models.modeling_moxe import MoxEForCausalLM, MoxEModel
    from moxe.models.modeling_xlstm import XLSTMForCausalLM, XLSTMModel

__version__ = "0.1.0"
__all__ = [
    "MoxEConfig",
    "MoxEForCausalLM",
    "MoxEModel",
    "XLSTMConfig",
    "XLSTMForCausalLM",
    "XLSTMModel",
    "__version__",
]


def register() -> None:
    """Import the model, give this package its public names, and register them with transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    global MoxEConfig, MoxEForCausalLM, MoxEModel, XLSTMConfig, XLSTMForCausalLM, XLSTMModel
    from moxe.models.configuration_moxe import MoxEConfig
    from moxe.models.configuration_xlstm import XLSTMConfig
    from moxe.models.modeling_moxe import MoxEForCausalLM, MoxEModel
    from moxe.models.modeling_xlstm import XLSTMForCausalLM, XLSTMModel

    for config, model, language_model in (
        (MoxEConfig, MoxEModel, MoxEForCausalLM),
        (XLSTMConfig, XLSTMModel, XLSTMForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, language_model, exist_ok=True)


# Loading takes seconds. The program `moxe` does it itself, once it knows that a command needs the model and not, say, a
# help text; for everyone else it is what `import moxe` means.
if not sys.argv or PurePath(sys.argv[0]).stem != "moxe":
    register()

"""Which parameters AdamW decays, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moxe.training.config import TrainingConfig

# The matrices that mix channels. Everything else keeps its scale: norms, biases, embeddings, convolutions, learnable
# skips, the gates of both cells and the sLSTM's recurrent matrices (whose scale decides what is remembered), and the
# difficulty head (a single output, trained as a regression).
_DECAYED_MODULES = {"up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "router", "lm_head"}
# The same in the models of transformers: an attention's output, the gated feed-forward's second input, a router, and
# the gate of a shared expert. Their experts are parameters of one module.
_DECAYED_MODULES |= {"o_proj", "gate_proj", "gate", "shared_expert_gate"}
_DECAYED_EXPERTS = {"gate_up_proj", "down_proj"}


def decays_weight(name: str) -> bool:
    """Whether the parameter called `name` (as in `named_parameters`) is decayed."""
    *_, module, parameter = ("", *name.split("."))
    return (parameter == "weight" and module in _DECAYED_MODULES) or (
        module == "experts" and parameter in _DECAYED_EXPERTS
    )


def decayed_parameter_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that are decayed, in their order."""
    return [name for name in names if decays_weight(name)]


def learning_rate_schedule(config: TrainingConfig, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
    """The schedule of `config` over `num_training_steps`, from transformers.

    `cosine`: linear warm-up from 0, then a half cosine down to `min_learning_rate_ratio`. `wsd`: linear warm-up,
    constant, then a half cosine to the same minimum over the last `decay_ratio` of the steps.
    """
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

    num_warmup_steps = math.ceil(config.warmup_ratio * num_training_steps)
    if config.schedule == "wsd":
        num_decay_steps = min(math.ceil(config.decay_ratio * num_training_steps), num_training_steps - num_warmup_steps)
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=num_warmup_steps,
            num_decay_steps=num_decay_steps,
            num_training_steps=num_training_steps,
            min_lr_ratio=config.min_learning_rate_ratio,
        )
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        min_lr_rate=config.min_learning_rate_ratio,
    )

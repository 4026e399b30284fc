"""Which parameters are decayed, and the two schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from moxe.training.config import TrainingConfig
from moxe.training.optimizer import decays_weight, learning_rate_schedule
from tests.training.tiny import tiny_model

DECAYED = {"up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "router", "lm_head"}


@pytest.mark.parametrize("expert_kind", ["xlstm", "ffn"])
def test_every_parameter_is_in_exactly_one_group(make_trainer, expert_kind: str):
    trainer = make_trainer(model=tiny_model(expert_kind=expert_kind), weight_decay=0.3)
    decayed, kept = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    grouped = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in trainer.model.parameters()}


def test_only_matrices_that_mix_channels_are_decayed(make_trainer):
    names = [name for name, _ in tiny_model().named_parameters()]
    decayed = {name for name in names if decays_weight(name)}
    assert decayed == {name for name in names if name.rpartition(".")[0].rpartition(".")[2] in DECAYED} - {
        name for name in names if name.endswith(("bias", "difficulty_weight"))
    }
    last_parts = {".".join(name.split(".")[-2:]) for name in decayed}
    assert last_parts == {f"{module}.weight" for module in DECAYED}
    for kept in ("embed_tokens", "norm", "gate_weight", "recurrent_weight", "conv", "skip", "difficulty", "bias"):
        matching = [name for name in names if kept in name]
        assert matching, kept
        assert not decayed & set(matching), kept


def test_weight_decay_and_betas_reach_adamw(make_trainer):
    trainer = make_trainer(beta1=0.8, beta2=0.9, learning_rate=0.5)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["lr"] == 0.5


def rates(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = learning_rate_schedule(TrainingConfig(**settings), optimizer, steps)
    values = []
    for _ in range(steps + 1):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_cosine_warms_up_linearly_and_ends_at_the_minimum():
    values = rates(100, schedule="cosine", warmup_ratio=0.1, min_learning_rate_ratio=0.2)
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    for step in range(10, 101):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert values[step] == pytest.approx(expected)


def test_wsd_is_constant_between_warm_up_and_decay():
    values = rates(100, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.3, min_learning_rate_ratio=0.1)
    assert values[0] < values[5] < 1
    assert values[10:71] == pytest.approx([1.0] * 61)
    assert all(later < earlier for earlier, later in pairwise(values[70:]))
    assert values[100] == pytest.approx(0.1)


def test_wsd_fits_a_run_of_few_steps():
    values = rates(3, schedule="wsd", warmup_ratio=0.5, decay_ratio=0.5)
    assert max(values) == pytest.approx(1.0)
    assert values[3] == pytest.approx(0.1)

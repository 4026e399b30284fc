"""`load_balancing: bias` in training: the biases move once a step that is made, by the routing of the whole step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.training.trainer import MoxETrainer
from tests.training.tiny import Rows, tiny_model

RATE = 0.125  # exact in float32, so that sums of steps are
LAYERS, EXPERTS, EXPERTS_A_TOKEN = 2, 4, 2


class Biases(TrainerCallback):
    """Those of all layers [layers, E] after every step."""

    def __init__(self) -> None:
        self.after_steps: list[Tensor] = []

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.after_steps.append(torch.stack([layer.router.balancing_bias.clone() for layer in model.model.layers]))


def balanced_model() -> MoxEForCausalLM:
    return tiny_model(load_balancing="bias", balancing_bias_rate=RATE)


def counted(model: MoxEForCausalLM, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The assignments of every update, which is made all the same."""
    updates: list[Tensor] = []
    update = model.update_balancing_bias

    def note_and_update(assignments: Tensor) -> None:
        updates.append(assignments.clone())
        update(assignments)

    patch.setattr(model, "update_balancing_bias", note_and_update)
    return updates


def train(trainer: MoxETrainer) -> list[Tensor]:
    biases = Biases()
    trainer.add_callback(biases)
    trainer.train()
    return biases.after_steps


def tokens_of(rows: Rows) -> int:
    return int(rows.attention_mask.sum())


@pytest.mark.parametrize("batch", [{"batch_size": 8}, {"batch_size": 2, "gradient_accumulation_steps": 4}], ids=str)
def test_biases_move_once_a_step_by_the_load_of_all_its_micro_batches(
    make_trainer: Callable[..., MoxETrainer], monkeypatch: pytest.MonkeyPatch, batch: dict[str, int]
):
    model, rows = balanced_model(), Rows(8)
    with torch.no_grad():  # what the first step sees
        routing = model(**{name: getattr(rows, name) for name in vars(rows)}, output_router_logits=True).routing
    first = torch.stack([layer.assignments() for layer in routing])
    updates = counted(model, monkeypatch)
    after_steps = train(make_trainer(model=model, rows=rows, max_steps=3, **batch))
    assert len(updates) == 3
    assert torch.equal(updates[0], first)
    assert all((update.sum(1) == EXPERTS_A_TOKEN * tokens_of(rows)).all() for update in updates)
    expected = torch.zeros(LAYERS, EXPERTS)
    for update, bias in zip(updates, after_steps, strict=True):
        mean = update.sum(1, keepdim=True) / EXPERTS
        expected += RATE * ((update < mean).float() - (update > mean).float())
        assert torch.equal(bias, expected)
    assert (after_steps[0] != 0).any()


def test_validation_moves_no_bias(make_trainer: Callable[..., MoxETrainer], monkeypatch: pytest.MonkeyPatch):
    model = balanced_model()
    updates = counted(model, monkeypatch)
    make_trainer(model=model).evaluate()
    assert updates == []
    assert not any(layer.router.balancing_bias.any() for layer in model.model.layers)


def test_a_skipped_step_and_the_search_for_its_cause_move_no_bias(
    make_trainer: Callable[..., MoxETrainer], monkeypatch: pytest.MonkeyPatch
):
    """The second step's loss is not finite, so its forward pass is run once more to find out where."""
    model, rows, passes, said = balanced_model(), Rows(8), [], []

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        passes.append(len(passes) + 1)
        return output * math.nan if len(passes) in (2, 3) else output

    model.model.norm.register_forward_hook(spoil)
    updates = counted(model, monkeypatch)
    trainer = make_trainer(model=model, rows=rows, batch_size=8, max_steps=3, on_nonfinite="skip", say=said.append)
    after_steps = train(trainer)
    assert len(said) == 1
    assert said[0].startswith("step 2 skipped")
    assert len(updates) == 2
    assert all((update.sum(1) == EXPERTS_A_TOKEN * tokens_of(rows)).all() for update in updates)
    assert torch.equal(after_steps[1], after_steps[0])
    assert not torch.equal(after_steps[2], after_steps[1])

"""The Trainer of transformers itself, without a line of ours: the loss comes from the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import tiny_model, token_ids
from tests.modules.comparison import assert_equal


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = token_ids(12, 9)
        self.labels = self.ids.clone()
        self.labels[:4, :5] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def make_trainer(model: MoxEForCausalLM, folder: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_three_steps_train_every_parameter(tmp_path: Path):
    model = tiny_model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert len(losses_of(trainer)) == 3
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_logged_loss_is_that_of_equation_21(tmp_path: Path):
    """The Trainer counts the targets of a batch itself; the count must be ours."""
    model, rows = tiny_model(dtype=torch.float32), Rows()
    with torch.no_grad():
        expected = model(rows.ids, labels=rows.labels).loss
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=12, max_steps=1)
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(float(expected), rel=1e-4)]


def test_accumulated_steps_are_the_steps_of_the_large_batch(tmp_path: Path):
    """For the language-model loss, also where micro-batches hold unequal numbers of targets."""
    router_losses = ("difficulty_loss_coef", "group_loss_coef", "router_z_loss_coef", "load_balancing_loss_coef")
    weights = []
    for settings in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        model = tiny_model(**dict.fromkeys(router_losses, 0.0))
        trainer = make_trainer(model, tmp_path, max_grad_norm=0.0, optim="sgd", **settings)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(weights[1], weights[0])


def test_evaluation_returns_the_loss_of_equation_21(tmp_path: Path):
    model = tiny_model(dtype=torch.float32)
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=12)
    rows = Rows()
    with torch.no_grad():
        expected = model(rows.ids, labels=rows.labels).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_predictions_are_the_logits(tmp_path: Path):
    model = tiny_model(dtype=torch.float32)
    predicted = make_trainer(model, tmp_path, per_device_eval_batch_size=4).predict(Rows())
    with torch.no_grad():
        expected = model(Rows().ids).logits
    assert_equal(torch.from_numpy(predicted.predictions), expected)

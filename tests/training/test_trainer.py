"""MoxETrainer: exact accumulation, every number in the log, validation by token, nothing hidden."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.metrics import MetricsFile, read_metrics
from moxe.observability.routing import routing_statistics
from moxe.training.trainer import count_targets, flatten
from tests.training.tiny import Rows, tiny_model

NO_ROUTER_LOSSES = {
    "difficulty_loss_coef": 0.0,
    "group_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
    "load_balancing_loss_coef": 0.0,
}


def batch_of(rows: Rows, indices: range) -> dict[str, torch.Tensor]:
    return default_data_collator([rows[index] for index in indices])


def gradients(trainer, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What one optimiser step over these micro-batches would be given."""
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.zero_grad()
    for batch in batches:
        trainer.training_step(trainer.model, batch, count)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.fixture
def trainer64(make_trainer):
    """A trainer of a float64 model without router losses, ready to step."""
    trainer = make_trainer(model=tiny_model(**NO_ROUTER_LOSSES).double(), gradient_accumulation_steps=4)
    trainer.create_optimizer()
    return trainer


def test_accumulated_gradients_equal_the_large_batchs(trainer64):
    rows = Rows(8)
    whole = gradients(trainer64, [batch_of(rows, range(8))])
    parts = [batch_of(rows, range(first, last)) for first, last in ((0, 1), (1, 5), (5, 6), (6, 8))]
    assert len({count_targets(part) for part in parts}) > 2
    accumulated = gradients(trainer64, parts)
    assert whole.keys() == accumulated.keys()
    for name, gradient in whole.items():
        message = f"the gradient of {name} differs"
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-9, atol=1e-12, msg=message)


def test_the_logged_loss_of_an_accumulated_step_is_the_large_batchs(make_trainer):
    rows = Rows(8)
    trainer = make_trainer(model=tiny_model().double())
    trainer.create_optimizer()
    gradients(trainer, [batch_of(rows, range(0, 3)), batch_of(rows, range(3, 8))])
    terms = trainer._interval_losses(steps=1)
    with torch.no_grad():
        expected = trainer.model(**batch_of(rows, range(8)))
    assert terms["lm_loss"] == pytest.approx(expected.lm_loss.item(), rel=1e-9)
    coefficients = [trainer.model.config.to_dict()[name] for name in NO_ROUTER_LOSSES]
    router_terms = [terms[term] for term in MoxEForCausalLM.loss_terms[2:]]
    total = terms["lm_loss"] + sum(c * t for c, t in zip(coefficients, router_terms, strict=True))
    assert terms["loss"] == pytest.approx(total, rel=1e-9)


def test_targets_are_counted_as_the_model_counts_them():
    rows = Rows(8)
    batch = batch_of(rows, range(8))
    model = tiny_model(**NO_ROUTER_LOSSES).double()
    with torch.no_grad():
        mean = model(**batch).lm_loss
        total = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    assert (total / mean).item() == pytest.approx(count_targets(batch), rel=1e-9)


def test_a_training_line_holds_every_number(make_trainer, tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    make_trainer(metrics=metrics, num_epochs=2.0).train()
    lines = [record for record in read_metrics(metrics.path) if "layers" in record]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    tokens = int(Rows(8).attention_mask.sum())
    assert lines[-1]["tokens"] == 2 * tokens
    numbers = {
        "step",
        "epoch",
        "tokens",
        "learning_rate",
        *MoxEForCausalLM.loss_terms,
        "gradient_norm",
        "tokens_per_second",
    }
    for line in lines:
        assert line.keys() == numbers | {"gradient_norms", "skipped_steps", "layers"}
        assert all(math.isfinite(line[key]) for key in numbers)
        assert line["skipped_steps"] == 0
        assert line["tokens_per_second"] > 0
        assert len(line["layers"]) == 2
        for layer in line["layers"]:
            assert sum(layer["load"]) == pytest.approx(1)
            assert layer["mlstm_share"] == pytest.approx(sum(layer["load"][:2]))
            assert 0 < layer["difficulty_mean"] < 1
            assert 0 < layer["router_entropy"] <= 1


def test_a_line_is_the_mean_over_the_steps_since_the_last_one(make_trainer, tmp_path: Path):
    files = [MetricsFile(tmp_path / name) for name in ("every.jsonl", "second.jsonl")]
    for metrics, logging_steps in zip(files, (1, 2), strict=True):
        make_trainer(metrics=metrics, logging_steps=logging_steps, num_epochs=2.0).train()
    every, second = ([line for line in read_metrics(file.path) if "layers" in line] for file in files)
    assert [line["step"] for line in second] == [2, 4]
    for term in MoxEForCausalLM.loss_terms:
        assert second[0][term] == pytest.approx((every[0][term] + every[1][term]) / 2, rel=1e-5)


def test_the_last_step_is_logged_and_validated_whatever_the_intervals(make_trainer, tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    make_trainer(metrics=metrics, logging_steps=100, max_steps=3).train()
    assert [sorted(record)[-1] for record in read_metrics(metrics.path)] == ["z_loss", "validation_z_loss"]
    assert {record["step"] for record in read_metrics(metrics.path)} == {3}


def test_validation_is_weighted_by_target_tokens(make_trainer, tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    trainer = make_trainer(metrics=metrics, batch_size=2)
    result = trainer.evaluate()
    batch = batch_of(Rows(5, seed=1), range(5))
    with torch.no_grad():
        outputs = trainer.model.eval()(**batch, output_router_logits=True)
    (record,) = read_metrics(metrics.path)
    assert record["validation_lm_loss"] == pytest.approx(outputs.lm_loss.item(), rel=1e-5)
    assert record["validation_tokens"] == count_targets(batch)
    assert result["eval_lm_loss"] == record["validation_lm_loss"]
    assert {f"validation_{term}" for term in MoxEForCausalLM.loss_terms} <= record.keys()
    for logged, layer in zip(
        record["validation_layers"], routing_statistics(outputs.routing, 4, batch["attention_mask"]), strict=True
    ):
        assert logged["load"] == pytest.approx(layer.load)
        assert logged["router_entropy"] == pytest.approx(layer.router_entropy, rel=1e-4)


def test_training_lowers_the_loss(make_trainer, tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    make_trainer(metrics=metrics, max_steps=30, learning_rate=1e-2).train()
    lines = [record["lm_loss"] for record in read_metrics(metrics.path) if "layers" in record]
    assert lines[-1] < lines[0] - 0.5


def test_bfloat16_autocast_trains_float32_weights(make_trainer, tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    trainer = make_trainer(metrics=metrics, max_steps=2, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(record["loss"]) for record in read_metrics(metrics.path) if "loss" in record)


def test_reporters_are_given_every_number_under_a_flat_name():
    layers = [{"load": [0.25, 0.75], "difficulty_mean": None}]
    record = {"loss": 1.0, "gradient_norms": {"head": 0.5}, "layers": layers}
    flat = {"loss": 1.0, "gradient_norms/head": 0.5, "layers/0/load/0": 0.25, "layers/0/load/1": 0.75}
    assert flatten(record) == flat

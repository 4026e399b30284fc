"""What the guards do to a run: skipped steps leave no trace in weights and optimiser, and everything is said."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from moxe.errors import UserError
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.metrics import MetricsFile, read_metrics
from moxe.training import guard
from moxe.training.trainer import MoxETrainer
from tests.training.tiny import Rows, tiny_model


class History(TrainerCallback):
    """Weights, optimiser and learning rate after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[int, dict[str, Tensor]]] = []
        self.rates: list[float] = []

    def on_step_end(self, *args: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        self.weights.append(deepcopy(model.state_dict()))
        self.moments.append(deepcopy(optimizer.state_dict()["state"]))
        self.rates.append(lr_scheduler.get_last_lr()[0])


def poison(model: MoxEForCausalLM, steps: set[int], value: float = math.nan) -> MoxEForCausalLM:
    """Spoil the gradient of the final norm in these backward passes, counted from 1."""
    passes = iter(range(1, 1000))
    weight = model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * value if next(passes) in steps else gradient)
    return model


def train(trainer: MoxETrainer) -> History:
    history = History()
    trainer.add_callback(history)
    trainer.train()
    return history


def test_a_skipped_step_changes_neither_weights_nor_moments_and_the_schedule_goes_on(make_trainer, tmp_path: Path):
    metrics, said = MetricsFile(tmp_path / "metrics.jsonl"), []
    settings = {"max_steps": 6, "weight_decay": 0.5, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    model = poison(tiny_model(), {3, 4})
    skipping = train(make_trainer(model=model, metrics=metrics, on_nonfinite="skip", say=said.append, **settings))
    plain = train(make_trainer(**settings))
    for step in (2, 3):
        assert_same(skipping.weights[step], skipping.weights[1])
        assert str(skipping.moments[step]) == str(skipping.moments[1])
    assert_same(skipping.weights[1], plain.weights[1])
    assert any(not torch.equal(value, skipping.weights[3][name]) for name, value in skipping.weights[4].items())
    assert skipping.rates == plain.rates
    lines = [line for line in read_metrics(metrics.path) if "layers" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [math.isnan(line["gradient_norm"]) for line in lines] == [False, False, True, True, False, False]
    assert [sentence.split(":")[0] for sentence in said] == ["step 3 skipped", "step 4 skipped"]
    assert "first in model.norm.weight (final_norm) (gradient norm nan)" in said[0]


def assert_same(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def test_more_than_the_allowed_skips_in_a_row_stop_the_run(make_trainer):
    model = poison(tiny_model(), {2, 3, 5, 6, 7}, math.inf)
    trainer = make_trainer(model=model, max_steps=9, on_nonfinite="skip", max_skips_in_a_row=2)
    with pytest.raises(UserError, match=r"before the update of step 7: .* after 2 skipped steps") as error:
        trainer.train()
    assert "on_nonfinite" not in str(error.value)
    assert trainer.guard.skipped_steps == 4


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_stop_the_run_at_once_and_stay_as_they_are(
    make_trainer, tmp_path: Path, on_nonfinite: str
):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    trainer = make_trainer(metrics=metrics, max_steps=3, on_nonfinite=on_nonfinite)
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 0] = math.nan
    before = deepcopy(trainer.model.state_dict())
    with pytest.raises(UserError, match=r"update of step 1: .*1 of the 2,048 numbers of lm_head.weight") as error:
        trainer.train()
    assert str(error.value).endswith("try another --name with a training.learning_rate below 0.003")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    (record,) = read_metrics(metrics.path)
    assert math.isnan(record["loss"])
    assert math.isnan(record["gradient_norm"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_the_gradients_that_were_not_finite_are_named_whether_they_are_clipped_or_not(
    make_trainer, max_grad_norm: float, value: float
):
    trainer = make_trainer(model=poison(tiny_model(), {2}, value), max_steps=3, max_grad_norm=max_grad_norm)
    with pytest.raises(UserError, match=r"step 2: the loss is finite but its gradient is not: .*") as error:
        trainer.train()
    assert "first in model.norm.weight (final_norm) (gradient norm" in str(error.value)
    assert str(error.value).endswith(
        "try training.on_nonfinite skip, or another --name with a training.learning_rate below 0.003"
    )


def test_the_forward_pass_is_looked_at_in_every_micro_batch(make_trainer):
    model = tiny_model()
    trainer = make_trainer(model=model, batch_size=1, gradient_accumulation_steps=8, max_steps=1)
    token = int(Rows(8).input_ids[5, 3])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = 3e38
    with pytest.raises(UserError, match=r"first layer 0, slstm_mixers \(model.layers.0.slstm_mixer.norm\)"):
        trainer.train()


def test_a_spike_is_skipped_until_it_is_the_new_level(make_trainer):
    said: list[str] = []
    trainer = make_trainer(max_steps=5, spike_sigmas=6.0, max_skips_in_a_row=3, say=said.append)
    recent = {"recent_losses": [1.0] * guard.NEEDED, "nonfinite_in_a_row": 0, "spikes_in_a_row": 0, "skipped_steps": 0}
    trainer.guard.load_state_dict(recent)
    history = train(trainer)
    assert_same(history.weights[2], tiny_model().state_dict())
    assert any(not torch.equal(value, history.weights[2][name]) for name, value in history.weights[3].items())
    assert [sentence.split(":")[0] for sentence in said] == [f"step {n} skipped" for n in (1, 2, 3)] + ["step 4 made"]
    assert trainer.guard.skipped_steps == 3


def test_the_guard_is_given_the_loss_of_the_whole_step_once(make_trainer):
    whole = make_trainer(max_steps=3, batch_size=4)
    parts = make_trainer(max_steps=3, batch_size=2, gradient_accumulation_steps=2)
    seen: list[list[float]] = []
    for trainer in (whole, parts):
        trainer.train()
        seen.append(trainer.guard.state_dict()["recent_losses"])
    assert len(seen[0]) == 3
    assert max(seen[0]) < 1.2 * math.log(64)
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_the_logged_norms_are_those_before_clipping_and_their_squares_add_up(make_trainer, tmp_path: Path):
    files = [MetricsFile(tmp_path / name) for name in ("clipped.jsonl", "whole.jsonl")]
    for metrics, max_grad_norm in zip(files, (1e-3, 0.0), strict=True):
        make_trainer(metrics=metrics, max_steps=1, max_grad_norm=max_grad_norm).train()
    clipped, whole = (read_metrics(metrics.path)[0] for metrics in files)
    assert clipped["gradient_norm"] > 0.1
    assert clipped["gradient_norms"] == whole["gradient_norms"]
    squares = sum(norm**2 for norm in clipped["gradient_norms"].values())
    assert squares == pytest.approx(clipped["gradient_norm"] ** 2, rel=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-2, 100.0])
def test_without_an_incident_the_weights_are_bit_for_bit_those_without_guards(make_trainer, max_grad_norm: float):
    class Unguarded(MoxETrainer):
        _clip_grad_norm = Trainer._clip_grad_norm
        _get_grad_norm = Trainer._get_grad_norm
        _prepare_inputs = Trainer._prepare_inputs
        log = Trainer.log

    settings = {"max_steps": 4, "max_grad_norm": max_grad_norm, "on_nonfinite": "skip", "spike_sigmas": 6.0}
    guarded, unguarded = make_trainer(**settings), make_trainer(**settings)
    unguarded.__class__ = Unguarded
    guarded.train()
    unguarded.train()
    assert_same(guarded.model.state_dict(), unguarded.model.state_dict())


def test_a_token_outside_the_vocabulary_is_one_sentence(make_trainer):
    rows = Rows(8)
    rows.input_ids[:, 7] = 64
    with pytest.raises(UserError, match=r"the batch of step 1 holds the id 64 in row 0, column 7 of its input_ids"):
        make_trainer(rows=rows).train()
    trainer = make_trainer()
    trainer.eval_dataset.labels[4, 5] = 99
    with pytest.raises(UserError, match=r"a batch of the validation holds the id 99 in row 0, column 5 of its labels"):
        trainer.evaluate()


def test_what_the_routing_watch_finds_is_said(make_trainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moxe.observability.routing_watch.STEPS", 5)
    said: list[str] = []
    model = tiny_model(load_balancing_loss_coef=0.0, load_balancing="bias")
    with torch.no_grad():
        model.model.layers[1].router.bias[2] = -1e4
    make_trainer(model=model, max_steps=7, say=said.append).train()
    assert len(said) == 1
    assert said[0].startswith("step 5: layer 1, expert 2 (group S): less than 1% of the assignments since step 1; try ")
    assert said[0].endswith("model.balancing_bias_rate above 0.001")  # as the model's configuration has it

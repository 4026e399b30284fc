"""The diagnosis tells apart where numbers stopped being finite: weights, forward pass, losses, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.modules.router import RouterOutput
from moxe.training.diagnosis import diagnose
from tests.training.tiny import tiny_model


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def finding(model: MoxEForCausalLM, *batches: dict[str, Tensor]) -> str:
    """The diagnosis of a step over the batches, with the gradients that it really has."""
    model.train()
    losses = dict.fromkeys(MoxEForCausalLM.loss_terms, 0.0)
    for inputs in batches or (batch(),):
        outputs = model(**inputs)
        outputs.loss.backward()
        losses = {term: losses[term] + getattr(outputs, term).item() for term in MoxEForCausalLM.loss_terms}
    diagnosis = diagnose(model, batches or (batch(),), losses)
    assert diagnosis.is_in_weights == (not all(p.isfinite().all() for p in model.parameters()))
    return diagnosis.finding


def set_weight(model: MoxEForCausalLM, name: str, index: object, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name)[index] = value


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("model.embed_tokens.weight", (5, 3), "1 of the 2,048 numbers of model.embed_tokens.weight (embedding)"),
        ("lm_head.weight", 7, "32 of the 2,048 numbers of lm_head.weight (head)"),
        ("model.layers.1.router.weight", (0, 0), "model.layers.1.router.weight (layer 1, routers)"),
        ("model.layers.0.slstm_mixer.gate_bias", (0, 1, 0, 2), "(layer 0, slstm_mixers, input gate)"),
        ("model.layers.0.mlstm_mixer.gate_bias", (0, 1), "(layer 0, mlstm_mixers, input gate)"),
        ("model.layers.0.mlstm_mixer.gate_bias", (0, 2), "(layer 0, mlstm_mixers, forget gate)"),
        ("model.layers.1.experts.mlstm.up_proj.weight", (1, 0, 0), "(layer 1, mlstm_experts, expert 1)"),
        ("model.layers.1.experts.mlstm.gate_weight", (0, 0, 9), "(layer 1, mlstm_experts, expert 0, input gate)"),
        ("model.layers.0.experts.slstm.if_proj.weight", (1, 0, 0, 3), "(layer 0, slstm_experts, expert 3, input gate)"),
        ("model.layers.0.experts.slstm.zo_proj.weight", (0, 0, 0, -1), "expert 2, output gate)"),
        ("model.layers.0.experts.slstm.recurrent_weight", (0, 0, 0, 2, 0), "expert 2, cell input)"),
        ("model.layers.0.experts.slstm.ffn.up_proj.weight", (slice(None), 0, 0), "slstm_experts, expert 2 and 3)"),
    ],
)
def test_a_weight_that_is_not_finite_is_named_with_its_place(name: str, index: object, expected: str):
    model = tiny_model()
    set_weight(model, name, index, math.nan)
    message = finding(model)
    assert message.startswith("the weights are not finite: ")
    assert expected in message
    assert "more parameter" not in message


def test_a_weight_of_a_shared_expert_and_of_a_feed_forward_part_is_named_with_its_place():
    for name, place in (
        ("model.layers.1.shared_expert.gate_weight", "(layer 1, shared_experts, input gate)"),
        ("model.layers.0.experts.mlstm.ffn.up_proj.weight", "(layer 0, mlstm_experts, expert 0)"),
    ):
        model = tiny_model(shared_expert="mlstm", mlstm_ffn_expansion=1.3)
        set_weight(model, name, (0, 0, 3), math.nan)
        assert place in finding(model)


def test_more_weights_that_are_not_finite_are_counted():
    model = tiny_model()
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.router.weight"):
        set_weight(model, name, 0, math.inf)
    message = finding(model)
    assert "32 of the 128 numbers of model.layers.0.router.weight (layer 0, routers) and 2 more parameters" in message


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("name", "index", "value", "expected"),
    [
        # Finite weights whose products are not: of the gates with their inputs, or before them.
        (
            "model.layers.1.experts.mlstm.gate_weight",
            (slice(None), 0),
            3e38,
            "layer 1, mlstm_experts, input gate (model.layers.1.experts.mlstm)",
        ),
        (
            "model.layers.0.mlstm_mixer.gate_weight",
            (0, 3),
            3e38,
            "layer 0, mlstm_mixers, forget gate (model.layers.0.mlstm_mixer)",
        ),
        (
            "model.layers.1.experts.slstm.if_proj.weight",
            (slice(None), slice(None), slice(None), slice(0, 16)),
            3e38,
            "layer 1, slstm_experts, input gate (model.layers.1.experts.slstm)",
        ),
        (
            "model.layers.1.mlstm_mixer.v_proj.weight",
            slice(None),
            3e38,
            "layer 1, mlstm_mixers, values (model.layers.1.mlstm_mixer)",
        ),
        (
            "model.layers.1.experts.mlstm.up_proj.weight",
            slice(None),
            3e38,
            "layer 1, mlstm_experts (model.layers.1.experts.mlstm.up_proj)",
        ),
        ("model.layers.0.router.weight", (slice(None), 0), 3e38, "layer 0, routers (model.layers.0.router)"),
    ],
)
def test_an_overflow_is_traced_to_the_first_module_and_gate(
    backend: str, name: str, index: object, value: float, expected: str
):
    model = tiny_model(backend=backend)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
    set_weight(model, name, index, value)
    message = finding(model)
    assert "lm_loss" in message.split(" not finite")[0]
    assert message.endswith(f"not finite, first {expected}")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_overflow_of_the_recurrence_is_the_cells(backend: str):
    model = tiny_model(backend=backend)
    set_weight(model, "model.layers.1.slstm_mixer.recurrent_weight", slice(None), 3e38)
    message = finding(model)
    assert "first layer 1, slstm_mixers, cell, all of whose inputs are finite, its input gate at most " in message


def test_only_the_batch_with_the_bad_token_shows_it_and_every_batch_is_looked_at():
    model = tiny_model()
    set_weight(model, "model.embed_tokens.weight", 9, 3e38)
    without, with_it = batch(), batch(1)
    for inputs, token in ((without, 3), (with_it, 9)):
        inputs["input_ids"][inputs["input_ids"] == 9] = 3
        inputs["input_ids"][1, 2] = token
    assert "first layer 0, slstm_mixers" in finding(model, without, with_it)


def test_a_loss_that_overflows_by_itself_is_named_and_no_module():
    model = tiny_model(difficulty_loss_coef=0.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.weight.mul_(1e20)
    message = finding(model)
    assert "z_loss" in message
    assert "lm_loss" not in message
    assert message.endswith("though every module's output is finite")


def test_a_gradient_that_is_poisoned_on_the_way_back_is_found_where_it_begins():
    model = tiny_model()

    def poison(module: torch.nn.Module, args: object, output: RouterOutput) -> None:
        output.unbiased_logits.register_hook(lambda gradient: gradient * math.nan)

    model.model.layers[1].router.register_forward_hook(poison)
    message = finding(model)
    beginning = "from the loss backwards, first in model.layers.1.router.bias (layer 1, routers), "
    assert message.startswith(f"the loss is finite but its gradient is not: {beginning}")
    broken = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert message.count("(layer") == 3
    assert message.endswith(f" and {len(broken) - 3} more parameters")


def test_a_norm_that_overflows_without_any_number_doing_so_is_told_apart():
    model = tiny_model()
    finding(model)
    model.lm_head.weight.grad[3, 3] = 3e30
    message = diagnose(model, [batch()], dict.fromkeys(MoxEForCausalLM.loss_terms, 1.0)).finding
    assert "their norm is not" in message
    assert "3e+30, is in the gradient of lm_head.weight (head)" in message


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    set_weight(model, "model.embed_tokens.weight", slice(None), 3e38)
    finding(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training

"""Norms of the gradients by part add up to the whole's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import get_total_norm

from moxe.models.accounting import count_parameters
from moxe.training.gradients import gradient_norms, part_norms, total_norm
from tests.models.tiny import OPTIONS
from tests.training.tiny import tiny_model


def model_with_gradients(**settings):
    model = tiny_model(**settings)
    ids = torch.randint(2, 64, (4, 12))
    model(ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"expert_kind": "ffn"},
        {"expert_kind": "mlstm", "router_kind": "standard"},
        *OPTIONS,
    ],
)
def test_the_squares_of_the_parts_add_up_and_each_part_with_parameters_has_one(settings: dict[str, str]):
    model = model_with_gradients(**settings)
    norms = gradient_norms(model)
    parts = part_norms(norms)
    counts = count_parameters(model.config).total_by_part
    assert parts.keys() == {part for part, count in counts.items() if count}
    assert sum(norm**2 for norm in parts.values()) == pytest.approx(total_norm(norms).item() ** 2, rel=1e-6)


def test_a_part_is_the_norm_of_its_own_gradients_in_every_layer():
    model = model_with_gradients()
    routers = [p.grad for layer in model.model.layers for p in layer.router.parameters()]
    parts = part_norms(gradient_norms(model))
    assert parts["routers"] == pytest.approx(get_total_norm(routers).item(), rel=1e-6)
    assert parts["head"] == pytest.approx(model.lm_head.weight.grad.norm().item(), rel=1e-6)


def test_the_total_is_the_one_that_torch_clips_by():
    model = model_with_gradients()
    assert total_norm(gradient_norms(model)).equal(get_total_norm([p.grad for p in model.parameters()]))


def test_a_parameter_without_a_gradient_is_left_out():
    model = model_with_gradients()
    model.model.norm.weight.grad = None
    assert "final_norm" not in part_norms(gradient_norms(model))

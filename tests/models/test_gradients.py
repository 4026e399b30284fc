"""Which parameters learn, and that a batch taken in parts gives the gradients of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import EXPERT_KINDS, OPTIONS, tiny_config, tiny_model, token_ids
from tests.modules.comparison import assert_equal

NO_ROUTER_LOSSES: dict[str, Any] = {
    "difficulty_loss_coef": 0.0,
    "group_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
    "load_balancing_loss_coef": 0.0,
}
IGATE, FGATE = 0, 1  # their places in the sLSTM's gate bias
ROUNDING = 1e-14  # of the largest gradient in the model; float64 sums of a few hundred terms end far below


def gradients_of(model: MoxEForCausalLM, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        gradients[name] = parameter.grad.clone()
    return gradients


def every_token_once_and_more(vocab_size: int = 40) -> Tensor:
    """[3, 40] each token of the vocabulary in each row, so that the embedding has no reason for a zero either."""
    return torch.stack([torch.randperm(vocab_size, generator=torch.Generator().manual_seed(row)) for row in range(3)])


def assert_learns(name: str, gradient: Tensor, learns: Tensor, largest: float) -> None:
    """Every entry marked in `learns` has a gradient, and every other one none: rounding, next to the largest of all."""
    assert (gradient[learns].abs() > ROUNDING * largest).all(), name
    assert (gradient[~learns].abs() <= ROUNDING * largest).all(), name


def largest_of(gradients: dict[str, Tensor]) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


def without_input_bias(name: str, gradient: Tensor) -> Tensor:
    """All entries but the sLSTM's input-gate bias, which no loss can see.

    It multiplies every i_t by the same factor, hence c and n alike, and h = sigmoid(o) c / n does not change.
    """
    learns = torch.ones_like(gradient, dtype=torch.bool)
    if name.endswith("gate_bias") and gradient.ndim == 4:  # [E, H, 4, Dh]; that of an mLSTM is [E, 2 H]
        learns[:, :, IGATE] = False
    return learns


@pytest.mark.parametrize(
    "settings",
    [
        *({"expert_kind": kind} for kind in EXPERT_KINDS),
        *({"expert_kind": kind, "router_kind": "standard"} for kind in EXPERT_KINDS),
        *({"expert_kind": kind, "bias_kind": "proportional", "difficulty_threshold": 0.1} for kind in EXPERT_KINDS),
        *(options for options in OPTIONS if options.get("expert_memory") != "token"),
    ],
    ids=str,
)
def test_in_sequence_mode_every_parameter_learns(settings: dict[str, Any]):
    """In every entry, but for a bias that has no effect on the outputs of an sLSTM cell."""
    ids = every_token_once_and_more()
    gradients = gradients_of(tiny_model(**settings), input_ids=ids, labels=ids)
    for name, gradient in gradients.items():
        assert_learns(name, gradient, without_input_bias(name, gradient), largest_of(gradients))


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_a_fresh_model_learns_in_every_parameter_despite_what_starts_at_zero(expert_kind: str):
    torch.manual_seed(0)
    model = MoxEForCausalLM(tiny_config(expert_kind=expert_kind)).double()
    ids = every_token_once_and_more()
    gradients = gradients_of(model, input_ids=ids, labels=ids)
    for name, gradient in gradients.items():
        assert_learns(name, gradient, without_input_bias(name, gradient), largest_of(gradients))


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_in_token_mode_exactly_the_parameters_of_memory_never_learn(expert_kind: str):
    """What a block does with the past has no effect when every token meets an empty memory.

    mLSTM: the forget gate has nothing to forget, and only the last tap of the convolution meets a token.
    sLSTM: the recurrent matrices read h = 0; the forget gate has nothing to forget; and the input gate cancels,
    because h = sigmoid(o) (i tanh z) / i. The convolution feeds nothing but those two gates, so it and their
    projection are idle. The mixers before the experts keep their memory.
    """
    ids = every_token_once_and_more()
    model = tiny_model(expert_kind=expert_kind, expert_memory="token")
    heads = model.config.num_heads
    gradients = gradients_of(model, input_ids=ids, labels=ids)
    for name, gradient in gradients.items():
        learns = without_input_bias(name, gradient)
        if ".experts.mlstm." in name:
            if name.endswith("conv.weight"):
                learns[..., :-1] = False
            elif name.endswith(("gate_weight", "gate_bias")):
                learns[:, heads:] = False
        elif ".experts.slstm." in name:
            if name.endswith(("recurrent_weight", "if_proj.weight", "conv.weight", "conv.bias")):
                learns[:] = False
            elif name.endswith("gate_bias"):
                learns[:, :, FGATE] = False
        assert_learns(name, gradient, learns, largest_of(gradients))


@torch.no_grad()
def test_the_input_bias_of_an_slstm_cell_changes_no_logit():
    model, ids = tiny_model(), token_ids(2, 12)
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        if "slstm" in name and name.endswith("gate_bias"):
            parameter[:, :, IGATE] += 1.5
    assert_equal(model(ids).logits, before)


def test_the_difficulty_learns_from_its_own_loss_alone_when_the_bias_is_off():
    ids = every_token_once_and_more()
    on = gradients_of(tiny_model(gamma=0.0), input_ids=ids, labels=ids)
    off = gradients_of(tiny_model(gamma=0.0, difficulty_loss_coef=0.0), input_ids=ids, labels=ids)
    for name in on:
        if "difficulty" in name:
            assert (on[name] != 0).all()
            assert (off[name] == 0).all()


def test_a_token_that_is_never_seen_gets_no_gradient_in_the_embedding():
    ids = token_ids(2, 10) % 20
    gradient = gradients_of(tiny_model(), input_ids=ids, labels=ids)["model.embed_tokens.weight"]
    assert (gradient[20:] == 0).all()
    assert (gradient[ids.unique()] != 0).all()


def micro_batches() -> tuple[Tensor, Tensor, list[slice]]:
    """Rows whose parts hold very different numbers of targets, one of them none."""
    ids = token_ids(6, 9)
    labels = ids.clone()
    labels[0, 2:] = labels[1] = -100
    labels[4, :6] = -100
    return ids, labels, [slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)]


def test_parts_of_a_batch_add_up_to_the_gradients_of_the_whole_batch_exactly():
    model = tiny_model(**NO_ROUTER_LOSSES)
    ids, labels, parts = micro_batches()
    targets = int((labels[:, 1:] != -100).sum())
    whole = gradients_of(model, input_ids=ids, labels=labels)
    in_parts = [
        gradients_of(model, input_ids=ids[part], labels=labels[part], num_items_in_batch=targets) for part in parts
    ]
    for name, gradient in whole.items():
        assert_equal(torch.stack([part[name] for part in in_parts]).sum(0), gradient)


def test_a_difficulty_loss_on_the_token_loss_adds_up_over_parts_exactly_too():
    """It is a mean over targets, as the language-model loss is."""
    model = tiny_model(**{**NO_ROUTER_LOSSES, "difficulty_loss_coef": 0.5}, difficulty_target="token_loss")
    ids, labels, parts = micro_batches()
    targets = int((labels[:, 1:] != -100).sum())
    whole = gradients_of(model, input_ids=ids, labels=labels)
    in_parts = [
        gradients_of(model, input_ids=ids[part], labels=labels[part], num_items_in_batch=targets) for part in parts
    ]
    for name, gradient in whole.items():
        assert_equal(torch.stack([part[name] for part in in_parts]).sum(0), gradient)


@pytest.mark.parametrize("as_tensor", [False, True])
@torch.no_grad()
def test_router_losses_of_parts_are_weighted_by_their_share_of_the_targets(as_tensor: bool):
    """They are means over tokens and not linear, so parts can not give the whole batch's; the shares sum to one."""
    model = tiny_model()
    ids, labels, parts = micro_batches()
    targets = int((labels[:, 1:] != -100).sum())
    items = torch.tensor(targets) if as_tensor else targets
    total = torch.zeros(())
    expected = model(ids, labels=labels).lm_loss
    for part in parts:
        out = model(ids[part], labels=labels[part], num_items_in_batch=items)
        alone = model(ids[part], labels=labels[part])
        own = int((labels[part, 1:] != -100).sum())
        total = total + out.loss
        expected = expected + own / targets * (alone.loss - alone.lm_loss)
    assert_equal(total, expected)


def test_the_number_of_items_of_a_whole_batch_changes_nothing():
    model, ids = tiny_model(), token_ids(3, 8)
    assert_equal(model(ids, labels=ids, num_items_in_batch=3 * 7).loss, model(ids, labels=ids).loss)


def test_state_carries_no_gradient_from_call_to_call():
    model, ids = tiny_model(), token_ids(2, 8)
    cache = model(ids[:, :4], use_cache=True).cache_params
    assert not any(tensor.requires_grad for state in cache.states.values() for tensor in state.values())
    out = model(ids[:, 4:], labels=ids[:, 4:], cache_params=cache)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

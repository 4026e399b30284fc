"""The whole model against the paper's equations; what it returns; how its losses treat labels and padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.models.modeling_xlstm import XLSTMForCausalLM
from tests.models.tiny import EXPERT_KINDS, EXPERT_MEMORIES, LOSS_OPTIONS, OPTIONS, TINY, tiny_model, token_ids
from tests.modules.comparison import assert_equal, assert_equal_gradients
from tests.modules.paper import Routed, layer_forward, mlstm_block, model_forward, slstm_block, weights_of
from tests.tolerances import assert_close

LOSSES = ("loss", "lm_loss", "difficulty_loss", "group_loss", "z_loss", "load_balancing_loss")
COEFFICIENTS: dict[str, Any] = {
    "difficulty_loss_coef": 0.3,
    "group_loss_coef": 0.5,
    "router_z_loss_coef": 0.07,
    "load_balancing_loss_coef": 0.2,
}
ROUTER_LOSS_OF = {
    "difficulty_loss_coef": "difficulty_loss",
    "group_loss_coef": "group_loss",
    "router_z_loss_coef": "z_loss",
    "load_balancing_loss_coef": "load_balancing_loss",
}


def total_loss_by_hand(model: MoxEForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Equations 10 to 21 over all tokens of all rows, without labels to ignore."""
    rows = [model_forward(model, row) for row in ids]
    surprise = [
        -torch.log_softmax(logits, -1)[t, row[t + 1]]
        for (logits, _), row in zip(rows, ids, strict=True)
        for t in range(len(row) - 1)
    ]
    sums: dict[str, Any] = dict.fromkeys(ROUTER_LOSS_OF, 0.0)
    layers = model.config.num_hidden_layers
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    for layer in range(layers):
        routed = [decided[layer] for _, decided in rows]
        unbiased, logits = torch.cat([r.unbiased for r in routed]), torch.cat([r.logits for r in routed])
        p, chosen = torch.cat([r.probabilities for r in routed]), torch.cat([r.experts for r in routed])
        difficulty = torch.cat([r.difficulty for r in routed])
        p0 = torch.softmax(unbiased, -1)
        entropy = -(p0 * p0.log()).sum(-1) / math.log(experts)
        p_m = p[:, : experts // 2].sum(-1).mean()
        p_s = 1 - p_m
        fraction = torch.stack([(chosen == e).sum() / (len(chosen) * k) for e in range(experts)])
        target = entropy.detach() if model.config.detach_difficulty_target else entropy
        if model.config.difficulty_target == "token_loss":
            difficulty = torch.cat([r.difficulty[:-1] for r in routed])
            target = torch.stack(surprise).detach().div(math.log(TINY["vocab_size"])).clamp(max=1)
        sums["difficulty_loss_coef"] += ((difficulty - target) ** 2).mean()
        sums["group_loss_coef"] += p_m * torch.log(2 * p_m) + p_s * torch.log(2 * p_s)
        sums["router_z_loss_coef"] += (torch.logsumexp(logits, -1) ** 2).mean()
        sums["load_balancing_loss_coef"] += experts * (fraction * p.mean(0)).sum()
    terms = {ROUTER_LOSS_OF[name]: value / layers for name, value in sums.items()}
    lm_loss = torch.stack(surprise).mean()
    if model.config.load_balancing == "bias":  # reported, but no term of the loss
        sums.pop("load_balancing_loss_coef")
    router = sum(getattr(model.config, name) * terms[ROUTER_LOSS_OF[name]] for name in sums)
    return {"loss": lm_loss + router, "lm_loss": lm_loss, **terms}


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_equation_04_a_layer_mixes_with_an_slstm_block_and_then_an_mlstm_block(expert_kind: str):
    model = tiny_model(expert_kind=expert_kind)
    layer = model.model.layers[0]
    seen = []
    layer.get_submodule("router").register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    row = token_ids(1, 7)
    model(row)
    x = model.model.embed_tokens.weight[row[0]]
    x = x + slstm_block(x, weights_of(layer.get_submodule("slstm_mixer")), TINY["num_heads"])
    h = x + mlstm_block(x, weights_of(layer.get_submodule("mlstm_mixer")), TINY["num_heads"])
    assert_equal(seen[0], h)


@pytest.mark.parametrize(
    "settings",
    [*({"expert_kind": kind, "num_experts_per_tok": k} for kind in EXPERT_KINDS for k in (1, 2, 4)), *OPTIONS],
    ids=str,
)
def test_the_whole_model_computes_the_papers_equations(settings: dict[str, Any]):
    """Embedding, layers (4) to (9), final norm, head; and what each layer's router decided."""
    model = tiny_model(**settings)
    ids = token_ids(2, 8)
    out = model(ids, output_router_logits=True)
    for row in range(2):
        logits, routed = model_forward(model, ids[row])
        assert_equal(out.logits[row], logits)
        assert len(out.routing) == len(routed) == TINY["num_hidden_layers"]
        for ours, theirs in zip(out.routing, routed, strict=True):
            assert_equal(ours.logits[row], theirs.logits)
            assert_equal(ours.unbiased_logits[row], theirs.unbiased)
            assert_equal(ours.difficulty[row], theirs.difficulty)
            assert_equal(ours.expert_weights[row], theirs.weights)
            assert torch.equal(ours.expert_indices[row], theirs.experts)


def test_the_comparison_with_the_papers_loop_uses_every_expert():
    """Guards the comparison itself: the loop routes tokens to every expert."""
    model = tiny_model()
    x = model.model.embed_tokens.weight[token_ids(1, 12)[0]]
    _, routed = layer_forward(x, model.model.layers[0], "xlstm", heads=2, k=2, gamma=0.7)
    assert isinstance(routed, Routed)
    assert len(routed.experts.unique()) == TINY["num_experts"]


@pytest.mark.parametrize(
    "settings", [*({"expert_kind": kind} for kind in EXPERT_KINDS), *OPTIONS, *LOSS_OPTIONS], ids=str
)
def test_equation_21_the_loss_and_its_terms_and_every_gradient(settings: dict[str, Any]):
    model = tiny_model(**settings, **COEFFICIENTS)
    ids = token_ids(2, 8)
    out, expected = model(ids, labels=ids), total_loss_by_hand(model, ids)
    for name in LOSSES:
        assert getattr(out, name).shape == ()
        assert_equal(getattr(out, name), expected[name])
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(out.loss, list(parameters.values()))
    theirs = torch.autograd.grad(expected["loss"], list(parameters.values()), materialize_grads=True)
    assert_equal_gradients(dict(zip(parameters, ours, strict=True)), dict(zip(parameters, theirs, strict=True)))


@pytest.mark.parametrize("coefficient", list(COEFFICIENTS))
def test_equation_21_each_coefficient_weighs_its_own_term(coefficient: str):
    nothing: dict[str, Any] = dict.fromkeys(COEFFICIENTS, 0.0)
    ids = token_ids(2, 8)
    out = tiny_model(**{**nothing, coefficient: 0.25})(ids, labels=ids)
    assert_equal(out.loss, out.lm_loss + 0.25 * getattr(out, ROUTER_LOSS_OF[coefficient]))
    assert_equal(tiny_model(**nothing)(ids, labels=ids).loss, out.lm_loss)


def test_balancing_biases_move_by_the_rate_towards_an_equal_load_in_each_layer():
    model, ids = tiny_model(load_balancing="bias", balancing_bias_rate=0.25), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    routing = model(ids, attention_mask=mask, output_router_logits=True).routing
    assignments = torch.stack([decided.assignments() for decided in routing])
    before = [layer.router.balancing_bias.clone() for layer in model.model.layers]
    model.update_balancing_bias(assignments)
    for layer, decided in enumerate(routing):
        indices = decided.expert_indices[mask.bool()].flatten().tolist()
        counts = [indices.count(expert) for expert in range(TINY["num_experts"])]
        assert assignments[layer].tolist() == counts
        assert sum(counts) == 15 * TINY["num_experts_per_tok"]
        mean = sum(counts) / len(counts)
        moved = [0.25 * ((count < mean) - (count > mean)) for count in counts]
        assert_equal(model.model.layers[layer].router.balancing_bias, before[layer] + torch.tensor(moved))
    model.update_balancing_bias(torch.full((2, 4), 7))  # in balance: nothing moves
    assert_equal(model.model.layers[1].router.balancing_bias, before[1] + torch.tensor(moved))


def test_a_balancing_bias_that_is_updated_evens_out_the_load_of_a_model_that_is_not_trained():
    model, ids = tiny_model(load_balancing="bias", balancing_bias_rate=0.01), token_ids(8, 32)

    def unevenness() -> Tensor:
        with torch.no_grad():
            routing = model(ids, output_router_logits=True).routing
        load = torch.stack([decided.assignments() for decided in routing])
        model.update_balancing_bias(load)
        return (load / load.sum(1, keepdim=True) - 1 / TINY["num_experts"]).abs().max()

    unevennesses = [unevenness() for _ in range(60)]
    assert unevennesses[0] > 0.1
    assert max(unevennesses[-5:]) < 0.05


def test_balancing_biases_are_updated_only_where_there_are_any_and_by_numbers_for_each_expert():
    with pytest.raises(ValueError, match="load_balancing='loss' has no bias to update: it must be 'bias'"):
        tiny_model().update_balancing_bias(torch.zeros(2, 4))
    dense = XLSTMForCausalLM(XLSTMConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="load_balancing=None has no bias to update: it must be 'bias'"):
        dense.update_balancing_bias(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"assignments must be \[layers, E\] = \[2, 4\], got \[4\]"):
        tiny_model(load_balancing="bias").update_balancing_bias(torch.zeros(4))


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_equation_22_experts_do_k_parts_in_e_of_the_dense_work_and_it_is_linear_in_the_length(experts_per_token: int):
    model = tiny_model(num_experts_per_tok=experts_per_token)
    rows: list[int] = []
    for layer in model.model.layers:
        for kind in ("mlstm", "slstm"):
            expert = layer.get_submodule(f"experts.{kind}")
            expert.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    for tokens in (10, 20):
        rows.clear()
        model(token_ids(3, tokens))
        assert sum(rows) == TINY["num_hidden_layers"] * 3 * tokens * experts_per_token


def test_the_standard_router_has_no_difficulty_term():
    ids = token_ids(2, 8)
    out = tiny_model(router_kind="standard", difficulty_loss_coef=5.0)(ids, labels=ids, output_router_logits=True)
    assert out.routing[0].difficulty is None
    expected = out.lm_loss + 0.01 * out.group_loss + 0.001 * out.z_loss + 0.01 * out.load_balancing_loss
    assert_equal(out.loss, expected)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {"gamma": 0.3}),
        ({}, {"bias_kind": "masked", "difficulty_threshold": 0.6}),
        ({"bias_kind": "proportional"}, {"bias_kind": "masked"}),
        ({"bias_kind": "proportional"}, {"difficulty_threshold": 0.4}),
        ({}, {"group_loss_kind": "squared_difference"}),
        ({"group_loss_kind": "squared_distance"}, {"group_loss_kind": "jensen_shannon"}),
        ({}, {"num_experts_per_tok": 3}),
        ({}, {"expert_memory": "token"}),
        ({}, {"norm_eps": 0.1}),
    ],
    ids=str,
)
def test_a_setting_reaches_the_model(settings: dict[str, Any], changed: dict[str, Any]):
    """The same weights under another setting give another loss."""
    ids = token_ids(2, 12)
    one, other = tiny_model(**settings), tiny_model(**{**settings, **changed})
    other.load_state_dict(one.state_dict())
    losses = [model(ids, labels=ids).loss.detach() for model in (one, other)]
    assert not torch.allclose(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_every_block_has_the_epsilon_and_the_backend_of_the_configuration(expert_kind: str):
    modules = list(tiny_model(expert_kind=expert_kind, norm_eps=0.25, backend="reference").modules())
    assert {module.eps for module in modules if hasattr(module, "eps")} == {0.25}
    assert {module.backend for module in modules if hasattr(module, "backend")} == {"reference"}


def test_without_labels_there_is_no_loss_and_without_asking_no_routing():
    out = tiny_model()(token_ids(2, 5))
    assert [getattr(out, name) for name in LOSSES] == [None] * len(LOSSES)
    assert out.routing is None
    assert out.logits.shape == (2, 5, TINY["vocab_size"])


def test_routing_has_the_documented_shapes_and_marks_padding():
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    out = tiny_model()(ids, attention_mask=mask, output_router_logits=True)
    for routing in out.routing:
        assert routing.logits.shape == routing.unbiased_logits.shape == (2, 6, 4)
        assert routing.difficulty.shape == (2, 6)
        assert routing.expert_indices.shape == routing.expert_weights.shape == (2, 6, 2)
        assert routing.expert_indices.dtype == torch.int64
        assert (routing.expert_indices[0, :2] == -1).all()
        assert (routing.expert_indices[mask.bool()] >= 0).all()
        for values in (routing.logits, routing.unbiased_logits, routing.difficulty, routing.expert_weights):
            assert (values[0, :2] == 0).all()
        assert_equal(routing.expert_weights[mask.bool()].sum(-1), torch.ones(10, dtype=torch.float64))


def test_the_shift_is_done_inside_and_minus_100_is_ignored():
    model, ids = tiny_model(), token_ids(2, 9)
    labels = ids.clone()
    labels[0, 3] = labels[1, :5] = -100
    out = model(ids, labels=labels)
    logits = out.logits[:, :-1].reshape(-1, TINY["vocab_size"])
    assert_equal(out.lm_loss, F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100))


def test_labels_may_differ_from_the_tokens():
    model, ids, labels = tiny_model(), token_ids(1, 6), token_ids(1, 6, seed=9)
    out = model(ids, labels=labels)
    assert_equal(out.lm_loss, F.cross_entropy(out.logits[0, :-1], labels[0, 1:]))


def test_without_any_target_the_language_model_loss_is_zero_and_the_router_still_learns():
    model, ids = tiny_model(), token_ids(2, 6)
    out = model(ids, labels=torch.full_like(ids, -100))
    assert out.lm_loss == 0
    (gradient,) = torch.autograd.grad(out.loss, model.get_parameter("model.layers.0.router.weight"))
    assert (gradient != 0).any()


def test_a_target_never_crosses_a_document():
    """The last token of a document is asked for nothing, so the first of the next is nobody's target."""
    model, ids = tiny_model(), token_ids(1, 9)
    documents = torch.tensor([[4, 4, 4, 4, 1, 1, 1, 4, 4]])
    out = model(ids, labels=ids, document_ids=documents)
    targets = ids[0].roll(-1)
    inside = [0, 1, 2, 4, 5, 7]
    assert_equal(out.lm_loss, F.cross_entropy(out.logits[0, inside], targets[inside]))
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % TINY["vocab_size"]
    labels = ids.clone()
    labels[0, 4] = -100
    assert_equal(model(ids, labels=labels, document_ids=documents).lm_loss, out.lm_loss)


@pytest.mark.parametrize(
    "settings",
    [
        *({"expert_kind": kind, "expert_memory": memory} for kind in EXPERT_KINDS for memory in EXPERT_MEMORIES),
        *OPTIONS,
        *LOSS_OPTIONS,
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_masked_columns_are_no_tokens_for_any_loss(settings: dict[str, Any], side: str):
    model = tiny_model(**settings, **COEFFICIENTS)
    ids = token_ids(1, 8)
    padding = token_ids(1, 5, seed=5)
    cut = {"left": 0, "right": 8, "middle": 3}[side]
    padded = torch.cat([ids[:, :cut], padding, ids[:, cut:]], 1)
    mask = torch.cat([torch.ones(1, cut), torch.zeros(1, 5), torch.ones(1, 8 - cut)], 1).long()
    without, with_padding = model(ids, labels=ids), model(padded, attention_mask=mask, labels=padded)
    for name in LOSSES:
        assert_equal(getattr(with_padding, name), getattr(without, name))


@pytest.mark.parametrize("settings", [{}, *LOSS_OPTIONS], ids=str)
def test_the_losses_of_padded_rows_are_those_of_the_same_tokens_packed_into_one_row(settings: dict[str, Any]):
    """Every loss is a mean over real tokens, however they lie in the batch."""
    model = tiny_model(**settings, **COEFFICIENTS)
    lengths = (7, 3, 5)
    ids = token_ids(3, 7)
    mask = torch.stack([torch.arange(7) < length for length in lengths]).long()
    packed = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])[None]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    rows = model(ids, attention_mask=mask, labels=ids)
    one_row = model(packed, labels=packed, document_ids=documents)
    for name in LOSSES:
        assert_equal(getattr(rows, name), getattr(one_row, name))


def test_logits_to_keep_returns_the_last_columns_only():
    model, ids = tiny_model(), token_ids(2, 7)
    whole = model(ids).logits
    assert_equal(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert_equal(model(ids, logits_to_keep=1).logits, whole[:, -1:])


def test_training_with_labels_computes_the_same_loss_and_leaves_the_logits_out():
    model, ids = tiny_model(**COEFFICIENTS), token_ids(2, 7)
    parameters = dict(model.named_parameters())
    evaluated = model(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    assert trained.logits is None
    for name in LOSSES:
        assert_equal(getattr(trained, name), getattr(evaluated, name))
    ours, theirs = (torch.autograd.grad(out.loss, list(parameters.values())) for out in (trained, evaluated))
    assert_equal_gradients(dict(zip(parameters, ours, strict=True)), dict(zip(parameters, theirs, strict=True)))


def test_while_training_logits_are_there_without_labels_and_on_request():
    model, ids = tiny_model(), token_ids(2, 7)
    whole = model(ids).logits
    model.train()
    assert_equal(model(ids).logits, whole)
    assert_equal(model(ids, labels=ids, logits_to_keep=2).logits, whole[:, -2:])
    assert_equal(model.eval()(ids, labels=ids).logits, whole)


def test_the_model_without_a_head_returns_the_hidden_states_that_the_head_reads():
    model, ids = tiny_model(), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    hidden = model.model(ids, attention_mask=mask)
    assert hidden.last_hidden_state.shape == (2, 7, TINY["hidden_size"])
    assert_equal(model.lm_head(hidden.last_hidden_state), model(ids, attention_mask=mask).logits)
    assert hidden.cache_params is not None
    assert len(hidden.routing) == TINY["num_hidden_layers"]


def test_the_first_output_is_the_loss_or_without_labels_the_logits_and_a_tuple_is_returned_on_request():
    model, ids = tiny_model(), token_ids(1, 4)
    out, with_labels = model(ids), model(ids, labels=ids)
    assert out[0] is out.logits
    assert with_labels[0] is with_labels.loss
    assert with_labels[1] is with_labels.logits
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_equal(as_tuple[0], with_labels.loss)
    assert_equal(as_tuple[1], with_labels.logits)


@pytest.mark.parametrize("settings", [{}, *OPTIONS, *LOSS_OPTIONS], ids=str)
def test_bfloat16_autocast_runs_and_stays_near_float32(settings: dict[str, Any]):
    model, ids = tiny_model(dtype=torch.float32, **settings), token_ids(2, 24)
    with torch.no_grad():
        exact = model(ids, labels=ids).lm_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    assert out.lm_loss.dtype == torch.float32
    assert_close(out.lm_loss, exact, "model", "lm_loss", computed_in=torch.bfloat16)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("settings", [{}, *OPTIONS], ids=str)
def test_a_model_in_bfloat16_runs_with_cells_and_states_in_float32(settings: dict[str, Any]):
    model, ids = tiny_model(dtype=torch.bfloat16, **settings), token_ids(2, 24)
    with torch.no_grad():
        exact = tiny_model(dtype=torch.float32, **settings)(ids, labels=ids).lm_loss
    out = model(ids, labels=ids, use_cache=True)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    assert out.lm_loss.dtype == torch.float32
    assert_close(out.lm_loss, exact, "model", "lm_loss", computed_in=torch.bfloat16)
    assert all(gradient.isfinite().all() for gradient in gradients)
    for name, state in out.cache_params.states.items():
        assert {part: x.dtype for part, x in state.items() if part != "conv"} == dict.fromkeys(
            set(state) - {"conv"}, torch.float32
        ), name


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_without_rows_or_columns_is_allowed(shape: tuple[int, int]):
    nothing = torch.zeros(shape, dtype=torch.int64)
    out = tiny_model()(nothing, labels=nothing, output_router_logits=True)
    assert out.logits.shape == (*shape, TINY["vocab_size"])
    assert out.loss == 0


@pytest.mark.parametrize("settings", [{}, *OPTIONS, *LOSS_OPTIONS], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_backends_agree(backend: str, settings: dict[str, Any]):
    ids = token_ids(2, 70)
    reference, fast = (tiny_model(backend=name, **settings)(ids, labels=ids) for name in ("reference", backend))
    assert_equal(fast.logits, reference.logits)
    assert_equal(fast.loss, reference.loss)


def test_a_label_outside_the_vocabulary_is_refused():
    model, ids = tiny_model(), token_ids(1, 6)
    labels = ids.clone()
    labels[0, 3] = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"label {model.config.vocab_size} is outside the vocabulary: ids run from 0"):
        model(ids, labels=labels)

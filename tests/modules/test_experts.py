"""Experts that remember: each equals one block run over the tokens that were sent to it, in their order."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moxe.modules.experts import Experts
from moxe.modules.feed_forward import FeedForwardBlocks
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.ops.segments import Segments
from tests.models.tiny import EXPERT_KINDS, scramble
from tests.modules.comparison import assert_equal, assert_equal_with_gradients
from tests.modules.paper import block, kinds_of, mix_experts, weights_of

HIDDEN, HEADS, EXPERTS, K = 8, 2, 6, 2
LENGTHS = (9, 1, 6)


# The kinds of experts, and what options beyond the paper make of them.
KINDS_AND_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in EXPERT_KINDS),
    ("ffn", {"residual": False}),
    ("mlstm", {"mlstm_ffn_size": 12}),
]
every_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])


def make_experts(
    kind: str,
    memory: str = "sequence",
    backend: str = "torch",
    num_experts: int = EXPERTS,
    residual: bool = True,
    mlstm_ffn_size: int = 0,
) -> Experts:
    torch.manual_seed(0)
    recurrent = {
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "conv_kernel_size": 4,
        "norm_eps": 1e-5,
        "num_residual_blocks": 6,
        "backend": backend,
    }
    experts = Experts(
        num_experts=num_experts,
        expert_kind=kind,
        expert_memory=memory,
        make_block={
            "mlstm": partial(MLSTMBlocks, inner_size=16, qkv_block_size=4, ffn_size=mlstm_ffn_size, **recurrent),
            "slstm": partial(SLSTMBlocks, ffn_size=12, residual_block=2, **recurrent),
            "ffn": partial(
                FeedForwardBlocks,
                hidden_size=HIDDEN,
                ffn_size=12,
                norm_eps=1e-5 if residual else None,
                num_residual_blocks=6,
                backend=backend,
            ),
        },
        backend=backend,
        residual=residual,
    )
    scramble(experts, scale=0.4)
    return experts.double()


def routed_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """h [N, D], indices and weights [N, K]; no token is sent to expert 4, and expert 0 sees only the first row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    h = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    score = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    score[:, 4] = -1
    score[LENGTHS[0] :, 0] = -1
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
    return h.requires_grad_(), score.topk(K).indices, weights.requires_grad_()


def run(experts: Experts, h: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return experts(h, indices, weights, Segments.from_lengths(LENGTHS), lambda kind, rows: None, None)


@every_backend
@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS, ids=str)
def test_equation_09_experts_equal_a_loop_over_sequences_and_experts_with_all_gradients(
    kind: str, options: dict[str, Any], backend: str
):
    experts = make_experts(kind, backend=backend, **options)
    h, indices, weights = routed_tokens()
    expected = h.clone() if experts.residual else torch.zeros_like(h)
    first = 0
    for length in LENGTHS:
        for e, (own_kind, place) in enumerate(kinds_of(kind, EXPERTS)):
            token = [first + t for t in range(length) if e in indices[first + t].tolist()]
            if not token:
                continue
            out = block(own_kind, h[token], weights_of(experts.get_submodule(own_kind), place), HEADS)
            weight = (weights[token] * (indices[token] == e)).sum(-1)
            expected = expected.index_add(0, torch.tensor(token), weight[:, None] * out)
        first += length
    ours = run(experts, h, indices, weights)
    assert_equal_with_gradients(ours, expected, {"h": h, "weights": weights, **dict(experts.named_parameters())})


@every_backend
@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS, ids=str)
def test_equation_09_experts_equal_every_expert_over_all_tokens_with_the_unrouted_ones_masked_out(
    kind: str, options: dict[str, Any], backend: str
):
    """The dense form: a token that is not sent to an expert enters neither its state nor its convolution's window."""
    experts = make_experts(kind, backend=backend, **options)
    h, indices, weights = routed_tokens()
    weights = (weights / weights.sum(-1, keepdim=True)).detach().requires_grad_()
    dense = [
        mix_experts(row, experts, kinds_of(kind, EXPERTS), chosen, weight, HEADS, experts.residual)
        for row, chosen, weight in zip(h.split(LENGTHS), indices.split(LENGTHS), weights.split(LENGTHS), strict=True)
    ]
    # The weights sum to 1, so that the residual passes untouched; their gradient sees it in the dense form.
    ours = run(experts, h, indices, weights)
    if experts.residual:
        ours = ours + (weights.sum(-1, keepdim=True) - 1) * h
    assert_equal_with_gradients(
        ours, torch.cat(dense), {"h": h, "weights": weights, **dict(experts.named_parameters())}
    )


@every_backend
@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS, ids=str)
def test_in_token_mode_every_token_meets_an_empty_memory(kind: str, options: dict[str, Any], backend: str):
    experts = make_experts(kind, memory="token", backend=backend, **options)
    h, indices, weights = routed_tokens()
    expected = h.clone() if experts.residual else torch.zeros_like(h)
    for t in range(len(h)):
        for slot, e in enumerate(indices[t].tolist()):
            own_kind, place = kinds_of(kind, EXPERTS)[e]
            out = block(own_kind, h[t : t + 1], weights_of(experts.get_submodule(own_kind), place), HEADS)
            expected = expected.index_add(0, torch.tensor([t]), weights[t, slot] * out)
    ours = run(experts, h, indices, weights)
    assert_equal_with_gradients(ours, expected, {"h": h, "weights": weights, **dict(experts.named_parameters())})


def test_memory_makes_a_difference_for_recurrent_experts():
    h, indices, weights = routed_tokens()
    for kind in ("xlstm", "mlstm", "slstm"):
        remembering = run(make_experts(kind), h, indices, weights) - h
        forgetting = run(make_experts(kind, memory="token"), h, indices, weights) - h
        assert (remembering - forgetting).abs().max() > 0.1 * remembering.abs().max()
    with_memory, without = (run(make_experts("ffn", memory), h, indices, weights) for memory in ("sequence", "token"))
    assert_equal(with_memory, without)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_an_expert_without_tokens_gets_a_gradient_of_zero_and_not_none(kind: str):
    """So it takes part in every collective of a distributed run."""
    experts = make_experts(kind)
    h, indices, weights = routed_tokens()
    run(experts, h, indices, weights).sum().backward()
    own_kind, place = kinds_of(kind, EXPERTS)[4]
    for name, parameter in experts.get_submodule(own_kind).named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad[place] == 0).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_without_any_token_experts_return_nothing_and_break_nothing(kind: str):
    experts = make_experts(kind)
    empty = torch.zeros(0, HIDDEN, dtype=torch.float64)
    none = torch.zeros(0, K, dtype=torch.int64)
    out = experts(empty, none, none.double(), Segments.from_lengths([]), lambda kind, rows: None, None)
    assert out.shape == (0, HIDDEN)


def test_an_xlstm_layer_puts_mlstm_experts_first_and_slstm_experts_last():
    assert make_experts("xlstm").ranges == {"mlstm": (0, 3), "slstm": (3, 6)}
    for kind in ("mlstm", "slstm", "ffn"):
        assert make_experts(kind).ranges == {kind: (0, 6)}

"""What a token's output may depend on: the tokens before it in its own document, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import EXPERT_KINDS, EXPERT_MEMORIES, OPTIONS, TINY, tiny_model, token_ids
from tests.modules.comparison import assert_equal

every_model = pytest.mark.parametrize(
    "settings",
    [
        *({"expert_kind": kind, "expert_memory": memory} for kind in EXPERT_KINDS for memory in EXPERT_MEMORIES),
        *OPTIONS,
    ],
    ids=str,
)
# Where mLSTM and sLSTM experts by themselves add nothing to a layer that holds both.
representative = pytest.mark.parametrize(
    "settings", [{}, {"expert_memory": "token"}, {"expert_kind": "ffn"}, *OPTIONS], ids=str
)


def decisions(model: MoxEForCausalLM, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Everything a model says about each token: logits, and each layer's routing; all [B, S, ...]."""
    out = model(ids, output_router_logits=True, **inputs)
    routed = [
        value
        for routing in out.routing
        for value in (routing.logits, routing.unbiased_logits, routing.difficulty, routing.expert_weights)
    ]
    return [out.logits, *routed, *(routing.expert_indices for routing in out.routing)]


def in_chunks(model: MoxEForCausalLM, ids: Tensor, sizes: Sequence[int], **inputs: Tensor) -> Tensor:
    """Logits [B, S, V] of a row that is given piece by piece, the state being carried over."""
    cache, logits, first = None, [], 0
    for size in sizes:
        columns = slice(first, first + size)
        cut = {name: value[:, columns] for name, value in inputs.items()}
        out = model(ids[:, columns], cache_params=cache, use_cache=True, **cut)
        cache, first = out.cache_params, first + size
        logits.append(out.logits)
    assert first == ids.shape[1]
    return torch.cat(logits, 1)


@every_model
@torch.no_grad()
def test_changing_a_token_moves_nothing_before_it_through_experts_and_router(settings: dict[str, Any]):
    model, ids = tiny_model(**settings), token_ids(2, 12)
    before = decisions(model, ids)
    for changed in (0, 1, 5, 11):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % TINY["vocab_size"]
        after = decisions(model, other)
        for old, new in zip(before, after, strict=True):
            assert_equal(new[0, :changed], old[0, :changed])
            assert_equal(new[1], old[1])
        assert not torch.allclose(after[0][0, changed:], before[0][0, changed:])


@every_model
def test_no_logit_has_a_gradient_from_a_later_token(settings: dict[str, Any]):
    """The same by calculus, for all pairs of tokens at once: exact zeros."""
    model, ids = tiny_model(**settings), token_ids(1, 7)
    embedded: list[Any] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = model(ids).logits[0]
    for t in range(7):
        (gradient,) = torch.autograd.grad(logits[t].square().sum(), embedded[0], retain_graph=True)
        assert (gradient[t + 1 :] == 0).all()
        assert (gradient[: t + 1] != 0).all()


@every_model
@torch.no_grad()
def test_batch_mates_do_not_matter(settings: dict[str, Any]):
    model, ids = tiny_model(**settings), token_ids(4, 9)
    together = decisions(model, ids)
    for row in range(4):
        for whole, alone in zip(together, decisions(model, ids[row : row + 1]), strict=True):
            assert_equal(whole[row], alone[0])


@representative
@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
@torch.no_grad()
def test_padding_on_any_side_does_not_matter(settings: dict[str, Any], side: str):
    model = tiny_model(**settings)
    lengths, width = (6, 10, 1), 10
    ids = token_ids(3, width)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        spare = width - length
        columns = {
            "left": range(spare, width),
            "right": range(length),
            "both": range(spare // 2, spare // 2 + length),
            "middle": [*range(length // 2), *range(width - (length - length // 2), width)],
        }[side]
        mask[row, list(columns)] = 1
    padded = decisions(model, ids, attention_mask=mask)
    for row in range(3):
        kept = mask[row].bool()
        for whole, alone in zip(padded, decisions(model, ids[row, kept][None]), strict=True):
            assert_equal(whole[row, kept], alone[0])


@representative
@torch.no_grad()
def test_documents_packed_into_a_row_equal_the_documents_alone(settings: dict[str, Any]):
    model = tiny_model(**settings)
    lengths = (5, 1, 7, 3)
    ids = token_ids(2, sum(lengths))
    documents = torch.repeat_interleave(torch.tensor([3, 0, 3, 8]), torch.tensor(lengths)).expand(2, -1)
    packed = decisions(model, ids, document_ids=documents)
    for row in range(2):
        first = 0
        for length in lengths:
            own = slice(first, first + length)
            for whole, alone in zip(packed, decisions(model, ids[row : row + 1, own]), strict=True):
                assert_equal(whole[row, own], alone[0])
            first += length


@torch.no_grad()
def test_a_document_of_all_rows_is_one_document():
    model, ids = tiny_model(), token_ids(2, 9)
    assert_equal(model(ids, document_ids=torch.full_like(ids, 7)).logits, model(ids).logits)


@torch.no_grad()
def test_packing_together_with_padding():
    """Padding between two documents and inside one: the second is no boundary."""
    model, ids = tiny_model(), token_ids(1, 9)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    logits = model(ids, attention_mask=mask, document_ids=documents).logits
    assert_equal(logits[:, [0, 1, 3, 4]], model(ids[:, [0, 1, 3, 4]]).logits)
    assert_equal(logits[:, 6:], model(ids[:, 6:]).logits)


@torch.no_grad()
def test_rows_without_any_token_are_allowed_and_leave_the_others_alone():
    model, ids = tiny_model(), token_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits = model(ids, attention_mask=mask, use_cache=True).logits
    assert_equal(logits[[0, 2]], model(ids[[0, 2]]).logits)
    assert model(ids, attention_mask=torch.zeros_like(ids)).logits.shape == (3, 6, TINY["vocab_size"])


@representative
@pytest.mark.parametrize("sizes", [(1,) * 14, (13, 1), (1, 13), (4, 5, 5), (3, 1, 1, 9)], ids=str)
@torch.no_grad()
def test_a_prompt_in_chunks_equals_the_prompt_at_once(settings: dict[str, Any], sizes: tuple[int, ...]):
    model, ids = tiny_model(**settings), token_ids(2, 14)
    assert_equal(in_chunks(model, ids, sizes), model(ids).logits)


@pytest.mark.parametrize("sizes", [(3, 9), (1,) * 12, (6, 6)], ids=str)
@torch.no_grad()
def test_a_padded_prompt_in_chunks_equals_it_at_once(sizes: tuple[int, ...]):
    """Also where a row has no token at all in a chunk."""
    model, ids = tiny_model(), token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 9:] = mask[2, 2:8] = 0
    pieces = in_chunks(model, ids, sizes, attention_mask=mask)
    whole = model(ids, attention_mask=mask).logits
    assert_equal(pieces[mask.bool()], whole[mask.bool()])


@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward_pass_for_1000_tokens():
    """Longer than any chunk of the cells, then token by token: errors would add up."""
    model, ids = tiny_model(num_hidden_layers=1), token_ids(2, 1000)
    assert_equal(in_chunks(model, ids, [600, *[1] * 75, 250, *[1] * 75]), model(ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_1000_single_steps_equal_the_full_forward_pass():
    model, ids = tiny_model(), token_ids(1, 1000)
    assert_equal(in_chunks(model, ids, [1] * 1000), model(ids).logits)


@torch.no_grad()
def test_in_float32_neighbours_move_a_logit_by_rounding_only():
    model, ids = tiny_model(dtype=torch.float32), token_ids(3, 16)
    together = model(ids).logits
    alone = torch.cat([model(ids[row : row + 1]).logits for row in range(3)])
    assert_equal(together, alone)
    assert_equal(in_chunks(model, ids, [5, *[1] * 11]), together)

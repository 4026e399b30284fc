"""Decoding: one token of each row behind a state, which C++ takes in place block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moxe.models.cache import MoxECache
from moxe.models.modeling_moxe import MoxEForCausalLM, MoxELayer, MoxEModel
from moxe.ops.cpu import build
from moxe.ops.grouped_linear import FEW_ROWS
from tests.models.tiny import EXPERT_KINDS, EXPERT_MEMORIES, OPTIONS, TINY, tiny_model, token_ids
from tests.modules.comparison import assert_equal

LAYERS = TINY["num_hidden_layers"]
PROMPT, NEW = 5, 7

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def compiler():
    if reason := build.why_unavailable():
        pytest.skip(reason)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that a layer takes."""
    taken: list[int] = []
    step = MoxELayer.step

    def counted(self: MoxELayer, x: Tensor, *arguments: Any) -> Any:
        taken.append(len(x))
        return step(self, x, *arguments)

    monkeypatch.setattr(MoxELayer, "step", counted)
    return taken


@torch.no_grad()
def prefilled(model: MoxEForCausalLM, ids: Tensor, **inputs: Any) -> MoxECache:
    cache = model(ids, use_cache=True, **inputs).cache_params
    assert isinstance(cache, MoxECache)
    return cache


def all_that_is_said(out: Any) -> list[Tensor]:
    """Logits, and each layer's routing; all [B, S, ...]."""
    fields = ("logits", "unbiased_logits", "difficulty", "expert_indices", "expert_weights")
    routed = [getattr(routing, field) for routing in out.routing for field in fields]
    return [out.logits, *(x for x in routed if x is not None)]


SETTINGS: list[dict[str, Any]] = [
    *({"expert_kind": kind, "expert_memory": memory} for kind in EXPERT_KINDS for memory in EXPERT_MEMORIES),
    {"router_kind": "standard", "router_bias": False},
    {"bias_kind": "masked", "num_experts_per_tok": 3},
    {"conv_kernel_size": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    *OPTIONS,
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_token_by_token_equals_the_full_forward_pass(rows: int, settings: dict[str, Any], steps: list[int]):
    model, ids = tiny_model(**settings), token_ids(rows, PROMPT + NEW)
    whole = all_that_is_said(model(ids, use_cache=False, output_router_logits=True))
    assert steps == []
    cache = prefilled(model, ids[:, :PROMPT])
    for t in range(PROMPT, PROMPT + NEW):
        out = model(ids[:, t : t + 1], cache_params=cache, output_router_logits=True)
        for actual, expected in zip(all_that_is_said(out), whole, strict=True):
            assert_equal(actual, expected[:, t : t + 1])
        assert out.cache_params is cache
        assert cache.get_seq_length() == t + 1
    assert steps == [rows] * LAYERS * NEW


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_leaves_the_cache_as_the_ordinary_path_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny_model(dtype, num_hidden_layers=1), token_ids(2, PROMPT + 1)
    documents = torch.tensor([[3] * (PROMPT + 1), [7] * (PROMPT + 1)])
    caches = []
    for takes_a_step in (True, False):
        if not takes_a_step:
            monkeypatch.setattr(MoxEModel, "_takes_a_step", lambda *arguments: False)
        cache = prefilled(model, ids[:, :PROMPT], document_ids=documents[:, :PROMPT])
        out = model(ids[:, PROMPT:], document_ids=documents[:, PROMPT:], cache_params=cache)
        assert out.logits.dtype == dtype
        caches.append(cache)
    stepped, ordinary = caches
    assert stepped.document.tolist() == ordinary.document.tolist() == [3, 7]
    assert stepped.get_seq_length() == ordinary.get_seq_length() == PROMPT + 1
    assert stepped.states.keys() == ordinary.states.keys()
    for block, state in ordinary.states.items():
        assert {name: x.dtype for name, x in stepped.states[block].items()} == {n: x.dtype for n, x in state.items()}
        if dtype != torch.bfloat16:  # where the ordinary path rounds after every operation
            for name, x in state.items():
                assert_equal(stepped.states[block][name], x, f"{block}/{name}")


@torch.no_grad()
def test_in_float32_steps_differ_from_the_full_forward_pass_by_rounding_only(steps: list[int]):
    model, ids = tiny_model(torch.float32), token_ids(2, PROMPT + NEW)
    cache = prefilled(model, ids[:, :PROMPT])
    logits = [model(ids[:, t : t + 1], cache_params=cache).logits for t in range(PROMPT, PROMPT + NEW)]
    assert_equal(torch.cat(logits, 1), model(ids).logits[:, PROMPT:])
    assert len(steps) == LAYERS * NEW


def with_gradients(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    with torch.enable_grad():
        return model(ids[:, :1], cache_params=cache).logits


def under_autocast(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(ids[:, :1], cache_params=cache).logits


def several_tokens(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    return model(ids, cache_params=cache).logits


def padded(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    mask = torch.ones(len(ids), 1, dtype=torch.int64)
    mask[0] = 0
    return model(ids[:, :1], attention_mask=mask, cache_params=cache).logits


def a_new_document(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    return model(ids[:, :1], document_ids=torch.tensor([[0], [1]]), cache_params=cache).logits


def an_empty_cache(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    return model(ids[:, :1], cache_params=MoxECache(len(ids))).logits


def a_state_that_lies_apart(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    state = cache.states["layers.1.mlstm_mixer"]
    state["c"] = state["c"].mT.contiguous().mT
    return model(ids[:, :1], cache_params=cache).logits


def a_state_of_another_precision(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    for state in cache.states.values():
        state.update({name: x.float() for name, x in state.items()})
    return model(ids[:, :1], cache_params=cache).logits


def a_state_kept_in_bfloat16(model: MoxEForCausalLM, ids: Tensor, cache: MoxECache) -> Tensor:
    for state in cache.states.values():
        state.update({name: x.bfloat16() for name, x in state.items()})
    return model(ids[:, :1], cache_params=cache).logits


NO_STEP = [
    with_gradients,
    under_autocast,
    several_tokens,
    padded,
    a_new_document,
    an_empty_cache,
    a_state_that_lies_apart,
    a_state_of_another_precision,
    a_state_kept_in_bfloat16,
]


@pytest.mark.parametrize("call", NO_STEP, ids=lambda call: call.__name__)
@torch.no_grad()
def test_what_is_no_step_takes_the_ordinary_path(call: Callable[..., Tensor], steps: list[int]):
    dtype = torch.float32 if call in (under_autocast, a_state_kept_in_bfloat16) else torch.float64
    model, ids = tiny_model(dtype), token_ids(2, 3)
    call(model, ids, prefilled(model, ids))
    assert steps == []
    model(ids[:, :1], cache_params=prefilled(model, ids))
    assert steps == [2] * LAYERS


@pytest.mark.parametrize(("rows", "backend"), [(FEW_ROWS + 1, "auto"), (2, "torch"), (2, "reference")])
@torch.no_grad()
def test_many_rows_and_other_backends_take_the_ordinary_path(rows: int, backend: str, steps: list[int]):
    model, ids = tiny_model(backend=backend), token_ids(rows, PROMPT + 1)
    logits = model(ids[:, PROMPT:], cache_params=prefilled(model, ids[:, :PROMPT])).logits
    assert_equal(logits, model(ids).logits[:, PROMPT:])
    assert steps == []


@torch.no_grad()
def test_a_row_that_saw_no_token_yet_takes_no_step(steps: list[int]):
    model, ids = tiny_model(), token_ids(2, 4)
    mask = torch.ones(2, 3, dtype=torch.int64)
    mask[1] = 0
    cache = prefilled(model, ids[:, :3], attention_mask=mask)
    logits = model(ids[:, 3:], cache_params=cache).logits
    assert steps == []
    assert_equal(logits[1], model(ids[1:, 3:]).logits[0])
    model(ids[:, :1], cache_params=cache)
    assert steps == [2] * LAYERS


@torch.no_grad()
def test_rows_of_a_batch_go_on_as_they_would_alone(steps: list[int]):
    model, ids = tiny_model(), token_ids(4, PROMPT + NEW)
    caches = [prefilled(model, ids[n : n + 1, :PROMPT]) for n in range(4)]
    together = prefilled(model, ids[:, :PROMPT])
    for t in range(PROMPT, PROMPT + NEW):
        logits = model(ids[:, t : t + 1], cache_params=together).logits
        for n in range(4):
            assert_equal(model(ids[n : n + 1, t : t + 1], cache_params=caches[n]).logits[0], logits[n])
    assert len(steps) == 5 * LAYERS * NEW


@pytest.mark.parametrize("token", [-1, TINY["vocab_size"]])
@torch.no_grad()
def test_a_token_outside_the_vocabulary_is_refused_and_the_state_stays(token: int):
    model, ids = tiny_model(), token_ids(2, 4)
    cache = prefilled(model, ids)
    before = {(block, name): x.clone() for block, state in cache.states.items() for name, x in state.items()}
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary: ids run from 0 to 39"):
        model(torch.tensor([[1], [token]]), cache_params=cache)
    assert all(torch.equal(cache.states[block][name], x) for (block, name), x in before.items())
    assert cache.get_seq_length() == 4


@torch.no_grad()
def test_a_hook_on_a_layer_sees_every_step():
    model, ids, seen = tiny_model(), token_ids(2, 3), []
    cache = prefilled(model, ids)
    model.model.layers[1].register_forward_hook(lambda layer, inputs, output: seen.append(output[0].shape))
    model(ids[:, :1], cache_params=cache)
    assert seen == [(2, TINY["hidden_size"])]

"""The dense xLSTM: which blocks it has, documents and padding apart, decoding, gradients, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_xlstm import XLSTMBlock, XLSTMForCausalLM, XLSTMModel
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.ops.cpu import build
from tests.models.tiny import scramble, token_ids
from tests.modules.comparison import assert_equal, assert_equal_gradients

TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_heads": 2, "qkv_block_size": 8}
# Two groups: an sLSTM block and two mLSTM blocks, then an sLSTM block alone.
KINDS = ["slstm", "mlstm", "mlstm", "slstm"]


def tiny_xlstm(**settings: Any) -> XLSTMForCausalLM:
    """In float64 and evaluation mode, with weights of which each matters."""
    torch.manual_seed(0)
    model = XLSTMForCausalLM(XLSTMConfig(**{**TINY, "mlstm_per_slstm": 2, **settings}))
    scramble(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.eval()


def packed_rows() -> dict[str, Tensor]:
    """Two rows of 12: documents of 5, 1 and 6 tokens; two documents with padding at both ends and inside."""
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, [0, 3, 8, 11]] = 0
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 7 + [1] * 5])
    return {"input_ids": ids, "document_ids": documents, "attention_mask": mask}


def test_each_slstm_block_is_followed_by_its_mlstm_blocks():
    blocks = [(layer.kind, type(getattr(layer, layer.kind))) for layer in tiny_xlstm().model.layers]
    assert [kind for kind, _ in blocks] == KINDS
    assert [block for _, block in blocks] == [SLSTMBlocks, MLSTMBlocks, MLSTMBlocks, SLSTMBlocks]
    config = XLSTMConfig()
    kinds = [config.block_kind(block) for block in range(config.num_hidden_layers)]
    assert kinds == ["slstm", *["mlstm"] * 5] * 6


def test_the_model_is_its_blocks_one_behind_the_other():
    """Each block gets and gives the residual stream; nothing but the embedding, a norm and the head is around them."""
    model, ids = tiny_xlstm(), token_ids(1, 9)
    tokens = model.model.pack(ids, None, None)
    x = model.model.embed_tokens(ids[0])
    for layer, kind in zip(model.model.layers, KINDS, strict=True):
        block = getattr(layer, kind)
        x = x + block(x, tokens.sequences, None, False)[0]
    normed = nn.functional.layer_norm(x, (16,), model.model.norm.weight, None, model.config.norm_eps)
    assert_equal(model(ids).logits[0], normed @ model.lm_head.weight.T)


@torch.no_grad()
def test_a_document_in_a_packed_row_is_what_it_is_alone():
    model, batch = tiny_xlstm(), packed_rows()
    logits = model(**batch).logits
    for row in range(2):
        for document in batch["document_ids"][row].unique():
            is_in = (batch["document_ids"][row] == document) & batch["attention_mask"][row].bool()
            assert_equal(logits[row, is_in], model(batch["input_ids"][row, is_in][None]).logits[0])


@torch.no_grad()
def test_a_token_sees_what_is_before_it_and_no_more():
    model, ids = tiny_xlstm(), token_ids(2, 12)
    before = model(ids).logits
    for changed in (0, 5, 11):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % TINY["vocab_size"]
        after = model(other).logits
        assert_equal(after[0, :changed], before[0, :changed])
        assert_equal(after[1], before[1])
        assert (after[0, changed:] - before[0, changed:]).abs().amin() > 0


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 1, 6), (11, 1)])
@torch.no_grad()
def test_decoding_equals_the_forward_pass_of_the_whole_row(sizes: tuple[int, ...]):
    model, ids = tiny_xlstm(), token_ids(3, 12)
    cache, logits, first = None, [], 0
    for size in sizes:
        out = model(ids[:, first : first + size], cache_params=cache, use_cache=True)
        cache, first = out.cache_params, first + size
        logits.append(out.logits)
    assert_equal(torch.cat(logits, 1), model(ids).logits)


@torch.no_grad()
def test_a_step_is_taken_in_place_by_the_compiled_blocks(monkeypatch: pytest.MonkeyPatch):
    if reason := build.why_unavailable():
        pytest.skip(reason)
    steps: list[bool] = []
    forward = XLSTMBlock.forward

    def watched(self: XLSTMBlock, x: Tensor, tokens: Any, cache: Any, at: Any) -> Any:
        steps.append(at is None)
        return forward(self, x, tokens, cache, at)

    model, ids = tiny_xlstm(backend="cpu"), token_ids(2, 6)
    expected = tiny_xlstm(backend="reference")(ids).logits[:, -1:]
    cache = model(ids[:, :5], use_cache=True).cache_params
    monkeypatch.setattr(XLSTMBlock, "forward", watched)
    assert_equal(model(ids[:, 5:], cache_params=cache, use_cache=True).logits, expected)
    assert steps == [True] * len(KINDS)


def test_generation_takes_the_most_probable_token_of_a_forward_pass_each_time():
    model: Any = tiny_xlstm()
    prompt = token_ids(2, 4)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_loss_and_gradients_are_those_of_the_reference(backend: str):
    if backend == "cpu" and (reason := build.why_unavailable()):
        pytest.skip(reason)
    batch = packed_rows()
    gradients, losses = [], []
    for name in (backend, "reference"):
        model = tiny_xlstm(backend=name).train()
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        losses.append(out.loss)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert out.logits is None
    assert_equal(*losses)
    assert_equal_gradients(*gradients)


def test_the_loss_is_the_cross_entropy_and_has_no_other_term():
    model, batch = tiny_xlstm(), packed_rows()
    out = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert torch.equal(out.loss, out.lm_loss)
    assert {name for name in out if name.endswith("loss")} == set(model.loss_terms)
    assert not out.routing
    parts = [
        model(
            **{key: value[row : row + 1] for key, value in batch.items()},
            labels=batch["input_ids"][row : row + 1],
            num_items_in_batch=16,
        )
        for row in range(2)
    ]
    # 4 + 0 + 5 targets in the first row, 4 + 2 in the second
    assert_equal(parts[0].loss + parts[1].loss, out.loss * 15 / 16)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    model = tiny_xlstm().float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is XLSTMForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is XLSTMConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is XLSTMModel
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    assert loaded.config.mlstm_per_slstm == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4}, "XLSTMConfig has no setting 'num_experts'"),
        ({"mlstm_per_slstm": 0}, "mlstm_per_slstm=0 must be a whole number of at least 1"),
        ({"mlstm_per_slsm": 5}, "did you mean 'mlstm_per_slstm'"),
        ({"num_heads": 3}, "hidden_size=16 is not divisible by num_heads=3"),
        ({"backend": "gpu"}, "backend='gpu' is not one of"),
        ({"norm_eps": 0}, "norm_eps=0 must be a finite number above 0"),
        ({"hidden_size": 2**18}, "must be at most"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        XLSTMConfig(**{**TINY, **settings})

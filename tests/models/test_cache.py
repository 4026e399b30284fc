"""The recurrent state as an object: rows, size, files, and documents that go on or begin anew."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moxe.errors import UserError
from moxe.models.cache import MoxECache
from moxe.models.modeling_moxe import MoxEForCausalLM
from tests.models.tiny import EXPERT_KINDS, OPTIONS, tiny_model, token_ids
from tests.modules.comparison import assert_equal

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def prefilled(model: MoxEForCausalLM, ids: Tensor, **inputs: Any) -> MoxECache:
    cache = model(ids, use_cache=True, **inputs).cache_params
    assert isinstance(cache, MoxECache)
    return cache


def tensors(cache: MoxECache) -> dict[str, Tensor]:
    return {f"{block}/{name}": x for block, state in cache.states.items() for name, x in state.items()}


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1, 0], [2]], ids=["reorder", "repeat", "drop"])
def test_selected_rows_go_on_as_those_rows(rows: list[int]):
    model, ids = tiny_model(), token_ids(3, 10)
    expected = model(ids).logits[:, 6:][rows]
    cache = prefilled(model, ids[:, :6])
    cache.select_rows(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    assert_equal(model(ids[rows, 6:], cache_params=cache).logits, expected)


def test_reordering_for_beams_is_selecting_rows():
    model, ids = tiny_model(), token_ids(3, 6)
    cache, other = prefilled(model, ids), prefilled(model, ids)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    other.select_rows(torch.tensor([2, 2, 0]))
    assert all(torch.equal(x, y) for x, y in zip(tensors(cache).values(), tensors(other).values(), strict=True))


def test_rows_of_a_selection_do_not_share_memory():
    model, ids = tiny_model(), token_ids(1, 6)
    cache = prefilled(model, ids)
    cache.select_rows(torch.tensor([0, 0]))
    other = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits = model(other, cache_params=cache).logits
    for row in range(2):
        assert_equal(logits[row], model(torch.cat([ids, other[row : row + 1]], 1)).logits[0, 6:])


def test_a_copy_of_a_cache_is_independent_of_it():
    model, ids = tiny_model(), token_ids(2, 8)
    cache = prefilled(model, ids[:, :5])
    kept = copy.deepcopy(cache)
    model(token_ids(2, 4, seed=7), cache_params=cache)
    assert kept.get_seq_length() == 5
    assert_equal(model(ids[:, 5:], cache_params=kept).logits, model(ids).logits[:, 5:])


def test_a_saved_cache_goes_on_where_it_stopped_to_the_bit(tmp_path: Path):
    model, ids = tiny_model(), token_ids(2, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5] * 9])
    cache = prefilled(model, ids[:, :6], document_ids=documents[:, :6])
    cache.save(tmp_path / "state.safetensors")
    loaded = MoxECache.load(tmp_path / "state.safetensors")
    assert (loaded.batch_size, loaded.get_seq_length()) == (2, 6)
    assert loaded.memory_bytes() == cache.memory_bytes()
    assert torch.equal(loaded.document, cache.document)
    assert tensors(loaded).keys() == tensors(cache).keys()
    for name, tensor in tensors(cache).items():
        assert torch.equal(tensors(loaded)[name], tensor), name
    rest = {"input_ids": ids[:, 6:], "document_ids": documents[:, 6:]}
    assert torch.equal(model(**rest, cache_params=loaded).logits, model(**rest, cache_params=cache).logits)


def test_a_file_that_holds_no_cache_is_refused_with_its_name(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=re.escape(f"{path} holds no saved MoxE state")):
        MoxECache.load(path)


@pytest.mark.parametrize("content", [None, b"no tensors"], ids=["missing", "garbage"])
def test_a_file_that_can_not_be_read_is_refused_with_its_name(content: bytes | None, tmp_path: Path):
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} can not be read as a saved MoxE state")):
        MoxECache.load(path)


def test_saving_replaces_a_file_and_leaves_no_other_behind(tmp_path: Path):
    model, path = tiny_model(), tmp_path / "state.safetensors"
    for tokens in (3, 5):
        prefilled(model, token_ids(1, tokens)).save(path)
    assert MoxECache.load(path).get_seq_length() == 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_of_another_batch_size_is_refused():
    model = tiny_model()
    cache = prefilled(model, token_ids(3, 4))
    with pytest.raises(ValueError, match="cache_params holds 3 rows but input_ids has 2"):
        model(token_ids(2, 1), cache_params=cache)


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_memory_is_the_size_of_the_states_and_nothing_else(expert_kind: str):
    """By the shapes of the paper's memories, float32: mLSTM C, n, m and conv; sLSTM c, n, m, h and conv."""
    model = tiny_model(dtype=torch.float32, expert_kind=expert_kind)
    hidden, heads, inner, taps = 16, 2, 32, 4
    size = inner // heads
    mlstm = heads * (size * size + size + 1) + (taps - 1) * inner
    slstm = 4 * hidden + (taps - 1) * hidden
    experts = {"xlstm": 2 * mlstm + 2 * slstm, "mlstm": 4 * mlstm, "slstm": 4 * slstm, "ffn": 0}[expert_kind]
    layers, rows, float32 = 2, 3, 4
    cache = prefilled(model, token_ids(rows, 5))
    assert cache.memory_bytes() == rows * layers * (slstm + mlstm + experts) * float32


def test_experts_without_memory_have_no_state():
    blocks = prefilled(tiny_model(expert_memory="token"), token_ids(1, 5)).states
    assert set(blocks) == {f"layers.{layer}.{mixer}" for layer in (0, 1) for mixer in ("slstm_mixer", "mlstm_mixer")}


def memory_after(model: MoxEForCausalLM, lengths: tuple[int, int]) -> list[int]:
    """Bytes of state when so many tokens were generated greedily, one call a token."""
    token, cache, memory = token_ids(1, 1), MoxECache(1), []
    for generated in range(1, lengths[1] + 1):
        logits = model(token, cache_params=cache).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if generated in lengths:
            memory.append(cache.memory_bytes())
    assert cache.get_seq_length() == lengths[1]
    assert all(x.isfinite().all() or name.endswith("/m") for name, x in tensors(cache).items())
    return memory


def test_memory_is_flat_from_10_to_200_generated_tokens():
    first, last = memory_after(tiny_model(num_hidden_layers=1), (10, 200))
    assert first == last


@pytest.mark.slow
def test_memory_is_flat_from_100_to_10000_generated_tokens():
    first, last = memory_after(tiny_model(num_hidden_layers=1), (100, 10_000))
    assert first == last


def test_a_document_that_goes_on_in_the_next_call_keeps_its_state_and_a_new_one_begins_empty():
    model, ids = tiny_model(), token_ids(5, 12)
    documents = torch.tensor(
        [
            [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2],  # document 1 goes on over the cut
            [4, 4, 4, 4, 4, 4, 7, 7, 7, 7, 7, 7],  # the cut is a boundary
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # one document
            [0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 1, 1],  # the number 1 comes again, for another document
            [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 1, 1],
        ]
    )
    whole = model(ids, document_ids=documents).logits
    cache = prefilled(model, ids[:, :6], document_ids=documents[:, :6])
    rest = model(ids[:, 6:], document_ids=documents[:, 6:], cache_params=cache).logits
    assert_equal(rest, whole[:, 6:])


@pytest.mark.parametrize("settings", [*({"expert_kind": kind} for kind in EXPERT_KINDS), *OPTIONS], ids=str)
def test_documents_over_many_calls_equal_one_call(settings: dict[str, Any]):
    """Cut after every token: an expert that a new document does not reach must not remember the old one."""
    model, ids = tiny_model(**settings, num_experts_per_tok=1), token_ids(2, 14)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3]])
    whole = model(ids, document_ids=documents).logits
    cache = None
    for t in range(14):
        column = slice(t, t + 1)
        out = model(ids[:, column], document_ids=documents[:, column], cache_params=cache, use_cache=True)
        cache = out.cache_params
        assert_equal(out.logits, whole[:, column])


def test_what_begins_anew_in_a_kept_state_begins_in_the_scale_of_its_first_token():
    """Rows, documents and experts that have seen nothing hold m = -inf: in a scale of m = 0 these gates are all 0."""
    model, ids = tiny_model(), token_ids(2, 10)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 10])
    expected = model(ids, document_ids=documents).logits
    for name, parameter in model.named_parameters():
        if "slstm" in name and name.endswith("gate_bias"):
            parameter[:, :, 0] -= 1000  # input gates: only their ratios count
    cache = prefilled(model, ids[:, :5], document_ids=documents[:, :5])
    assert_equal(model(ids[:, 5:], document_ids=documents[:, 5:], cache_params=cache).logits, expected[:, 5:])


def test_documents_with_padding_over_two_calls():
    """The document a row is in is that of its last token, not of its last column."""
    model, ids = tiny_model(), token_ids(2, 10)
    documents = torch.tensor([[1, 1, 1, 1, 2, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]])
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    mask[1, 5:] = 0
    whole = model(ids, attention_mask=mask, document_ids=documents).logits
    cache, pieces = None, []
    for columns in (slice(0, 5), slice(5, 10)):
        out = model(
            ids[:, columns],
            attention_mask=mask[:, columns],
            document_ids=documents[:, columns],
            cache_params=cache,
            use_cache=True,
        )
        cache = out.cache_params
        pieces.append(out.logits)
    assert_equal(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


def test_a_call_without_document_ids_goes_on_in_whatever_document_the_row_was():
    model, ids = tiny_model(), token_ids(1, 9)
    documents = torch.tensor([[3, 3, 5, 5, 5]])
    cache = prefilled(model, ids[:, :5], document_ids=documents)
    assert_equal(model(ids[:, 5:], cache_params=cache).logits, model(ids[:, 2:]).logits[:, 3:])


def test_a_cache_is_returned_only_where_it_is_of_use():
    model, ids = tiny_model(), token_ids(1, 4)
    assert model(ids).cache_params is not None
    assert model(ids, labels=ids).cache_params is None
    assert model(ids, use_cache=False).cache_params is None
    assert tiny_model(use_cache=False)(ids).cache_params is None
    assert model.train()(ids).cache_params is None


def test_the_state_is_kept_in_float32_under_bfloat16_autocast():
    model, ids = tiny_model(dtype=torch.float32), token_ids(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = prefilled(model, ids)
        cells = {x.dtype for name, x in tensors(cache).items() if not name.endswith("conv")}
        assert cells == {torch.float32}
        model(ids, cache_params=cache)


def test_a_cache_of_a_row_that_saw_no_token_yet_begins_empty():
    model, ids = tiny_model(), token_ids(2, 9)
    mask = torch.ones(2, 4, dtype=torch.int64)
    mask[1] = 0
    cache = prefilled(model, ids[:, :4], attention_mask=mask)
    logits = model(ids[:, 4:], cache_params=cache).logits
    assert_equal(logits[0], model(ids[:1]).logits[0, 4:])
    assert_equal(logits[1], model(ids[1:, 4:]).logits[0])

"""The models of transformers on packed rows: documents apart, padding no token, the targets of MoxE."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moxe.models.architectures import ARCHITECTURES, build_model
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.training.trainer import count_targets
from tests.models.tiny import scramble, tiny_config
from tests.tolerances import assert_close

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OF_ARCHITECTURE = {
    "llama": {"intermediate_size": 24},
    "gemma2": {"intermediate_size": 24, "head_dim": 8, "sliding_window": 3},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24,
        "router_aux_loss_coef": 0.5,
    },
}
NAMES = tuple(OF_ARCHITECTURE)
# Gemma 2 caps its attention scores, which transformers does in its eager implementation alone.
ATTENTIONS = [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("qwen2_moe", "sdpa"), ("qwen2_moe", "eager")]


def tiny_baseline(name: str, **settings: Any) -> Any:
    """In float64, with weights that leave no norm and no bias without effect."""
    torch.manual_seed(0)
    model = build_model(ARCHITECTURES[name].config_class(**{**SIZES, **OF_ARCHITECTURE[name], **settings}))
    scramble(model)
    return eager_experts(model.double().eval())


def eager_experts(model: Any) -> Any:
    """The grouped product that transformers prefers refuses float64 wherever memory happens to be aligned."""
    if model.config.model_type == "qwen2_moe":
        model.set_experts_implementation("eager")
    return model


def packed_rows() -> dict[str, Tensor]:
    """Three rows of 12: documents of 5, 1 and 6 tokens; one document; two, with padding at both ends and inside."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(VOCABULARY, (3, 12), generator=generator)
    document_ids = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12, [0] * 7 + [1] * 5])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, [0, 3, 8, 11]] = 0
    labels = input_ids.clone()
    labels[1, 4] = -100
    labels[attention_mask == 0] = -100
    return {
        "input_ids": input_ids,
        "document_ids": document_ids,
        "attention_mask": attention_mask,
        "labels": labels,
    }


def documents(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Row, real columns and labels of each document."""
    found = []
    for row in range(len(batch["input_ids"])):
        for document in batch["document_ids"][row].unique():
            is_in = (batch["document_ids"][row] == document) & batch["attention_mask"][row].bool()
            columns = is_in.nonzero().flatten()
            found.append((torch.tensor(row), columns, batch["labels"][row, columns]))
    return found


def plain(model: Any) -> Any:
    """The class of transformers with the same weights."""
    twin = eager_experts(getattr(transformers, type(model).__name__)(model.config).double().eval())
    assert type(twin) is not type(model)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("eager")
    return twin


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_a_document_in_a_packed_row_is_what_it_is_alone(name: str, attention: str):
    model = tiny_baseline(name, attn_implementation=attention)
    alone, batch = plain(model), packed_rows()
    with torch.no_grad():
        logits = model(**batch).logits
        for row, columns, _ in documents(batch):
            expected = alone(input_ids=batch["input_ids"][row, columns][None], use_cache=False).logits[0]
            assert_close(logits[row, columns], expected, "transformers")


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_the_tokens_of_one_document_change_nothing_in_another(name: str, attention: str):
    model, batch = tiny_baseline(name, attn_implementation=attention), packed_rows()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :6] = (changed["input_ids"][0, :6] + 7) % VOCABULARY
    changed["input_ids"][batch["attention_mask"] == 0] += 1
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    untouched = batch["attention_mask"].bool()
    untouched[0, :6] = False
    assert_close(after[untouched], before[untouched], "transformers")
    assert (after[0, :6] - before[0, :6]).abs().amin(-1).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(name: str):
    model, batch = tiny_baseline(name), packed_rows()
    model.config.router_aux_loss_coef = 0.0
    alone = plain(model)
    total = 0
    summed = torch.zeros((), dtype=torch.float64)
    for row, columns, labels in documents(batch):
        logits = alone(input_ids=batch["input_ids"][row, columns][None], use_cache=False).logits[0]
        summed = summed + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        total += int((labels[1:] != -100).sum())
    (summed / total).backward()
    output = model.train()(**batch)
    output.loss.backward()
    assert total == count_targets(batch)
    assert output.logits is None
    assert_close(output.loss, summed.detach() / total, "transformers")
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[parameter_name], "transformers", parameter_name)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_sum_over_the_targets_of_the_whole_batch(name: str):
    model, batch = tiny_baseline(name), packed_rows()
    whole = model(**batch)
    count = count_targets(batch)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    outputs = [model(**part, num_items_in_batch=count) for part in parts]
    assert_close(torch.stack([part.lm_loss for part in outputs]).sum(), whole.lm_loss, "transformers")
    if name == "qwen2_moe":
        shares = [count_targets(part) / count for part in parts]
        means = torch.stack([part.load_balancing_loss for part in outputs])
        weighted = (torch.tensor(shares) * means).sum()
        routers = torch.stack([part.loss - part.lm_loss for part in outputs]).sum()
        assert_close(routers, 0.5 * 2 * weighted, "transformers")


def test_the_same_targets_are_scored_as_by_moxe():
    """A model without any weight gives each token the same probability, so that its loss says how many there are."""
    batch = packed_rows()
    for model in (MoxEForCausalLM(tiny_config()), *(tiny_baseline(name) for name in NAMES)):
        model.eval().double()
        for parameter in model.parameters():
            parameter.data.zero_()
        lm_loss = model(**batch, num_items_in_batch=1).lm_loss.item()
        assert lm_loss / math.log(VOCABULARY) == pytest.approx(count_targets(batch)), type(model).__name__


def test_uniform_routing_has_a_load_balancing_loss_of_one():
    model, batch = tiny_baseline("qwen2_moe"), packed_rows()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    output = model(**batch)
    torch.testing.assert_close(output.load_balancing_loss.double(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close((output.loss - output.lm_loss).double(), torch.tensor(0.5 * 2, dtype=torch.float64))


def test_padding_does_not_count_in_the_routers_loss():
    model, batch = tiny_baseline("qwen2_moe"), packed_rows()
    real = batch["attention_mask"][2].bool()
    short = {key: value[2:, real] for key, value in batch.items()}
    padded = {key: value[2:] for key, value in batch.items()}
    torch.testing.assert_close(model(**padded).load_balancing_loss, model(**short).load_balancing_loss)
    everywhere = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    assert abs(model(**everywhere).load_balancing_loss - model(**padded).load_balancing_loss) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_an_ordinary_checkpoint_of_transformers(name: str, tmp_path: Path):
    model = tiny_baseline(name).float()
    model.save_pretrained(tmp_path)
    loaded = eager_experts(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(loaded) is getattr(transformers, type(model).__name__)
    assert loaded.config.architectures == [type(model).__name__]
    for (parameter_name, one), (_, other) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), parameter_name
    input_ids = packed_rows()["input_ids"]
    assert_close(loaded(input_ids).logits, model(input_ids).logits, "transformers")


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_transformers(name: str):
    model = tiny_baseline(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = packed_rows()["input_ids"][:2, :6]
    mask = torch.tensor([[1] * 6, [0, 0] + [1] * 4])
    expected = plain(model).generate(prompt, attention_mask=mask, **options)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_padding_token_that_is_also_the_end_of_text_is_learned(name: str):
    model, batch = tiny_baseline(name, pad_token_id=3, eos_token_id=3), packed_rows()
    batch["input_ids"][1, 2] = 3
    model.train()(**batch).loss.backward()
    fresh = build_model(ARCHITECTURES[name].config_class(**{**SIZES, **OF_ARCHITECTURE[name], "pad_token_id": 3}))
    assert fresh.get_input_embeddings().weight[3].abs().min() > 0
    assert model.config.pad_token_id == 3
    assert model.get_input_embeddings().weight.grad[3].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_token_is_refused(name: str):
    model, batch = tiny_baseline(name), packed_rows()
    with pytest.raises(ValueError, match="token id 40 is outside the vocabulary"):
        model(**{**batch, "input_ids": batch["input_ids"].index_fill(1, torch.tensor(1), 40)})
    with pytest.raises(ValueError, match="label 41 is outside the vocabulary"):
        model(**{**batch, "labels": batch["labels"].index_fill(1, torch.tensor(1), 41)})


@pytest.mark.parametrize("name", NAMES)
def test_an_input_of_another_shape_than_the_token_ids_is_refused(name: str):
    model, batch = tiny_baseline(name), packed_rows()
    for key in ("attention_mask", "document_ids", "labels"):
        with pytest.raises(ValueError, match=re.escape(f"{key} must have the shape of input_ids (3, 12), got (3, 11)")):
            model(**{**batch, key: batch[key][:, 1:]})
    with pytest.raises(ValueError, match=re.escape("input_ids must be [B, S], got shape (12,)")):
        model(input_ids=batch["input_ids"][0], labels=batch["labels"][0])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_call_with_labels_or_documents_would_ignore_is_refused(name: str):
    model, batch = tiny_baseline(name), packed_rows()
    ids = batch["input_ids"]
    ignored = {
        "position_ids": torch.arange(12).expand(3, 12),
        "inputs_embeds": model.get_input_embeddings()(ids),
        "past_key_values": model(ids[:, :2], use_cache=True).past_key_values,
    }
    for key, value in ignored.items():
        for needs in ("labels", "document_ids"):
            with pytest.raises(ValueError, match=f"a call with labels or document_ids takes no {key}"):
                model(input_ids=ids, **{needs: batch[needs], key: value})
    with pytest.raises(ValueError, match="a call with labels or document_ids needs input_ids"):
        model(labels=batch["labels"])


def test_layers_that_favour_different_experts_cancel_in_the_load_balancing_loss():
    """What transformers pools over the layers: here each layer sends every token to two experts of four."""
    model = tiny_baseline("qwen2_moe")
    targets = torch.tensor([0])
    two_of_four = torch.tensor([[9.0, 9.0, -9.0, -9.0]]).double()
    hidden = torch.zeros(1, SIZES["hidden_size"]).double()

    def loss(*layers: Tensor) -> float:
        return model._losses(hidden, targets, layers, None)["load_balancing_loss"].item()

    assert loss(two_of_four, two_of_four) == pytest.approx(2)
    assert loss(two_of_four, two_of_four.flip(1)) == pytest.approx(1)

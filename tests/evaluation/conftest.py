"""Tiny models and a tiny tokenizer for the evaluation tests."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

SENTENCES = [
    "the old man and the sea went to the quiet town in the morning",
    "she saw the green hill and the white house by the old road",
    "in the town the man was quiet and the sea was green",
    "a white bird went over the hill to the sea in the morning",
    "the road to the old house was white and the morning was quiet",
]
VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges make most words of SENTENCES one token; other words take several."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def _sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Larger head weights: a fresh model is so near to uniform that mistakes would hide below any tolerance."""
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(60)
    return model.eval()


@pytest.fixture(scope="session")
def moxe() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MoxEConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_heads=2, num_experts=4, num_experts_per_tok=2
    )
    return _sharpened(MoxEForCausalLM(config))


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return _sharpened(LlamaForCausalLM(config))


@pytest.fixture(params=["moxe", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)

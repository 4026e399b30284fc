"""Files: what they hold by name, and that what is loaded is what was saved, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import moxe
from moxe.errors import UserError
from moxe.models.checkpoint import load_model
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM, MoxEModel
from tests.models.tiny import EXPERT_KINDS, OPTIONS, tiny_config, tiny_model, token_ids
from tests.modules.comparison import assert_equal

MLSTM = {
    "gate_weight": (4, 96),
    "gate_bias": (4,),
    "skip": (32,),
    "norm.weight": (16,),
    "up_proj.weight": (64, 16),
    "conv.weight": (32, 4),
    "conv.bias": (32,),
    "q_proj.weight": (4, 8, 8),
    "k_proj.weight": (4, 8, 8),
    "v_proj.weight": (4, 8, 8),
    "head_norm.weight": (32,),
    "down_proj.weight": (16, 32),
}
FFN = {"norm.weight": (16,), "up_proj.weight": (128, 16), "down_proj.weight": (16, 64)}
SLSTM = {
    "recurrent_weight": (2, 8, 4, 8),
    "gate_bias": (2, 4, 8),
    "norm.weight": (16,),
    "conv.weight": (16, 4),
    "conv.bias": (16,),
    "if_proj.weight": (2, 8, 16),
    "zo_proj.weight": (2, 8, 16),
    "head_norm.weight": (16,),
    **{f"ffn.{name}": shape for name, shape in FFN.items()},
}
ROUTER = {"weight": (4, 16), "bias": (4,), "difficulty_weight": (16,), "difficulty_bias": (1,)}
EXPERTS = {
    "xlstm": {"mlstm": (2, MLSTM), "slstm": (2, SLSTM)},
    "mlstm": {"mlstm": (4, MLSTM)},
    "slstm": {"slstm": (4, SLSTM)},
    "ffn": {"ffn": (4, FFN)},
}


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Moves the weights out of the mapped file: CPU products round differently at addresses that are not aligned."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def pinned_shapes(expert_kind: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes that checkpoints have: a change here breaks every saved model."""
    stacks = {"slstm_mixer": (1, SLSTM), "mlstm_mixer": (1, MLSTM)}
    stacks |= {f"experts.{kind}": stack for kind, stack in EXPERTS[expert_kind].items()}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (40, 16),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.router.{name}": shape for name, shape in ROUTER.items()}
        for stack, (blocks, parameters) in stacks.items():
            shapes |= {f"{prefix}.{stack}.{name}": (blocks, *shape) for name, shape in parameters.items()}
    return shapes


@pytest.mark.parametrize("expert_kind", EXPERT_KINDS)
def test_a_checkpoint_holds_exactly_these_names_and_shapes(expert_kind: str, tmp_path: Path):
    model = tiny_model(expert_kind=expert_kind)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == pinned_shapes(expert_kind)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(pinned_shapes(expert_kind))


def test_a_router_without_bias_or_difficulty_saves_neither():
    names = tiny_model(router_kind="standard", router_bias=False).state_dict()
    assert {name.split("router.")[1] for name in names if "router." in name} == {"weight"}


def test_balancing_biases_are_saved_where_there_are_any_and_refused_where_they_lack(tmp_path: Path):
    with_bias, without = tiny_model(load_balancing="bias").state_dict(), tiny_model().state_dict()
    biases = {f"model.layers.{layer}.router.balancing_bias" for layer in range(2)}
    assert with_bias.keys() - without.keys() == biases
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    tiny_config(load_balancing="bias").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not fit its config.json: model.layers.0.router.balancing_bias is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [MoxEForCausalLM, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("settings", [*({"expert_kind": kind} for kind in EXPERT_KINDS), *OPTIONS], ids=str)
def test_a_loaded_model_is_the_saved_one_to_the_bit(settings: dict[str, Any], load: type, tmp_path: Path):
    model, ids = tiny_model(dtype=torch.float32, gamma=0.3, **settings), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is MoxEForCausalLM
    assert not loaded.training
    for (name, saved), (other, found) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert saved.dtype == found.dtype
        assert torch.equal(saved, found), name
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)


def test_auto_classes_find_the_configuration_and_the_headless_model(tmp_path: Path):
    model, ids = tiny_model(dtype=torch.float32), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoxEConfig)
    assert isinstance(AutoConfig.for_model("moxe"), MoxEConfig)
    headless = AutoModel.from_pretrained(tmp_path)
    assert isinstance(headless, MoxEModel)
    assert torch.equal(aligned(headless)(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert isinstance(AutoModelForCausalLM.from_config(model.config), MoxEForCausalLM)


def test_the_public_names_are_those_classes():
    assert (moxe.MoxEConfig, moxe.MoxEModel, moxe.MoxEForCausalLM) == (MoxEConfig, MoxEModel, MoxEForCausalLM)


def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = MoxEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    ids = token_ids(1, 5)
    assert_equal(loaded(ids).logits, model.double()(ids).logits)


def test_large_models_are_saved_in_shards_and_loaded_again(tmp_path: Path):
    model, ids = tiny_model(dtype=torch.float32), token_ids(1, 5)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(aligned(MoxEForCausalLM.from_pretrained(tmp_path))(ids).logits, model(ids).logits)


def test_a_checkpoint_that_lacks_a_parameter_keeps_all_others(tmp_path: Path):
    """transformers draws the missing ones anew; their neighbours in a module must stay as they were saved."""
    saved = tiny_model(dtype=torch.float32).state_dict()
    missing = {name for name in saved if name.endswith(("skip", "recurrent_weight", "difficulty_bias"))}
    kept = {name: x for name, x in saved.items() if name not in missing}
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path, state_dict=kept)
    result: Any = MoxEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, found = result
    assert set(found["missing_keys"]) == missing
    for name, parameter in loaded.named_parameters():
        if name in missing:
            assert parameter.isfinite().all(), name
        else:
            assert torch.equal(parameter, saved[name]), name


def test_tied_embeddings_are_one_parameter_before_and_after_saving(tmp_path: Path):
    model, ids = tiny_model(dtype=torch.float32, tie_word_embeddings=True), token_ids(2, 7)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"lm_head.weight", "model.embed_tokens.weight"} - set(file.keys()) == {"lm_head.weight"}
    loaded = MoxEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)


def test_tied_embeddings_learn_from_both_of_their_uses():
    ids = token_ids(2, 7)
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    untied.load_state_dict(tied.state_dict())
    (both,) = torch.autograd.grad(tied(ids, labels=ids).loss, tied.model.embed_tokens.weight)
    uses = [untied.model.embed_tokens.weight, untied.lm_head.weight]
    as_input, as_head = torch.autograd.grad(untied(ids, labels=ids).loss, uses)
    assert_equal(both, as_input + as_head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [50, 30])
def test_embeddings_can_be_resized_without_moving_the_tokens_that_stay(tied: bool, size: int, tmp_path: Path):
    model, ids = tiny_model(dtype=torch.float32, tie_word_embeddings=tied), token_ids(2, 7) % 30
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    logits = model(ids).logits
    assert logits.shape[-1] == size
    kept = min(size, 40)
    assert_equal(logits[..., :kept], before[..., :kept])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(ValueError, match=f"token id {size} is outside the vocabulary"):
        model(torch.tensor([[size]]))
    model(torch.tensor([[size - 1]]), labels=torch.tensor([[size - 1]]))
    model.save_pretrained(tmp_path)
    assert torch.equal(aligned(MoxEForCausalLM.from_pretrained(tmp_path))(ids).logits, logits)


def test_parameters_can_be_made_without_memory_on_the_meta_device():
    with torch.device("meta"):
        model = MoxEForCausalLM(MoxEConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_heads=2))
    assert all(p.is_meta for p in model.parameters())

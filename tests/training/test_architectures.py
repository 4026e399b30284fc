"""Every architecture goes through the training of MoxE: data, metrics, checkpoints, exact resume, evaluation, files."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moxe.training.run as run_module
from moxe.errors import UserError
from moxe.evaluation.perplexity import evaluate_perplexity
from moxe.models.architectures import ARCHITECTURES, build_model
from moxe.models.checkpoint import load_model
from moxe.observability.metrics import read_metrics
from moxe.observability.plots import draw_run
from moxe.recipe import Recipe, load_recipe, make_recipe
from moxe.training.checkpoint import read_json
from moxe.training.diagnosis import diagnose
from moxe.training.gradients import gradient_norms, part_norms, total_norm
from moxe.training.optimizer import decays_weight
from moxe.training.run import train
from tests.training.runs import assert_same_run, quiet, tiny_sections
from tests.training.tiny import Rows

ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "moxe": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "num_experts": 4},
    "xlstm": {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "mlstm_per_slstm": 1},
    "gemma2": {**ATTENTION, "head_dim": 16, "intermediate_size": 64, "sliding_window": 8},
    "qwen2_moe": {
        **ATTENTION,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "llama": {**ATTENTION, "intermediate_size": 64},
}
BASELINES = [name for name in TINY if name != "moxe"]
LOSSES = {
    "xlstm": {"loss", "lm_loss"},
    "gemma2": {"loss", "lm_loss"},
    "qwen2_moe": {"loss", "lm_loss", "load_balancing_loss"},
    "llama": {"loss", "lm_loss"},
}


def recipe_of(architecture: str, text_file: Path, folder: Path, **training: Any) -> Recipe:
    model = {"architecture": architecture, **TINY[architecture]}
    return make_recipe({"model": model, **tiny_sections(text_file, folder, **training)}, name=architecture)


def test_all_architectures_are_tried_here():
    assert set(TINY) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_leaves_what_a_run_of_moxe_leaves(name: str, text_file: Path, tmp_path: Path):
    printed = io.StringIO()
    result = train(recipe_of(name, text_file, tmp_path), Console(file=printed, width=200))
    training = [record for record in read_metrics(result.path / "metrics.jsonl") if "layers" in record]
    validation = [record for record in read_metrics(result.path / "metrics.jsonl") if "validation_loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert [record["step"] for record in validation] == [2, 4]
    assert {key for key in training[0] if key.endswith("loss")} == LOSSES[name]
    assert {key.removeprefix("validation_") for key in validation[0] if key.endswith("loss")} == LOSSES[name]
    assert training[0]["layers"] == validation[0]["validation_layers"] == []
    assert validation[1]["validation_lm_loss"] < validation[0]["validation_lm_loss"]
    drawn = draw_run(result.path / "metrics.jsonl", tmp_path / "plots", formats=["png"])
    assert {path.name for path in drawn} == {"losses.png", "gradients.png", "speed.png"}
    for record in training:
        squares = sum(norm**2 for norm in record["gradient_norms"].values())
        assert squares == pytest.approx(record["gradient_norm"] ** 2, rel=1e-4)
    evaluation = read_json(result.path / "evaluation.json")
    assert ("whole documents, the state carried" if name == "xlstm" else "windows of 32 tokens") in printed.getvalue()
    loaded = load_model(result.path, device="cpu")
    assert type(loaded) is ARCHITECTURES[name].model_class
    assert evaluation["sample"]["text"]
    assert evaluation["validation"]["tokens"] > 0
    assert evaluation["validation"]["context_length"] == (None if name == "xlstm" else 32)
    assert load_recipe(result.path / "recipe.yaml").architecture.name == name


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_that_is_cut_off_goes_on_exactly(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_module, "draw_run", lambda *paths, formats: [])

    def recipe(run: str) -> Recipe:
        return recipe_of(name, text_file, tmp_path, name=run, sample_tokens=0)

    class CutOffError(Exception):
        pass

    def cut_off(*arguments: Any) -> None:
        raise CutOffError

    whole = train(recipe("whole"), quiet())
    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunFolder, "write_model", cut_off)
        with pytest.raises(CutOffError):
            train(recipe("cut"), quiet())
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    resumed = train(recipe("cut"), quiet())
    assert_same_run(resumed.path, whole.path)


@pytest.mark.parametrize("name", BASELINES)
def test_the_final_evaluation_reads_with_the_state_carried_or_in_windows_as_in_training(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    contexts = []

    def watched(*arguments: Any, context_length: int | None, **options: Any) -> Any:
        contexts.append(context_length)
        return evaluate_perplexity(*arguments, context_length=context_length, **options)

    monkeypatch.setattr(run_module, "evaluate_perplexity", watched)
    monkeypatch.setattr(run_module, "draw_run", lambda *paths, formats: [])
    train(recipe_of(name, text_file, tmp_path, sample_tokens=0, max_steps=1, eval_steps=0), quiet())
    assert contexts == [None if name == "xlstm" else 32]


@pytest.mark.parametrize("name", ["gemma2", "qwen2_moe", "llama"])
def test_the_matrices_that_mix_channels_are_decayed_and_nothing_else(name: str):
    kept = {key: parameter for key, parameter in tiny(name).named_parameters() if not decays_weight(key)}
    assert {key for key, parameter in kept.items() if parameter.ndim > 1} == {"model.embed_tokens.weight"}
    vectors = {key for key, parameter in tiny(name).named_parameters() if parameter.ndim == 1}
    assert vectors == kept.keys() - {"model.embed_tokens.weight"}


def test_in_an_xlstm_the_projections_and_the_head_are_decayed_and_nothing_else():
    decayed = {key for key, _ in tiny("xlstm").named_parameters() if decays_weight(key)}
    of_slstm, of_mlstm = ("ffn.up_proj", "ffn.down_proj"), ("up_proj", "q_proj", "k_proj", "v_proj", "down_proj")
    assert decayed == {
        "lm_head.weight",
        *(f"model.layers.{block}.slstm.{name}.weight" for block in (0, 2) for name in of_slstm),
        *(f"model.layers.1.mlstm.{name}.weight" for name in of_mlstm),
    }


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_not_finite_is_found_in_every_architecture(name: str):
    model, batch = tiny(name), {key: value[None] for key, value in Rows(4)[1].items()}
    broken = next(key for key, _ in model.named_parameters() if "layers.1" in key and key.endswith("down_proj.weight"))
    with torch.no_grad():
        model.get_parameter(broken)[0, 0] = float("nan")
    found = diagnose(model, [batch], {"loss": float("nan")})
    assert found.is_in_weights
    assert broken in found.finding


@pytest.mark.parametrize("name", BASELINES)
def test_the_norms_of_the_parts_add_up_to_the_whole(name: str):
    model, batch = tiny(name), {key: value[None] for key, value in Rows(4)[1].items()}
    model.train()(**batch).loss.backward()
    norms = gradient_norms(model)
    parts = part_norms(norms)
    assert sum(norm**2 for norm in parts.values()) == pytest.approx(float(total_norm(norms)) ** 2, rel=1e-5)
    assert {"embedding", "final_norm"} < set(parts)


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return build_model(ARCHITECTURES[name].build_config({**TINY[name], "vocab_size": 64, "pad_token_id": 1}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "lama"}, "model.architecture='lama' must be one of moxe, xlstm, gemma2, qwen2_moe, llama"),
        ({"architecture": ["llama"]}, "must be one of moxe"),
        ({"architecture": "llama", "gamma": 0.5}, "there is no setting model.gamma"),
        ({"architecture": "llama", "hiden_size": 8}, "did you mean 'hidden_size'?"),
        ({"architecture": "llama", "hidden_size": "wide"}, "model.hidden_size='wide' must be a whole number"),
        ({"architecture": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple of the number of"),
        ({"architecture": "llama", "hidden_act": "loud"}, "hidden_act='loud' is not one of"),
        ({"architecture": "llama", "num_attention_heads": 0}, "model: "),
        ({"architecture": "gemma2", "head_dim": 7}, "RoPE requires an even rotary dimension"),
        ({"architecture": "gemma2", "num_key_value_heads": 3}, "is not divisible by num_key_value_heads=3"),
        ({"architecture": "qwen2_moe", "num_experts": 2, "num_experts_per_tok": 3}, "is more than num_experts=2"),
        ({"architecture": "qwen2_moe", "output_router_logits": True}, "no setting model.output_router_logits"),
        ({"architecture": "qwen2_moe", "decoder_sparse_step": 25}, "leave none of num_hidden_layers=24 with experts"),
        (
            {"architecture": "qwen2_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1, 3]},
            "decoder_sparse_step=2 and mlp_only_layers=[1, 3] leave none of num_hidden_layers=4 with experts",
        ),
        ({"architecture": "qwen2_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0 must be from 1 to"),
        ({"architecture": "qwen2_moe", "router_aux_loss_coef": -1}, "router_aux_loss_coef=-1.0 must be a finite"),
        ({"architecture": "qwen2_moe", "router_aux_loss_coef": math.inf}, "=inf must be a finite number at least 0"),
        ({"architecture": "qwen2_moe", "use_sliding_window": True, "sliding_window": None}, "sliding_window=None must"),
        ({"architecture": "gemma2", "sliding_window": None}, "sliding_window=None must be from 1 to"),
        ({"architecture": "gemma2", "sliding_window": 0}, "sliding_window=0 must be from 1 to"),
        ({"architecture": "gemma2", "initializer_range": -0.1}, "initializer_range=-0.1 must be a finite number"),
        ({"architecture": "gemma2", "initializer_range": math.nan}, "initializer_range=nan must be a finite number"),
        ({"architecture": "gemma2", "attention_dropout": 1.0}, "attention_dropout=1 must be below 1"),
        ({"architecture": "gemma2", "attention_dropout": -0.1}, "attention_dropout=-0.1 must be a finite number"),
        ({"architecture": "gemma2", "attention_dropout": None}, "attention_dropout=None must be a finite number"),
        ({"architecture": "gemma2", "final_logit_softcapping": 0}, "final_logit_softcapping=0.0 must be a finite"),
        ({"architecture": "gemma2", "attn_logit_softcapping": -50}, "attn_logit_softcapping=-50.0 must be a finite"),
        ({"architecture": "llama", "rms_norm_eps": 0}, "rms_norm_eps=0.0 must be a finite number above 0"),
        ({"architecture": "llama", "rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a finite number above 0"),
        *(
            ({"architecture": name, "num_hidden_layers": 2**62}, f"={2**62} must be at most 1024")
            for name in ("moxe", "xlstm", "gemma2", "qwen2_moe", "llama")
        ),
        ({"architecture": "llama", "num_hidden_layers": 1025}, "num_hidden_layers=1025 must be at most 1024"),
        ({"architecture": "llama", "rope_parameters": None}, "there is no setting model.rope_parameters"),
        ({"architecture": "xlstm", "num_experts": 4}, "there is no setting model.num_experts"),
        ({"architecture": "xlstm", "num_heads": 3}, "is not divisible by num_heads=3"),
    ],
    ids=str,
)
def test_a_model_section_that_fits_no_architecture_is_refused_with_one_sentence(
    model: dict[str, Any], message: str, tmp_path: Path
):
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "mine.yaml", {"model": model})
    assert message in str(error.value)


def test_a_model_with_fewer_positions_than_the_rows_have_tokens_is_refused_before_it_is_trained(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model: {architecture: llama}\ndata: {sequence_length: 32}", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.max_position_embeddings=31 is less than data\.sequence_length=32"):
        load_recipe(tmp_path / "mine.yaml", [("model.max_position_embeddings", "31")])
    recipe = load_recipe(tmp_path / "mine.yaml", [("model.max_position_embeddings", "32")])
    assert recipe.model["max_position_embeddings"] == recipe.data.sequence_length


def test_a_command_line_names_the_architecture_and_its_settings_in_any_order(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model: {architecture: gemma2, hidden_size: 64}", encoding="utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml", [("model.head_dim", "16"), ("model.final_logit_softcapping", "null")])
    assert (recipe.architecture.name, recipe.model["hidden_size"], recipe.model["head_dim"]) == ("gemma2", 64, 16)
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml", [("model.mlp_bias", "true"), ("model.architecture", "llama")])
    assert recipe.model["mlp_bias"] is True


def test_a_recipe_from_before_there_were_architectures_is_one_of_moxe(tmp_path: Path):
    path = tmp_path / "old.yaml"
    path.write_text("model: {hidden_size: 64, gamma: 0.1}", encoding="utf-8")
    assert load_recipe(path).architecture.name == "moxe"

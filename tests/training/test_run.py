"""From a recipe to a finished run folder, and what is refused on the way."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import moxe.training.run as run_module
from moxe.data.corpus import Corpus, prepare
from moxe.data.packing import Block, PackedStream
from moxe.errors import UserError
from moxe.ops.cpu import build
from moxe.recipe import load_recipe
from moxe.training.config import TrainingConfig
from moxe.training.run import RunResult, process_settings, train
from tests.training.runs import ALL_STEPS, Finished, logged_steps, quiet, tiny_recipe


def test_a_run_leaves_a_whole_folder(finished: Finished):
    path = finished.result.path
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.yaml",
        "versions.json",
        "metrics.jsonl",
        "plots",
        "evaluation.json",
        "checkpoint-2",
        "checkpoint-4",
        "manifest.json",
        ".lock",
    }
    assert {file.name for file in (path / "plots").iterdir()} == {
        "losses.png",
        "utilisation.png",
        "routing.png",
        "gradients.png",
        "speed.png",
    }
    assert logged_steps(path) == ALL_STEPS
    assert load_recipe(path / "recipe.yaml") == finished.recipe
    versions = json.loads((path / "versions.json").read_text(encoding="utf-8"))
    assert {"python", "torch", "transformers", "moxe", "git_commit", "platform", "cpu"} <= versions.keys()


def test_evaluation_json_holds_the_model_and_the_baselines_on_the_same_text(finished: Finished):
    evaluation = json.loads((finished.result.path / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation == finished.result.evaluation
    assert evaluation["training"]["steps"] == 4
    assert evaluation["validation"]["bits_per_byte"] > 0
    assert evaluation["validation"]["bytes"] == evaluation["corpus"]["validation_bytes"]
    assert {"unigram", "bigram", "zlib"} <= evaluation["baselines"].keys()
    assert evaluation["sample"]["prompt"]


def test_a_run_prints_its_results_and_where_they_lie(finished: Finished):
    for words in ("MoxE", "unigram", "bigram", "zlib", "model.safetensors", str(finished.result.path), "step 4/4"):
        assert words in finished.printed


def test_a_finished_run_is_loaded_by_the_auto_classes(finished: Finished):
    model = AutoModelForCausalLM.from_pretrained(finished.result.path)
    tokenizer = AutoTokenizer.from_pretrained(finished.result.path)
    assert model.config.use_cache
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    output = model(**tokenizer("the cat", return_tensors="pt"))
    assert torch.isfinite(output.logits).all()


def test_a_finished_run_is_said_to_be_finished_and_left_alone(finished: Finished, copied: Path, make_recipe):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*")}
    output = io.StringIO()
    result = train(make_recipe(save_total_limit=2), Console(file=output, width=100))
    assert f"{copied} is finished and left as it is: --name NAME starts another run" in output.getvalue()
    assert result == RunResult(copied, finished.result.evaluation)
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*")} == before


def test_a_finished_run_is_not_taken_for_one_with_other_settings(copied: Path, make_recipe):
    with pytest.raises(UserError, match=r"started with training\.learning_rate=0\.003, not 0\.1: give another --name"):
        train(make_recipe(learning_rate=0.1), quiet())


def test_resuming_a_run_that_was_trained_to_its_end_takes_no_step(copied: Path, make_recipe):
    before = (copied / "model.safetensors").read_bytes()
    (copied / "evaluation.json").unlink()
    (copied / "model.safetensors").unlink()
    evaluation = train(make_recipe(), quiet()).evaluation
    assert logged_steps(copied) == ALL_STEPS
    assert evaluation is not None
    assert evaluation["training"]["steps"] == 4
    assert (copied / "model.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_with_other_settings(copied: Path, make_recipe):
    (copied / "evaluation.json").unlink()
    recipe = make_recipe()
    recipe.model["gamma"] = 0.1
    with pytest.raises(UserError, match=r"started with model\.gamma=0\.7, not 0\.1: give another --name"):
        train(recipe, quiet())
    recipe = make_recipe()
    recipe.data.sequence_length = 16
    with pytest.raises(UserError, match=r"data\.sequence_length=32, not 16"):
        train(recipe, quiet())
    for key in ("seed", "batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate"):
        with pytest.raises(UserError, match=rf"training\.{key}=.*, not 7"):
            train(make_recipe(**{key: 7}), quiet())
    (copied / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"training\.seed=0, not 7"):
        train(make_recipe(seed=7), quiet())


def test_a_failure_while_saving_leaves_no_half_written_file(make_recipe, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    recipe = make_recipe()
    prepare(recipe.data, seed=0, progress=False)
    written = {"recipe.yaml", "versions.json", "metrics.jsonl", ".lock"}
    with monkeypatch.context() as failing:
        failing.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(UserError, match=r"step 2 cannot be written .*: disk full; the same command starts again"):
            train(recipe, quiet())
        assert {path.name for path in recipe.run_dir.iterdir()} == written
    with monkeypatch.context() as failing:
        failing.setattr(run_module, "draw_run", fail)
        with pytest.raises(UserError, match=r"disk full; the same command goes on from .*checkpoint-4"):
            train(recipe, quiet())
    train(recipe, quiet())
    assert logged_steps(recipe.run_dir) == ALL_STEPS


def test_an_endless_stream_needs_a_number_of_steps(make_recipe, monkeypatch: pytest.MonkeyPatch):
    def prepare_stream(config: Any, *, seed: int, progress: bool = True) -> Corpus:
        corpus = prepare(config, seed=seed, progress=False)
        documents = list(corpus.train.documents)  # type: ignore[union-attr]
        blocks = [Block(None, documents)]
        stream = PackedStream(lambda *_: blocks, sequence_length=config.sequence_length, pad_token_id=1)
        return replace(corpus, train=stream)

    monkeypatch.setattr(run_module, "prepare", prepare_stream)
    with pytest.raises(UserError, match=r"set training\.max_steps or data\.max_tokens"):
        train(make_recipe(max_steps=-1), quiet())
    result = train(make_recipe(sample_tokens=0), quiet())
    assert result.evaluation is not None
    assert result.evaluation["baselines"]["bigram"] is None
    assert result.evaluation["sample"] is None
    assert logged_steps(result.path) == ALL_STEPS


def test_a_backend_that_is_not_here_is_refused_before_anything_is_written(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no compiler: install one")
    recipe = tiny_recipe(text_file, tmp_path)
    recipe.model["backend"] = "cpu"
    with pytest.raises(UserError, match="no compiler: install one"):
        train(recipe)
    assert not list(tmp_path.iterdir())


def test_a_reporter_that_is_not_installed_is_refused(make_recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None)
    recipe = make_recipe(report_to=["wandb"])
    with pytest.raises(UserError, match="wandb needs the package wandb: pip install wandb"):
        train(recipe, quiet())
    assert not recipe.run_dir.exists()


def test_a_run_folder_that_cannot_be_made_is_refused(make_recipe, tmp_path: Path):
    (tmp_path / "file").write_text("")
    recipe = make_recipe()
    recipe.training.output_dir = str(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        train(recipe, quiet())


def test_process_wide_settings_are_restored():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with process_settings(TrainingConfig(num_threads=2, float32_matmul_precision="medium")):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize("has_gpu", [True, False])
def test_on_a_gpu_alone_operations_can_be_restricted_to_deterministic_ones(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own is kept
    with process_settings(TrainingConfig(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled() == has_gpu
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_data_that_is_refused_leaves_no_run_folder(make_recipe):
    recipe = make_recipe(name="nothing")
    recipe.data.source = "missing.txt"
    with pytest.raises(UserError, match=r"missing\.txt"):
        train(recipe, quiet())
    assert not recipe.run_dir.exists()


def test_a_seed_that_numpy_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"training\.seed=4294967296 must be below 2\*\*32"):
        TrainingConfig(seed=2**32)

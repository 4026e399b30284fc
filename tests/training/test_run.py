"""From a recipe to a finished run folder, and back after an interruption."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import moxe.training.run as run_module
from moxe.data.corpus import Corpus, prepare
from moxe.data.packing import PackedStream
from moxe.errors import UserError
from moxe.observability.metrics import MetricsFile, read_metrics
from moxe.ops.cpu import build
from moxe.recipe import Recipe, load_recipe
from moxe.training.config import TrainingConfig
from moxe.training.run import RunResult, process_settings, train
from tests.training.tiny import TINY

WORDS = "the cat sat on a mat and saw that dogs ran far over hills to find one small red hat in rain"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(40):
        words = WORDS.split()
        choice = torch.randint(len(words), (30,), generator=generator)
        documents.append(" ".join(words[index] for index in choice.tolist()))
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    return path


def tiny_recipe(text_file: Path, output_dir: Path, **training: Any) -> Recipe:
    model = {key: value for key, value in TINY.items() if key not in ("vocab_size", "pad_token_id")}
    data = {
        "source": str(text_file),
        "cache_dir": str(text_file.parent / "cache"),
        "vocab_size": 300,
        "sequence_length": 32,
        "validation_fraction": 0.2,
    }
    defaults = {
        "output_dir": str(output_dir),
        "batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "num_threads": 1,
        "sample_prompt": None,
        "sample_tokens": 5,
    }
    return load_recipe("default", {"model": model, "data": data, "training": {**defaults, **training}})


@dataclass(frozen=True)
class Finished:
    recipe: Recipe
    result: RunResult
    printed: str


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run from beginning to end; only to be read."""
    recipe = tiny_recipe(text_file, tmp_path_factory.mktemp("runs"), save_total_limit=2)
    output = io.StringIO()
    result = train(recipe, Console(file=output, width=100))
    return Finished(recipe, result, output.getvalue())


@pytest.fixture
def make_recipe(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe that writes to `tmp_path`; its run draws no pictures, which take longer than its training."""
    monkeypatch.setattr(run_module, "draw_run", lambda *paths: [])

    def make(**training: Any) -> Recipe:
        return tiny_recipe(text_file, tmp_path, **training)

    return make


@pytest.fixture
def copied(finished: Finished, tmp_path: Path, make_recipe) -> Path:
    """A copy of the finished run as the run `default` of `make_recipe`."""
    return Path(shutil.copytree(finished.result.path, tmp_path / "default"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged_steps(folder: Path) -> list[tuple[int, str]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(record["step"], "training" if "layers" in record else "validation") for record in records]


ALL_STEPS = [
    (1, "training"),
    (2, "training"),
    (2, "validation"),
    (3, "training"),
    (4, "training"),
    (4, "validation"),
]


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
    }
    assert {file.name for file in (path / "plots").iterdir()} == {"losses.png", "utilisation.png", "routing.png"}
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


def test_a_finished_run_is_not_overwritten(copied: Path, make_recipe):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*")}
    with pytest.raises(UserError, match=r"already holds a finished run: choose another --training\.name"):
        train(make_recipe(), quiet())
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*")} == before


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MetricsFile.write

    def write_or_stop(self: MetricsFile, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsFile, "write", write_or_stop)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(finished: Finished, make_recipe):
    whole, recipe = finished.result.path, make_recipe(name="parts")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(3, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, quiet())
    parts = recipe.run_dir
    assert not (parts / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"stopped after checkpoint-2: go on with --training\.resume true"):
        train(make_recipe(name="parts"), quiet())
    assert logged_steps(parts)[-1] == (3, "training")

    train(make_recipe(name="parts", resume=True), quiet())
    assert logged_steps(parts) == logged_steps(whole) == ALL_STEPS
    for record, expected in zip(
        read_metrics(parts / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl"), strict=True
    ):
        assert record.keys() == expected.keys()
        for key in record.keys() & {"loss", "validation_loss", "learning_rate", "tokens", "epoch"}:
            assert record[key] == pytest.approx(expected[key], rel=1e-6), key
    resumed = weights(parts)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-6, atol=1e-7)


def test_resuming_a_run_that_was_trained_to_its_end_takes_no_step(copied: Path, make_recipe):
    before = weights(copied)
    (copied / "evaluation.json").unlink()
    (copied / "model.safetensors").unlink()
    evaluation = train(make_recipe(resume=True), quiet()).evaluation
    assert logged_steps(copied) == ALL_STEPS
    assert evaluation is not None
    assert evaluation["training"]["steps"] == 4
    for name, weight in weights(copied).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_a_run_is_not_resumed_with_another_model_or_other_data(copied: Path, make_recipe):
    recipe = make_recipe(resume=True)
    recipe.model["gamma"] = 0.1
    with pytest.raises(UserError, match=r"cannot be resumed with model\.gamma=0\.1: the run was started with 0\.7"):
        train(recipe, quiet())
    recipe = make_recipe(resume=True)
    recipe.data.sequence_length = 16
    with pytest.raises(UserError, match=r"cannot be resumed with data\.sequence_length=16"):
        train(recipe, quiet())
    for key in ("seed", "batch_size", "gradient_accumulation_steps"):
        with pytest.raises(UserError, match=rf"cannot be resumed with training\.{key}=7"):
            train(make_recipe(resume=True, **{key: 7}), quiet())


def test_a_checkpoint_that_was_cut_off_while_it_was_written_is_not_resumed_from(copied: Path, make_recipe):
    (copied / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    train(make_recipe(resume=True, sample_tokens=0), quiet())
    assert logged_steps(copied) == ALL_STEPS


def test_a_failure_while_saving_leaves_no_half_written_file(make_recipe, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    recipe = make_recipe(save_steps=0)
    prepare(recipe.data, seed=0, progress=False)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train(recipe, quiet())
    assert {path.name for path in recipe.run_dir.iterdir()} == {"recipe.yaml", "versions.json", "metrics.jsonl"}


def test_an_endless_stream_needs_a_number_of_steps(make_recipe, monkeypatch: pytest.MonkeyPatch):
    def prepare_stream(config: Any, *, seed: int, progress: bool = True) -> Corpus:
        corpus = prepare(config, seed=seed, progress=False)
        documents = list(corpus.train.documents)  # type: ignore[union-attr]
        stream = PackedStream(lambda epoch: documents, sequence_length=config.sequence_length, pad_token_id=1)
        return Corpus(stream, corpus.validation, corpus.tokenizer, corpus.validation_texts, corpus.statistics)

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


def test_data_that_is_refused_leaves_no_run_folder(make_recipe):
    recipe = make_recipe(name="nothing")
    recipe.data.source = "missing.txt"
    with pytest.raises(UserError, match=r"missing\.txt"):
        train(recipe, quiet())
    assert not recipe.run_dir.exists()


def test_a_seed_that_numpy_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"training\.seed=4294967296 must be below 2\*\*32"):
        TrainingConfig(seed=2**32)

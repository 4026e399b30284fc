"""Recipes: every packaged one loads, overrides win, and what is wrong is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import moxe.recipe
from moxe.errors import UserError
from moxe.models.accounting import count_parameters
from moxe.recipe import load_recipe, recipe_names, setting_types


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_promised_recipes_are_packaged():
    assert {
        "default",
        "moxe-340m",
        "fineweb-edu",
        "local-text",
        "xlstm-338m",
        "gemma2-356m",
        "qwen2-moe-350m",
        "llama-340m",
    } <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_describes_a_model(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model_config().vocab_size > 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_loads_again_to_the_same(name: str, tmp_path: Path):
    recipe = load_recipe(name, [("training.learning_rate", "3e-3"), ("data.max_tokens", "1e6")])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_paper_recipe_has_the_sizes_and_schedule_of_table_1():
    recipe = load_recipe("moxe-340m")
    config, training = recipe.model_config(), recipe.training
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads) == (640, 10, 4)
    assert (config.num_experts, config.num_experts_per_tok, config.vocab_size) == (8, 2, 49152)
    assert (recipe.data.sequence_length, training.learning_rate) == (256, 2e-4)
    assert (training.schedule, training.warmup_ratio) == ("cosine", 0.1)


@pytest.mark.parametrize(
    ("name", "of_the_paper", "architecture"),
    [
        ("moxe-340m", 340e6, "moxe"),
        ("xlstm-338m", 338e6, "xlstm"),
        ("gemma2-356m", 356e6, "gemma2"),
        ("qwen2-moe-350m", 350e6, "qwen2_moe"),
        ("llama-340m", 340e6, "llama"),
    ],
)
def test_the_models_that_are_compared_have_the_parameters_of_table_1(name: str, of_the_paper: float, architecture: str):
    """Llama is not in the table; it is as large as MoxE."""
    recipe, moxe = load_recipe(name), load_recipe("moxe-340m")
    assert recipe.architecture.name == architecture
    assert count_parameters(recipe.model_config()).total_parameters == pytest.approx(of_the_paper, rel=0.03)
    assert recipe.data == moxe.data
    assert recipe.training == dataclasses.replace(moxe.training, name=name)


def test_the_compared_models_have_the_sizes_of_table_1():
    xlstm, gemma2, qwen = (load_recipe(name).model for name in ("xlstm-338m", "gemma2-356m", "qwen2-moe-350m"))
    assert (xlstm["hidden_size"], xlstm["num_hidden_layers"], xlstm["num_heads"]) == (1024, 36, 8)
    assert xlstm["mlstm_per_slstm"] == 5
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    assert [gemma2[size] for size in sizes] == [640, 15, 8]
    assert [qwen[size] for size in (*sizes, "num_experts", "num_experts_per_tok")] == [640, 10, 16, 6, 2]


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path):
    path = write(tmp_path, "training: {batch_size: 3, seed: 5}\nmodel: {gamma: 0.1}\n")
    recipe = load_recipe(path, [("training.batch_size", "4")])
    assert (recipe.training.batch_size, recipe.training.seed, recipe.training.beta2) == (4, 5, 0.95)
    assert recipe.model["gamma"] == 0.1
    assert recipe.model["num_experts"] == 8
    nested = load_recipe(path, {"training": {"batch_size": 4}})
    assert nested == recipe


def test_the_name_of_a_run_is_the_recipe_files_unless_it_is_set(tmp_path: Path):
    path = write(tmp_path, "")
    assert load_recipe(path).name == "mine"
    assert load_recipe(path, [("training.name", "007")]).run_dir == Path("runs/007")


@pytest.mark.parametrize(
    ("dotted", "text", "value"),
    [
        ("training.learning_rate", "3e-3", 3e-3),
        ("training.learning_rate", "1", 1.0),
        ("data.max_tokens", "1e6", 1_000_000),
        ("data.max_tokens", "null", None),
        ("data.max_tokens", "5_000", 5000),
        ("training.name", "12", "12"),
        ("data.text_field", "on", "on"),
        ("data.subset", "none", None),
        ("training.bf16", "true", True),
        ("training.report_to", "tensorboard", ["tensorboard"]),
        ("training.report_to", "tensorboard,wandb", ["tensorboard", "wandb"]),
        ("training.report_to", "[wandb]", ["wandb"]),
        ("training.report_to", "[]", []),
        ("training.sample_prompt", "it's: [odd", "it's: [odd"),
        ("model.tie_word_embeddings", "yes", True),
        ("model.eos_token_id", "[1, 2]", [1, 2]),
    ],
)
def test_text_of_a_command_line_becomes_the_type_of_its_setting(dotted: str, text: str, value: object):
    section, key = dotted.split(".")
    loaded = load_recipe("default", [(dotted, text)]).to_dict()[section][key]
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("training.learning_rat", "1")], "no setting training.learning_rat: did you mean 'learning_rate'?"),
        ([("model.hiden_size", "1")], "no setting model.hiden_size: did you mean 'hidden_size'?"),
        ([("trainig.seed", "1")], "no section trainig: did you mean 'training'?"),
        ([("seed", "1")], "'seed' must be written as section.key"),
        ([("training.learning_rate", "fast")], "training.learning_rate='fast' must be a number"),
        ([("training.batch_size", "2.5")], "training.batch_size=2.5 must be a whole number"),
        ([("training.batch_size", "true")], "training.batch_size=True must be a whole number"),
        ([("training.bf16", "1")], "training.bf16=1 must be true or false"),
        ([("training.schedule", "linear")], "training.schedule='linear' must be one of cosine, wsd"),
        ([("training.report_to", "mlflow")], "must be a list of tensorboard, wandb"),
        ([("training.num_threads", "[")], "training.num_threads='[' must be a whole number or null"),
        ([("training.batch_size", "0")], "training.batch_size=0 must be at least 1"),
        ([("training.learning_rate", "nan")], "training.learning_rate=nan must be a finite number above 0"),
        ([("training.weight_decay", "inf")], "training.weight_decay=inf must be"),
        ([("training.name", "a/b")], "training.name='a/b' must be a folder name"),
        ([("training.max_steps", "0")], "training.max_steps=0 must be at least 1, or -1"),
        ([("model.num_experts", "7")], "num_experts=7 is odd"),
        ([("model.expert_kind", "lstm")], "expert_kind='lstm' is not one of: xlstm, mlstm, slstm, ffn"),
        ([("model.gamma", "-1")], "gamma=-1.0 must be a finite number at least 0"),
        ({"training": {"name": 7}}, "training.name=7 must be text or null"),
        ({"training": 3}, "sets the section training to 3, but a mapping is expected"),
        ({"model": {"vocab_size": None}}, "model.vocab_size=None must be a whole number"),
    ],
)
def test_a_wrong_override_is_refused_with_one_sentence(overrides, message: str):
    with pytest.raises(UserError) as error:
        load_recipe("default", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1}", "no setting training.lr"),
        ("optimizer: {}", "there is no section optimizer"),
        ("training: [1]", "sets the section training to [1]"),
        ("- 1", "a mapping of sections is expected"),
        ("training: {seed: 1", "is not valid YAML"),
        ("training: {seed: 1, seed: 2}", "the key 'seed' is set twice"),
        ("training: {batch_size: eight}", "training.batch_size='eight' must be a whole number"),
    ],
)
def test_a_wrong_recipe_file_is_refused_with_one_sentence(text: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path):
    assert isinstance(yaml.safe_load("3e-3"), str)
    assert load_recipe(write(tmp_path, "training: {learning_rate: 3e-3}")).training.learning_rate == 3e-3


def test_an_empty_section_keeps_all_defaults(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, "training:\nmodel:\n"))
    assert recipe == load_recipe(write(tmp_path, ""))


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(UserError, match="there is no recipe defautl: did you mean 'default'"):
        load_recipe("defautl")
    with pytest.raises(UserError, match="there is no recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_the_vocabulary_is_the_tokenizers_unless_the_recipe_sets_one():
    recipe = load_recipe("default")
    config = recipe.model_config(300, eos_token_id=7)
    assert (config.vocab_size, config.eos_token_id) == (300, 7)
    assert recipe.model_config().vocab_size == recipe.data.vocab_size
    assert load_recipe("default", {"model": {"vocab_size": 512}}).model_config(300).vocab_size == 512


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    recipe = load_recipe("default", {"model": {"vocab_size": 299}})
    with pytest.raises(UserError, match=r"model\.vocab_size=299 is smaller than the tokenizer, which has 300 tokens"):
        recipe.model_config(300)


def test_a_vocabulary_that_is_not_known_yet_is_said_to_be_unknown():
    recipe = load_recipe("default", {"data": {"tokenizer": "owner/name"}})
    with pytest.raises(UserError, match=r"'owner/name' is loaded: set model\.vocab_size"):
        recipe.model_config()


def test_a_warm_up_and_a_decay_that_overlap_are_refused():
    with pytest.raises(UserError, match="more than the whole run"):
        load_recipe("default", {"training": {"schedule": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.5}})


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_every_setting_of_a_section_has_a_type(section: str):
    settings = load_recipe("moxe-340m").to_dict()[section]
    assert settings.keys() <= setting_types(section).keys()
    config = {"data": load_recipe().data, "training": load_recipe().training}.get(section)
    if config is not None:
        assert list(setting_types(section)) == [field.name for field in dataclasses.fields(config)]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_comes_with_moxe_has_no_line_over_120_columns(name: str):
    lines = (Path(moxe.recipe.__file__).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines
    assert max(map(len, lines)) <= 120

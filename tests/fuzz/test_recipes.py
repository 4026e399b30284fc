"""Recipes of any content: one that loads can be saved and built, any other is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moxe.errors import UserError
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.recipe import Recipe, load_recipe, setting_types

SETTINGS = [(section, key) for section in ("model", "data", "training") for key in setting_types(section)]
# Layers are built one by one even on the meta device, so the largest permitted number takes its time.
MOST_LAYERS_TO_BUILD = 8

EXTREMES = [
    0, -1, 1, 2, 3, 16, 64, 2**31, 2**40, 2**63 - 1, 2**63, 2**70, 10**9, 10**12, 10**15, 10**400, -(2**63),
    0.0, -0.0, 0.5, 1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", " ", "nan", "inf", "1e999", "-1", "1_0", "\uff11\uff12", "\u00b2", "null", "true", "a\0b", "a\nb", "\ud800",
    "\x1b[2J", "x" * 5000,
    "/", ".", "..", "~nobody-of-this-name/x", "/dev/null", None, True, False, [], {}, [None], [[]], ["wandb",
    "wandb"],
    {"a": 1}, "9" * 5000,
]  # fmt: skip
values = st.one_of(
    st.sampled_from(EXTREMES),
    st.integers(),
    st.floats(),
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)
# Lines that YAML itself gives a meaning.
lines = st.sampled_from([
    "model:", "data:", "training:", "  seed: 1", "  hidden_size: 64", "\tseed: 1", "  seed: *a", "  seed: &a 1",
    "  name: 2001-13-45", "  seed: 2001-01-01", "  bf16: !!bool perhaps", "  seed: !!int x", "  seed: !!int ''",
    "  seed: 0x" + "f" * 5000, "  seed: " + "9" * 5000, "  seed: 0b_", "  gamma: ._", "  gamma: 1:60.5",
    "  seed: !!float ''",
    "  seed: !!timestamp x", "  seed: !!binary x", "  <<: {seed: 1}", "  ? [1]\n  : 1", "  ? {}\n  : 1",
    "  report_to: &r [*r]",
    "  name: !!python/object/apply:os.system [exit]", "  name: !!python/name:os.system ''", "  name: !custom x",
    "model: !!map [1]", "training: !!set {seed}", "training: !!omap [seed: 1]", "training: !!pairs [seed: 1]",
    "training: !!str {}",
    "---", "...", "%YAML 9.9", "%TAG ! x", "? ", "- ", "{", "}", "[", "]", "|", ">", "'", '"', "#", "&", "*", "!",
    "@", "`",
    "1: 2", "null: 3", "~: ~", "training: null", "training: []", "training: x", "? training\n: {seed: 1}",
])  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "mine.yaml"


def require_one_line(sentence: str) -> None:
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 2000


def load_or_refuse(path: Path, overrides: Any = ()) -> Recipe | None:
    """The recipe, held against its promises; None if it is refused with one line of readable length."""
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        require_one_line(str(error))
        return None
    saved = path.with_name("saved.yaml")
    recipe.save(saved)
    assert load_recipe(saved) == recipe
    assert recipe.run_dir.name == recipe.name
    build(recipe)
    return recipe


def build(recipe: Recipe) -> None:
    if recipe.model["num_hidden_layers"] > MOST_LAYERS_TO_BUILD:
        return
    try:
        config = recipe.model_config(None if recipe.data.tokenizer == "train" else 300)
    except UserError:
        assert recipe.model.get("vocab_size", 300) < 300  # the only thing that is not known before the tokenizer is
        return
    with torch.device("meta"):
        MoxEForCausalLM(config)


def billion_laughs() -> str:
    anchors = [f"  a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    return "\n".join(["training:", "  a0: &a0 [lol, lol]", *anchors])


@given(st.binary(max_size=200))
@example(b"\xff\xfem\x00o\x00d\x00e\x00l\x00:\x00")
@example(b"\xef\xbb\xbfmodel: {hidden_size: 64}")
@example(b"model: \0")
@example(b"\x85\xe2\x80\xa8")
def test_any_bytes(path: Path, content: bytes):
    path.write_bytes(content)
    load_or_refuse(path)


@given(st.lists(lines, max_size=6).map("\n".join) | st.text())
@example("[" * 100_000)
@example("training: " + "{a: " * 100_000)
@example(billion_laughs())
@example("x: &a [*a]")
@example("training: {name: &a [*a]}")
@example("training: {seed: 2001-13-45}")
@example("training: {seed: !!int ''}")
@example("training: {seed: !!timestamp x}")
@example("training: {bf16: !!bool perhaps}")
@example("model: !!map [1]")
@example("training: {seed: 0x" + "f" * 5000 + "}")
@example("training: {num_threads: 0x" + "f" * 5000 + "}")
@example("training: {name: !!python/object/apply:os.system [exit]}")
def test_any_yaml(path: Path, content: str):
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    load_or_refuse(path)


def test_a_recipe_of_many_keys_is_read_in_no_time(path: Path):
    path.write_text("\n".join(f"k{number}: 1" for number in range(20_000)))
    load_or_refuse(path)


@given(st.recursive(values, lambda inner: st.dictionaries(st.sampled_from(["model", "data", "training", "x"]), inner)))
def test_any_structure(path: Path, content: Any):
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    load_or_refuse(path)


@given(st.sampled_from(SETTINGS), values)
@example(("training", "name"), "a\0b")
@example(("data", "text_field"), "\x85")
@example(("training", "sample_prompt"), "a \u2028b\u2029")
@example(("training", "output_dir"), "~nobody-of-this-name/x")
@example(("training", "max_steps"), 2**70)
@example(("data", "max_tokens"), 2**63)
@example(("data", "vocab_size"), 2**40)
@example(("model", "mlstm_expansion"), 1e308)
@example(("model", "hidden_size"), 10**9)
@example(("model", "num_experts"), 10**9)
@example(("model", "num_hidden_layers"), 10**9)
@example(("model", "conv_kernel_size"), 2**62)
@example(("model", "pad_token_id"), 2**63)
def test_any_value_of_any_setting(path: Path, setting: tuple[str, str], value: Any):
    section, key = setting
    path.write_text(yaml.safe_dump({section: {key: value}}), encoding="utf-8")
    load_or_refuse(path)


@given(st.lists(st.tuples(st.sampled_from([pair for pair in SETTINGS if pair[0] == "model"]), values), max_size=6))
def test_any_sizes_together(path: Path, pairs: list[tuple[tuple[str, str], Any]]):
    path.write_text(yaml.safe_dump({"model": {key: value for (_, key), value in pairs}}), encoding="utf-8")
    load_or_refuse(path)


texts = st.one_of(
    st.sampled_from(EXTREMES).map(str),
    st.text(),
    st.sampled_from(["[" * 5000, "{a: 1", "2001-13-45", "!!int ''", "!!python/name:os.system", "&a [*a]", "- - -",
    "0x" + "f" * 5000]),
)  # fmt: skip


@given(st.sampled_from(SETTINGS), texts)
@example(("training", "num_threads"), "[" * 5000)
@example(("training", "seed"), "2001-13-45")
def test_any_text_of_any_override(path: Path, setting: tuple[str, str], text: str):
    path.write_text("")
    load_or_refuse(path, [(".".join(setting), text)])


@given(st.text(), st.text())
def test_any_name_of_an_override(path: Path, name: str, text: str):
    path.write_text("")
    load_or_refuse(path, [(name, text)])


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40))
@example(".")
@example("a\\b")
@example("a\nb")
def test_any_name_of_a_recipe_file(path: Path, stem: str):
    assume(len(stem.encode()) < 200)
    named = path.with_name(f"{stem}.yaml")
    named.write_text("")
    load_or_refuse(named)
    named.unlink()


@pytest.mark.parametrize(
    "name", ["", "\0", "a\0.yaml", "x" * 5000, "y/" * 5000, "/dev/null", "/", "~nobody/x", "\ud800", "a\n/b"]
)
def test_what_is_no_recipe_file_is_refused(name: str):
    with pytest.raises(UserError) as refused:
        load_recipe(name)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000

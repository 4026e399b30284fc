"""Model folders with any damage: what loads is a model, anything else is refused in one sentence,
and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moxe.cli import main
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import UserError
from moxe.manifest import MANIFEST, DamagedError, write_manifest
from moxe.models.checkpoint import load_config, load_model
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
READ_BY_LOAD_MODEL = ("config.json", "generation_config.json", "model.safetensors")
VALUES = [
    0, -1, 1, 3, 2**40, 2**63, 2**70, 10**30, 1e308, float("nan"), float("inf"), "", "x", "float32", "int8",
    "float8_e4m3fn",
    "bfloat16", "nn", None, True, False, [], {}, [1], ["x"], {"a": 1}, {"0": "x"}, "\ud800", "a\0b", "a\nb",
    "x" * 5000,
]  # fmt: skip


def make_folder(folder: Path) -> Path:
    """What a finished run leaves of its model."""
    tokenizer = train_tokenizer(["the old man and the sea"], vocab_size=260)
    torch.manual_seed(0)
    MoxEForCausalLM(MoxEConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def vouched_for(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a manifest."""
    folder = tmp_path_factory.mktemp("vouched_for")
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def copy(source: Path, place: Path) -> Path:
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder


def require_one_line(sentence: str) -> None:
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 2000


def load_or_refuse(folder: Path, load: Callable[[Path], Any] = load_model) -> Any:
    try:
        return load(folder)
    except UserError as error:
        require_one_line(str(error))
        return None


def edit(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")


# Damage of any kind


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """A function that damages a file."""
    kind = draw(st.sampled_from(["flip", "truncate", "empty", "append", "folder", "remove", "replace"]))
    where, byte = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))
    early = draw(st.booleans())  # headers lie at the beginning
    content = draw(st.binary(max_size=40))

    def damage(path: Path) -> None:
        old = bytearray(path.read_bytes())
        at = int(where * (min(len(old), 400) if early else len(old)))
        if kind == "flip":
            old[at] ^= byte
        elif kind == "truncate":
            del old[at:]
        elif kind == "append":
            old += content or b"\0"
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "remove":
            path.write_bytes({"empty": b"", "replace": content}.get(kind, bytes(old)))

    return damage


@given(st.sampled_from(READ_BY_LOAD_MODEL), damages())
def test_a_damaged_file_is_refused_or_the_model_is_whole(
    saved: Path, place: Path, name: str, damage: Callable[[Path], None]
):
    folder = copy(saved, place)
    damage(folder / name)
    model = load_or_refuse(folder)
    if model is not None:
        expected = MoxEForCausalLM(load_config(folder)).state_dict()
        found = model.state_dict()
        assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in expected.items()}


@given(st.sampled_from(READ_BY_LOAD_MODEL), damages())
def test_with_a_manifest_every_damage_is_found(
    vouched_for: Path, place: Path, name: str, damage: Callable[[Path], None]
):
    folder = copy(vouched_for, place)
    damage(folder / name)
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        load_model(folder)
    if name == "config.json":
        with pytest.raises(DamagedError):
            load_config(folder)


def test_what_the_manifest_vouches_for_is_loaded(vouched_for: Path):
    assert load_model(vouched_for).config.hidden_size == load_config(vouched_for).hidden_size == 16


def test_the_configuration_alone_does_not_need_the_weights(vouched_for: Path, place: Path):
    folder = copy(vouched_for, place)
    (folder / "model.safetensors").unlink()
    assert load_config(folder).hidden_size == 16


def test_a_damaged_manifest_is_refused(vouched_for: Path, place: Path):
    folder = copy(vouched_for, place)
    (folder / MANIFEST).write_text("{}")
    for load in (load_config, load_model):
        with pytest.raises(DamagedError):
            load(folder)


@given(
    st.permutations(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
)
def test_files_in_each_others_place(saved: Path, place: Path, order: list[str]):
    folder = copy(saved, place)
    for name, other in zip(sorted(order), order, strict=True):
        shutil.copyfile(saved / other, folder / name)
    load_or_refuse(folder)


# Values of config.json and generation_config.json

SETTINGS = [*MoxEConfig.setting_names(), "model_type", "dtype", "torch_dtype", "architectures", "id2label", "label2id"]
SETTINGS += ["num_labels", "attn_implementation", "experts_implementation", "_attn_implementation", "problem_type"]
SETTINGS += [
    "transformers_version",
    "name_or_path",
    "_name_or_path",
    "_check",
    "__class__",
    "__dict__",
    "auto_map",
    "per_layer_config",
]
SETTINGS += [
    "quantization_config",
    "transformers_weights",
    "return_dict",
    "to_dict",
    "output_attentions",
    "_commit_hash",
    "attribute_map",
]


@given(st.sampled_from(SETTINGS), st.sampled_from(VALUES) | st.integers() | st.floats() | st.text())
@example("dtype", "floatx")
@example("dtype", 5)
@example("dtype", [1])
@example("dtype", "int8")
@example("id2label", 5)
@example("num_labels", 10**12)
@example("_attn_implementation", "flash")
@example("attn_implementation", "flash")
@example("experts_implementation", "x")
@example("mlstm_expansion", 1e300)
@example("vocab_size", 10**22)
@example("eos_token_id", "x")
@example("tie_word_embeddings", "x")
@example("_check", 1)
@example("hidden_size", 2**17)
def test_any_value_in_the_configuration(saved: Path, place: Path, key: str, value: Any):
    folder = copy(saved, place)
    edit(folder / "config.json", **{key: value})
    load_or_refuse(folder)
    load_or_refuse(folder, load_config)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "9" * 5000, '{"model_type": ' + "9" * 5000 + "}", "\ufeff{}", "null"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_python_cannot_read_is_refused(saved: Path, place: Path, name: str, content: str):
    folder = copy(saved, place)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=name):
        load_model(folder)


@given(
    st.sampled_from(["use_cache", "eos_token_id", "max_new_tokens", "temperature", "do_sample", "num_beams", "top_k",
    "cache_implementation",
                     "compile_config", "watermarking_config", "pad_token_id", "transformers_version",
                     "_from_model_config", "custom_generate",
                     "output_attentions", "return_dict_in_generate", "constraints", "to_dict", "update", "x"]),
    st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(),
)  # fmt: skip
def test_any_value_in_the_configuration_of_generation(saved: Path, place: Path, key: str, value: Any):
    folder = copy(saved, place)
    edit(folder / "generation_config.json", **{key: value})
    load_or_refuse(folder)


# The header of the weights

HEADERS = st.dictionaries(
    st.sampled_from(["model.norm.weight", "lm_head.weight", "x", "__metadata__", ""]),
    st.one_of(
        st.sampled_from(VALUES[:12]),
        st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "U8", "x", 1]),
            "shape": st.lists(st.sampled_from([0, 1, 16, 2**40, 2**63, -1]), max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 1, 4, 64, 2**63, -1]), max_size=3),
        }),
    ),
)  # fmt: skip


@given(HEADERS, st.integers(0, 80))
def test_any_header_of_weights(saved: Path, place: Path, header: dict[str, Any], size: int):
    folder = copy(saved, place)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
    assert load_or_refuse(folder) is None


@given(st.sampled_from(["F16", "I32", "U32", "I8", "F64", "BOOL", "C64", "F8_E5M2"]))
@example("I32")
def test_weights_of_another_type(saved: Path, place: Path, name: str):
    folder = copy(saved, place)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', f'"{name}"'.encode().ljust(5)[:5], 1))
    load_or_refuse(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_that_are_no_floating_point_numbers_are_refused(saved: Path, place: Path, dtype: torch.dtype):
    from safetensors.torch import load_file, save_file

    folder = copy(saved, place)
    for names in (["model.norm.weight"], None):  # one of them, all of them
        weights = load_file(saved / "model.safetensors")
        weights |= {name: weights[name].to(dtype) for name in names or weights}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="dtype"):
            load_model(folder)


# The index of weights in several files


@pytest.fixture(scope="module")
def sharded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    load_model(saved).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_weights_in_several_files_are_loaded(sharded: Path, saved: Path):
    expected = load_model(saved).state_dict()
    for name, weight in load_model(sharded).state_dict().items():
        assert torch.equal(weight, expected[name])


def test_a_path_that_leaves_the_folder_is_refused(sharded: Path, place: Path):
    folder = copy(sharded, place)
    shutil.copyfile(next(sharded.glob("model-00001*")), place / "other.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in (
        "../other.safetensors",
        str(place / "other.safetensors"),
        "",
        ".",
        "..",
        None,
        1,
        ["x"],
        "a.bin",
        "\0",
    ):
        changed = {key: name if file.startswith("model-00001") else file for key, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(UserError, match=r"not a \.safetensors file of its folder"):
            load_model(folder)


@given(st.sampled_from(["weight_map", "metadata", "x"]), st.sampled_from(VALUES))
def test_any_value_in_the_index(sharded: Path, place: Path, key: str, value: Any):
    folder = copy(sharded, place)
    edit(folder / "model.safetensors.index.json", **{key: value})
    load_or_refuse(folder)


@given(damages(), st.integers(0))
def test_a_damaged_index_or_shard(sharded: Path, place: Path, damage: Callable[[Path], None], number: int):
    folder = copy(sharded, place)
    names = sorted(path.name for path in folder.glob("model*"))
    damage(folder / names[number % len(names)])
    load_or_refuse(folder)


# Code that a folder brings


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.bin", "adapter_model.bin"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_is_never_read(saved: Path, place: Path, tmp_path: Path, name: str, beside: bool):
    folder, marker = copy(saved, place), tmp_path / "it ran"
    pickle.loads(pickle.dumps(Payload(tmp_path / "a pickle can run code")))
    assert (tmp_path / "a pickle can run code").exists()
    if not beside:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    load_or_refuse(folder)
    torch.save(Payload(marker), folder / name)
    model = load_or_refuse(folder)
    assert not marker.exists()
    assert (model is not None) == (beside and name != "model.safetensors")


def test_an_index_of_pickles_is_refused(saved: Path, place: Path):
    folder = copy(saved, place)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text(json.dumps(index))
        with pytest.raises(UserError):
            load_model(folder)


def test_code_in_the_folder_is_never_run(saved: Path, place: Path, tmp_path: Path):
    folder, marker = copy(saved, place), tmp_path / "it ran"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "evil.py", folder / "custom_generate" / "generate.py")
    edit(folder / "generation_config.json", custom_generate="evil.py", auto_map={"AutoModel": "evil.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    main(["generate", str(folder), "the", "--max-new-tokens", "1"])
    edit(folder / "config.json", auto_map={name: "evil.Thing" for name in ("AutoConfig", "AutoModelForCausalLM")})
    with pytest.raises(UserError, match="'auto_map'"):
        load_model(folder)
    assert main(["generate", str(folder), "the", "--max-new-tokens", "1"]) == 2
    assert not marker.exists()


def test_an_adapter_that_names_another_model_is_refused(saved: Path, place: Path):
    folder = copy(saved, place)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_model(folder)

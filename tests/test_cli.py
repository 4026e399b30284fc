"""The command line, end to end on tiny models: what it prints, its exit codes, and its one sentence for bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moxe import MoxEConfig, MoxEForCausalLM, __version__
from moxe.cli import main, split_overrides
from moxe.data.tokenizer import train_tokenizer
from moxe.errors import UserError
from moxe.recipe import recipe_names
from moxe.training.trainer import MoxETrainer
from moxe.training.verify_resume import Kill, Verification

SENTENCES = [
    "the old man and the sea went to the quiet town in the morning",
    "she saw the green hill and the white house by the old road",
    "a white bird went over the hill to the sea in the morning",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
# What the installed `moxe` script runs; the name of the program tells moxe to leave heavy imports to the command.
PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'moxe'; from moxe.cli import main; sys.exit(main())"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as a run leaves it; tests that spoil one work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    MoxEForCausalLM(MoxEConfig(vocab_size=len(tokenizer), **SIZES, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(SENTENCES * 20), encoding="utf-8")
    return path


@pytest.fixture
def last_words(tmp_path: Path) -> Path:
    path = tmp_path / "last_words.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES), encoding="utf-8")
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one sentence on stderr of a command that must end with code 2 and leave stdout empty."""
    assert main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moxe: ")
    assert captured.err.count("\n") == 1
    return captured.err


def output(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert main([str(argument) for argument in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# The frame: help, version, commands, overrides


def test_help_names_every_command_and_shows_examples(capsys):
    text = output(capsys, "--help")
    for name in ("train", "eval", "generate", "info", "watch"):
        assert f"\n    {name} " in text
        assert f"  moxe {name} " in text


@pytest.mark.parametrize("command", ["train", "eval", "generate", "info", "verify-resume", "watch"])
def test_every_command_has_its_help(capsys, command):
    assert output(capsys, command, "--help").startswith(f"usage: moxe {command} ")


def test_the_help_of_train_names_every_recipe_that_comes_with_moxe(capsys):
    text = " ".join(output(capsys, "train", "--help").split())
    assert ", ".join(recipe_names()) in text


def test_help_does_not_wait_for_heavy_imports():
    check = (
        "import sys; sys.argv[0] = 'moxe'; from moxe.cli import main; main(['--help']); "
        "sys.exit(bool({'torch', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_version(capsys):
    assert output(capsys, "--version") == f"moxe {__version__}\n"


def test_no_command_prints_the_help_on_stderr(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: moxe ")


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert "there is no command 'trian': did you mean 'train'?" in refusal(capsys, "trian", "default")
    assert "there are: train, watch, eval, generate, info" in refusal(capsys, "xyz")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train"], "the following arguments are required: RECIPE"),
        (["generate", "runs/default"], "the following arguments are required: PROMPT"),
        (["eval", "runs/default", "--limt", "3"], "moxe eval does not take '--limt'"),
        (["train", "default", "--learning_rate", "1"], "moxe train does not take '--learning_rate'"),
        (["info", "default", "extra"], "moxe info does not take 'extra'"),
        (["eval", "runs/default", "--data", "x.txt", "--limit", "0"], "'0' is not a whole number from 1 to"),
        (["eval", "runs/default", "--data", "x.txt", "--batch-size", "x"], "'x' is not a whole number from 1 to"),
        (["eval", "runs/default", "--task", "hellaswag"], "invalid choice: 'hellaswag'"),
        (["eval", "runs/default"], "say what to evaluate on"),
        (["eval", "runs/default", "--task", "last_word"], "say what to evaluate on"),
        (["eval", "runs/default", "--task", "lambada", "--data", "x.jsonl"], "brings its own data"),
        (["eval", "runs/default", "--data.source", "x.txt"], "moxe eval does not take '--data.source'"),
        (["train", "default", "--training.seed"], "--training.seed needs a value"),
        (["train", "default", "--training.seed", "--model.gamma", "0"], "--training.seed needs a value"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, argv, sentence):
    assert sentence in refusal(capsys, *argv)


def test_overrides_are_written_with_a_space_or_an_equals_sign_anywhere():
    argv = ["--training.seed", "1", "train", "--data.source=a=b.txt", "default", "--training.max_steps", "-1", "--json"]
    rest, overrides = split_overrides(argv)
    assert rest == ["train", "default", "--json"]
    assert overrides == [("training.seed", "1"), ("data.source", "a=b.txt"), ("training.max_steps", "-1")]


def test_what_follows_two_dashes_is_never_an_override():
    assert split_overrides(["generate", "x", "--", "--a.b", "c"]) == (["generate", "x", "--", "--a.b", "c"], [])


def test_an_empty_value_of_an_override_is_a_value():
    assert split_overrides(["--data.document_separator="]) == ([], [("data.document_separator", "")])
    assert split_overrides(["--data.document_separator", ""]) == ([], [("data.document_separator", "")])


def test_ctrl_c_ends_with_130_and_no_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("moxe.cli.info", interrupted)
    assert main(["info", "default"]) == 130
    assert capsys.readouterr().err == "\nmoxe: interrupted\n"


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        done = subprocess.run([*PROGRAM, "--help"], cwd=ROOT, stdout=closed_pipe, stderr=subprocess.PIPE, check=True)
    assert done.stderr == b""


def test_an_error_of_the_operating_system_is_one_sentence(capsys, monkeypatch):
    def no_space(args):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("moxe.cli.info", no_space)
    assert "No space left on device: 'runs/x'" in refusal(capsys, "info", "default")


# train


def recipe_file(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {json.dumps(SIZES)}\n"
        f"data: {{source: {corpus}, vocab_size: 280, sequence_length: 32, cache_dir: {tmp_path / 'cache'}}}\n"
        f"training: {{output_dir: {tmp_path / 'runs'}, max_steps: 2, batch_size: 2, logging_steps: 1, eval_steps: 0,"
        " save_steps: 0, sample_tokens: 4}\n",
        encoding="utf-8",
    )
    return path


def test_a_run_can_be_evaluated_sampled_and_described(capsys, tmp_path, corpus):
    recipe = recipe_file(tmp_path, corpus)
    printed = output(capsys, "train", recipe, "--training.name=first", "--training.learning_rate", "1e-3")
    run = tmp_path / "runs" / "first"
    assert "first" in printed
    assert "learning_rate: 0.001" in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert json.loads(output(capsys, "eval", run, "--data", corpus, "--limit", "3", "--json"))["loss"] > 0
    assert output(capsys, "generate", run, "the old", "--max-new-tokens", "3").endswith("\n")
    of_run = json.loads(output(capsys, "info", run, "--json"))
    assert of_run["total_parameters"] == sum(weight.numel() for weight in load_file(run / "model.safetensors").values())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (["--training.learing_rate", "1"], "did you mean 'learning_rate'?"),
        (["--modle.gamma", "1"], "did you mean 'model'?"),
        (["--model.num_experts", "3"], "num_experts=3 is odd"),
        (["--model.num_experts_per_tok=9"], "num_experts_per_tok=9 is more than num_experts=4"),
        (["--model.hidden_size", "33"], "hidden_size=33 is not divisible by num_heads=2"),
        (["--model.gamma", "-1"], "gamma=-1"),
        (["--training.max_steps", "many"], "training.max_steps='many'"),
        (["--data.source", "nothing.txt"], "'nothing.txt' does not exist"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(capsys, tmp_path, corpus, override, sentence):
    assert sentence in refusal(capsys, "train", recipe_file(tmp_path, corpus), *override)
    assert not list(tmp_path.glob("runs/*/*"))


def test_the_same_command_leaves_a_finished_run_alone_and_a_name_starts_another(capsys, tmp_path, corpus):
    train = ["train", str(recipe_file(tmp_path, corpus))]
    assert main(train) == 0
    weights = tmp_path / "runs" / "tiny" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    assert main(train) == 0
    assert "is finished and left as it is: --name NAME starts another run" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert "started with training.seed=0, not 1: give another --name" in refusal(capsys, *train, "--training.seed", "1")
    assert main([*train, "--training.seed", "1", "--name", "other"]) == 0
    assert (tmp_path / "runs" / "other" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_that_is_no_folder_name_is_refused(capsys, name):
    assert "must be a folder name without a slash" in refusal(capsys, "train", "default", "--name", name)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_run_that_a_signal_stops_says_how_to_go_on_and_goes_on(capfd, tmp_path, corpus, signum, code, monkeypatch):
    train = ["train", str(recipe_file(tmp_path, corpus))]
    training_step = MoxETrainer.training_step

    def signal_and_step(*args):
        os.kill(os.getpid(), signum)
        return training_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(MoxETrainer, "training_step", signal_and_step)
        assert main(train) == code
    printed = capfd.readouterr()
    folder = tmp_path / "runs" / "tiny"
    assert printed.err.splitlines()[-1] == (
        f"moxe: stopped by {signum.name}; the same command goes on from {folder / 'checkpoint-1'}"
    )
    assert main(train) == 0
    assert "going on after step 1" in capfd.readouterr().out


def test_verify_resume_says_what_is_the_same_and_what_is_not(capsys, monkeypatch, tmp_path):
    kills = [Kill(step=3, while_saving=False), Kill(step=5, while_saving=True)]
    same = {"model.safetensors": "ab" * 32, "metrics.jsonl": "cd" * 32}
    asked = []

    def verify(recipe, folder, **options):
        asked.append((recipe.training.max_steps, folder, options))
        return Verification(kills, same, {**same, **differences})

    monkeypatch.setattr("moxe.training.verify_resume.verify_resume", verify)
    differences: dict[str, str] = {}
    command = ["verify-resume", "default", "--training.max_steps", "9", "--kills", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    assert asked == [(9, tmp_path, {"kills": 2})]
    out = capsys.readouterr().out
    assert "killed 2 times, 1 of them in the middle of a save" in out
    assert "DIFFERENT" not in out
    differences = {"model.safetensors": "ef" * 32}
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT  model.safetensors" in out
    assert "ef" * 32 in out
    assert "same  metrics.jsonl" in out


def test_verify_resume_needs_an_empty_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not empty: give a new folder" in refusal(capsys, "verify-resume", "default", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_recipe_is_refused_with_the_nearest(capsys):
    assert "did you mean 'default'?" in refusal(capsys, "train", "defualt")


# eval


def test_eval_prints_one_json_object(capsys, trained, corpus):
    result = json.loads(output(capsys, "eval", trained, "--data", corpus, "--json", "--batch-size", "4"))
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= result.keys()
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_limit_takes_the_first_documents(capsys, trained, corpus):
    result = json.loads(output(capsys, "eval", trained, "--data", corpus, "--json", "--limit", "2"))
    assert result["documents"] == 2


def test_eval_in_windows_of_a_length(capsys, trained, corpus):
    command = ("eval", trained, "--data", corpus, "--json")
    windows, whole = (json.loads(output(capsys, *command, *more)) for more in (("--context-length", "8"), ()))
    assert windows["tokens"] == whole["tokens"]
    assert windows["loss"] != whole["loss"]
    sentence = "--context-length is for perplexity"
    assert sentence in refusal(capsys, "eval", trained, "--task", "lambada", "--context-length", "8")


def test_eval_takes_a_folder_and_another_text_field(capsys, trained, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"body": "the old man"}\n', encoding="utf-8")
    result = json.loads(output(capsys, "eval", trained, "--data", folder, "--text-field", "body", "--json"))
    assert result["bytes"] == len("the old man")
    assert "has no field 'text'" in refusal(capsys, "eval", trained, "--data", folder)


def test_an_empty_document_separator_cuts_at_blank_lines(capsys, trained, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("the old man\n\nthe sea\n", encoding="utf-8")
    result = json.loads(output(capsys, "eval", trained, "--data", path, "--document-separator", "", "--json"))
    assert result["documents"] == 2


def test_last_words_print_one_json_object(capsys, trained, last_words):
    result = json.loads(output(capsys, "eval", trained, "--task", "last_word", "--data", last_words, "--json"))
    assert result["last_word_perplexity"] > 1
    assert 0 <= result["last_word_accuracy"] <= 1
    assert result["examples"] == len(SENTENCES)


def test_lambada_is_read_from_the_hub(capsys, trained, monkeypatch):
    asked = {}

    def read_documents(source, **options):
        asked.update(options, source=source)
        return iter(SENTENCES)

    monkeypatch.setattr("moxe.data.sources.read_documents", read_documents)
    result = json.loads(output(capsys, "eval", trained, "--task", "lambada", "--json"))
    assert result["examples"] == len(SENTENCES)
    assert (asked["source"], asked["split"]) == ("EleutherAI/lambada_openai", "test")


def test_a_table_is_plain_text_when_nobody_looks(capsys, trained, corpus):
    lines = output(capsys, "eval", trained, "--data", corpus).splitlines()
    assert lines[0] == f"{trained} on {corpus}"
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names[:4] == ["loss", "perplexity", "bits per byte", "tokens"]
    assert all(line.isascii() for line in lines)


def test_a_table_is_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "─" in output(capsys, "info", "default")


def test_a_number_that_json_cannot_write_is_null(capsys, checkpoint, corpus):
    weights = load_file(checkpoint / "model.safetensors")
    weights = {name: torch.full_like(weight, math.nan) for name, weight in weights.items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    text = output(capsys, "eval", checkpoint, "--data", corpus, "--json", "--limit", "1")
    assert json.loads(text)["loss"] is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9", "no valid UTF-8"),
        ("rows.jsonl", b'{"text": "a b"}\n{"other": 1}\n', "Line 2 of"),
    ],
)
def test_bad_data_is_refused(capsys, trained, tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert sentence in refusal(capsys, "eval", trained, "--data", path)


# Checkpoints


def test_a_missing_checkpoint_folder_is_refused(capsys, corpus):
    assert "there is no checkpoint folder 'nowhere'" in refusal(capsys, "eval", "nowhere", "--data", corpus)
    assert "there is no checkpoint folder 'nowhere'" in refusal(capsys, "generate", "nowhere", "the old")


def test_a_file_is_no_checkpoint(capsys, corpus):
    assert "is a file" in refusal(capsys, "generate", corpus, "the old")


def test_a_folder_without_config_is_refused(capsys, tmp_path):
    assert "holds no config.json" in refusal(capsys, "generate", tmp_path, "the old")
    assert "holds no config.json" in refusal(capsys, "info", tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid"),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not one of: moxe, moxe_xlstm, gemma2, qwen2_moe, llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "moxe", "num_experts": 3}', "num_experts=3 is odd"),
        ('{"model_type": "moxe", "num_expert": 4}', "'num_experts'"),
        ('{"model_type": "moxe", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_config_that_is_of_no_model_of_moxe_is_refused(capsys, checkpoint, content, sentence):
    (checkpoint / "config.json").write_text(content, encoding="utf-8")
    assert sentence in refusal(capsys, "info", checkpoint)
    assert sentence in refusal(capsys, "generate", checkpoint, "the old")


def test_a_folder_without_weights_is_refused(capsys, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights: model.safetensors is missing" in refusal(capsys, "generate", checkpoint, "the old")


def test_damaged_weights_are_refused(capsys, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read" in refusal(capsys, "generate", checkpoint, "the old")


def test_weights_of_another_shape_are_refused(capsys, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 64}), encoding="utf-8")
    sentence = refusal(capsys, "generate", checkpoint, "the old")
    assert "do not fit its config.json" in sentence
    assert "32" in sentence
    assert "64" in sentence


@pytest.mark.parametrize(("layers", "sentence"), [(3, "is missing"), (1, "has no place for")])
def test_weights_of_another_depth_are_refused_not_made_up(capsys, checkpoint, layers, sentence):
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    assert sentence in refusal(capsys, "generate", checkpoint, "the old")


def test_a_checkpoint_without_tokenizer_is_refused(capsys, checkpoint, corpus):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(capsys, "generate", checkpoint, "the old")
    assert "no tokenizer" in refusal(capsys, "eval", checkpoint, "--data", corpus)


def test_a_tokenizer_of_another_model_is_refused(capsys, checkpoint, corpus):
    MoxEForCausalLM(MoxEConfig(vocab_size=100, **SIZES)).save_pretrained(checkpoint)
    capsys.readouterr()
    assert "vocabulary" in refusal(capsys, "generate", checkpoint, "the old")
    assert "vocabulary" in refusal(capsys, "eval", checkpoint, "--data", corpus)


# generate


def test_generate_prints_the_new_text_alone(capsys, trained):
    argv = ["generate", trained, "the old", "--max-new-tokens", "8", "--temperature", "0"]
    text = output(capsys, *argv)
    assert text.endswith("\n")
    assert not text.startswith("the old")
    assert output(capsys, *argv) == text


def test_a_seed_makes_sampling_repeatable(capsys, trained):
    argv = ["generate", trained, "the", "--max-new-tokens", "12", "--top-k", "40", "--top-p", "0.9", "--seed"]
    assert output(capsys, *argv, "1") == output(capsys, *argv, "1") != output(capsys, *argv, "2")


def test_beams(capsys, trained):
    assert output(capsys, "generate", trained, "the", "--num-beams", "2", "--max-new-tokens", "4").strip()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--top-k", "0"], "top_k=0"),
        (["--num-beams", "0"], "num_beams=0"),
        (["--seed", "x"], "'x' is not a whole number from 0 to"),
        (["--seed", str(2**70)], "is not a whole number from 0 to"),
    ],
)
def test_sampling_options_out_of_range_are_refused(capsys, trained, options, sentence):
    assert sentence in refusal(capsys, "generate", trained, "the", *options)


def test_an_empty_prompt_is_refused(capsys, trained):
    assert "prompt is empty" in refusal(capsys, "generate", trained, "")


def test_generate_streams_and_ctrl_c_leaves_no_traceback(trained, tmp_path):
    # Its end of text is a token that the model can not say, so that the text does not end before the signal comes.
    endless = shutil.copytree(trained, tmp_path / "endless")
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<never>"}))
    argv = [*PROGRAM, "generate", str(endless), "the old", "--max-new-tokens", "1000000"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)  # comes long before the million tokens do
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.decode() == "\nmoxe: interrupted\n"


# info


def test_info_of_a_recipe_prints_one_json_object(capsys):
    result = json.loads(output(capsys, "info", "default", "--json"))
    for name in ("total_parameters", "active_parameters", "state_bytes", "flops_per_token"):
        assert isinstance(result[name], int)
    assert sum(result["total_by_part"].values()) == result["total_parameters"]
    assert result["active_parameters"] < result["total_parameters"]


def test_the_table_of_info_adds_up(capsys):
    title, header, *rows, total, state = output(capsys, "info", "default").splitlines()
    assert (title, header.split("  ")[-1]) == ("default", "FLOPs a token")
    numbers = [[int(cell.replace(",", "")) for cell in row.split()[-3:]] for row in (*rows, total)]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]
    assert state.endswith("bytes of state.")


def test_info_takes_overrides_of_a_recipe_but_not_of_a_checkpoint(capsys, trained):
    small = json.loads(output(capsys, "info", "default", "--json", "--model.num_hidden_layers", "1"))
    large = json.loads(output(capsys, "info", "default", "--json", "--model.num_hidden_layers=2"))
    assert small["total_parameters"] < large["total_parameters"]
    assert "cannot be overridden" in refusal(capsys, "info", trained, "--model.gamma", "1")


def test_info_of_what_is_neither_checkpoint_nor_recipe_is_refused(capsys):
    assert "neither a checkpoint folder nor a recipe 'runs/nowhere'" in refusal(capsys, "info", "runs/nowhere")
    assert "did you mean 'default'?" in refusal(capsys, "info", "defualt")


def test_an_override_without_a_value_is_a_user_error():
    with pytest.raises(UserError, match="needs a value"):
        split_overrides(["train", "default", "--training.seed"])

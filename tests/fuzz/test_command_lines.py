"""Command lines of any words: what is wrong is one line on stderr and exit code 2, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moxe.cli import main
from moxe.errors import UserError
from moxe.models.configuration_moxe import MoxEConfig
from moxe.recipe import setting_types

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'moxe'; from moxe.cli import main; sys.exit(main())"]
ROOT = Path(__file__).parent.parent.parent

# Words of the command line, and what stands where a value is expected.
COMMANDS = ["train", "eval", "generate", "info", "plot", "watch", "explore", "doctor", "bench", "tran", "", "-", "--",
    "--help", "--version"]  # fmt: skip
OPTIONS = ["--data", "--text-field", "--document-separator", "--task", "--batch-size", "--limit", "--json",
    "--max-new-tokens",
           "--temperature", "--top-k", "--top-p", "--num-beams", "--seed", "--out", "--repeats", "--quick",
           "--threads", "--compile", "--text", "--prompt", "--tokens", "--corpus",
           "--dat", "--jso", "-h", "--section.key", "--model.", "--.", "--.=", "--a.b", "---", "--=", "-1",
           "--model.gamma"]  # fmt: skip
OVERRIDES = [f"--{section}.{key}" for section in ("model", "data", "training") for key in setting_types(section)]
VALUES = ["1", "0", "-1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 5000, str(2**63), str(2**70), "1_000",
    "\uff11", "\u00b2", "", " ",
          "\0", "a\0b", "\ud800", "\udcff", "\x1b[31m", "a\nb", "x" * 5000, "y/" * 3000, "%s", "%(prog)s", "{}", "[",
          "@file", "null",
          "/dev/null", "/dev/full", "/", ".", "..", "~", "~nobody-of-this-name", "default", "missing.yaml",
          "bad.yaml", "good.yaml",
          "folder", "model", "lambada", "last_word", "training", "decoding", "cpu", "0x10", "1,2",
          "true"]  # fmt: skip
words = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(OPTIONS),
    st.sampled_from(OVERRIDES),
    st.text(st.characters(), max_size=8),
    st.builds("{}={}".format, st.sampled_from(OPTIONS + OVERRIDES), st.sampled_from(VALUES)),
)
command_lines = st.builds(
    lambda command, first, rest: [command, *first, *rest],
    st.sampled_from(COMMANDS),
    st.lists(st.sampled_from(VALUES), max_size=2),
    st.lists(words, max_size=5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "folder").mkdir()
    (folder / "model").mkdir()
    MoxEConfig(hidden_size=16, num_heads=2, num_hidden_layers=1).save_pretrained(folder / "model")
    (folder / "bad.yaml").write_text("training: {seed: 2001-13-45}")
    (folder / "good.yaml").write_text("model: {num_hidden_layers: 1, hidden_size: 16}")
    return folder


@pytest.fixture(autouse=True)
def no_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary working folder, no network, and nothing that takes long behind arguments that are right."""
    import moxe.benchmarks.run
    import moxe.doctor
    import moxe.training.run

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(moxe.training.run, "train", lambda recipe: recipe.run_dir)
    monkeypatch.setattr(moxe.benchmarks.run, "run_benchmarks", _ask_only)
    monkeypatch.setattr(moxe.doctor, "diagnose", list)


def _ask_only(questions: list[str], out: Path, **options: Any) -> bool:
    return True


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(folder)
    code = main(argv)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert names(folder) == before
    if not argv:
        assert (code, captured.err[:6]) == (2, "usage:")
    elif code == 2:
        assert captured.err.startswith("moxe: ")
        assert captured.err.count("\n") == 1
        assert len(captured.err) > len("moxe: \n")
        assert captured.err[:-1].isprintable()
        assert len(captured.err) < 2000
        assert captured.out == ""
    else:
        assert (code, captured.err) == (0, "")


@given(argv=command_lines)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(argv=[])
@example(argv=["info", "~nobody-of-this-name"])
@example(argv=["train", "~nobody-of-this-name/x.yaml"])
@example(argv=["info", "\ud800"])
@example(argv=["info", "\0"])
@example(argv=["info", "x" * 5000])
@example(argv=["info", "\x1b[31m"])
@example(argv=["info", "bad.yaml"])
@example(argv=["info", "default", "--model.vocab_size", str(2**70)])
@example(argv=["info", "default", "--model.num_hidden_layers", "999999999"])
@example(argv=["info", "default", "--model.mlstm_expansion", "1e308"])
@example(argv=["eval", "model", "--data", "x", "--limit", "9" * 5000])
@example(argv=["eval", "model", "--data", "x", "--limit", "\u00b2"])
@example(argv=["generate", "model", "x", "--seed", str(2**70)])
@example(argv=["bench", "--repeats", "9" * 5000])
def test_any_command_line(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]):
    check(argv, folder, capsys)


@given(argv=st.lists(st.text(), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]):
    check(argv, folder, capsys)


@pytest.mark.parametrize(
    "argv", [["eval", "model", "--data", "~nobody-of-this-name"], ["train", "default", "--data.source", ""]]
)
def test_a_path_that_is_none_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]):
    check(argv, folder, capsys)
    assert main(argv) == 2
    # Where the model is loaded first, that may be what fails; the data must not raise anything else either.
    from moxe.data.sources import read_documents

    with pytest.raises(UserError, match="'~nobody-of-this-name' does not exist"):
        read_documents("~nobody-of-this-name", text_field="text", document_separator="")


# What does not fit into memory


def test_what_python_has_no_memory_for_is_one_sentence(capsys, monkeypatch):
    def too_large(args: object) -> None:
        bytearray(2**62)

    monkeypatch.setattr("moxe.cli.info", too_large)
    assert main(["info", "default"]) == 2
    assert capsys.readouterr().err.startswith("moxe: there is not enough memory: choose a smaller batch_size")


@pytest.mark.parametrize("size", [(2**50,), (2**40, 2**40)])
def test_what_torch_has_no_memory_for_is_one_sentence(capsys, monkeypatch, size):
    import torch

    monkeypatch.setattr("moxe.cli.info", lambda args: torch.empty(size))
    assert main(["info", "default"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moxe: there is not enough memory: choose a smaller batch_size")
    assert error.count("\n") == 1


def test_a_gpu_without_memory_is_one_sentence(capsys, monkeypatch):
    import torch

    def out_of_memory(args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nSee documentation")

    monkeypatch.setattr("moxe.cli.info", out_of_memory)
    assert main(["info", "default"]) == 2
    assert "CUDA out of memory. Tried to allocate 8.00 GiB." in capsys.readouterr().err


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    def wrong(args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("moxe.cli.info", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "default"])


# Streams, in a process of their own


def run(*argv: str, **options: Any) -> SimpleNamespace:
    environment = {**os.environ, **options.pop("env", {})}
    command = " ".join(["exec", '"$@"', options.pop("redirection", "")])
    shell = ["sh", "-c", command, "sh", *PROGRAM, *argv]
    done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def test_a_full_disk_is_one_sentence():
    done = run("--version", redirection=">/dev/full")
    assert done.code == 2
    assert done.err == "moxe: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("redirection", [">&-", "<&-", ">&- <&- 2>&-"])
def test_streams_that_are_closed_are_no_error(redirection):
    done = run("--help", redirection=redirection)
    assert (done.code, done.err) == (0, "")
    assert run("nonsense", redirection=redirection).code == 2


def test_what_the_terminal_cannot_show_is_escaped():
    done = run("tr\u00e4in", env={"PYTHONIOENCODING": "ascii:strict"})
    assert done.code == 2
    assert "there is no command 'tr\\xe4in'" in done.err
    assert done.err.count("\n") == 1
    code = "import sys; from moxe.cli import _prepare_streams; _prepare_streams(); print('\\u2500')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert printed.stdout == b"\\u2500\n"

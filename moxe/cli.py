"""The command line: parses, calls the library, prints.

Torch and transformers take seconds to import, so each command imports what it needs itself.
"""

from __future__ import annotations

import argparse
import difflib
import io
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import moxe
from moxe.benchmarks import QUESTIONS
from moxe.data.config import DataConfig
from moxe.errors import Stopped, UserError, printable, shown
from moxe.experiments import MOST_TOKENS, SCALES, TABLES

if TYPE_CHECKING:
    from moxe.doctor import Diagnosis

# How long a thread of torch's CPU pool spins for the next task before it sleeps. The library's own value is some 300
# times longer: alone on the machine that is a few percent faster, beside one busy process several times slower.
THREAD_SPINS = "1000"

# What torch says where Python would raise MemoryError: without memory, on a GPU, for a size beyond 64 bits.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "Storage size calculation overflowed")

# Named here, since the module that finds them takes seconds to import.
RECIPES = """\
recipes: default, fineweb-edu, gemma2-356m, llama-340m, local-text, moxe-340m, qwen2-moe-350m, xlstm-338m"""

LONGEST_SENTENCE = 1000
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 for a failed benchmark, a wrong backend or a resume that is not exact; 2 for bad input; 128 plus the number
        of the signal that stopped it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    _prepare_streams()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        _complain(f"\nmoxe: {stopped}")
        return 128 + stopped.signum
    except KeyboardInterrupt:
        _complain("\nmoxe: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever reads our output, such as `head`, has seen enough
        _discard(sys.stdout)
        return 0
    except (UserError, OSError) as error:
        return _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = next(iter(str(error).splitlines()), "")
        reason = f" ({reason.rpartition('] ')[2]})" if reason else ""
        return _refuse(
            f"there is not enough memory: choose a smaller batch_size, sequence_length or hidden_size{reason}"
        )


def _prepare_streams() -> None:
    """Text that the terminal cannot show is escaped, and a stream that the caller has closed swallows what it gets."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, open to the end
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(sentence: str) -> int:
    """Print one line; what would move the cursor or colour the terminal is escaped."""
    sentence = " ".join(sentence.split())
    if len(sentence) > LONGEST_SENTENCE:
        sentence = f"{sentence[: LONGEST_SENTENCE // 2]} ... {sentence[-LONGEST_SENTENCE // 2 :]}"
    _complain(f"moxe: {printable(sentence)}")
    return EXIT_USER_ERROR


def _complain(text: str) -> None:
    """Print on the standard error output, if anybody is still there to read it."""
    for stream, last_words in ((sys.stderr, f"{text}\n"), (sys.stdout, "")):
        try:
            stream.write(last_words)
            stream.flush()
        except OSError:  # Python would complain once more at its end, and change the exit code
            _discard(stream)


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
    except SystemExit as done:  # argparse has printed a help text or the version
        return int(done.code or 0)
    os.environ.setdefault("GOMP_SPINCOUNT", THREAD_SPINS)  # read once, when torch is loaded
    if args.run is not watch:  # which computes nothing
        moxe.register()
        from moxe.ops.cpu.allocator import keep_freed_memory

        keep_freed_memory()
    return args.run(args) or 0


def train(args: argparse.Namespace) -> None:
    from moxe.recipe import load_recipe
    from moxe.training.run import train as run_training

    names = [("training.name", args.name)] if args.name is not None else []
    run_training(load_recipe(args.recipe, [*args.overrides, *names]))


def watch(args: argparse.Namespace) -> None:
    from rich.console import Console

    from moxe.training.watch import watch_run

    watch_run(args.folder, Console(force_terminal=sys.stdout.isatty()))


def evaluate(args: argparse.Namespace) -> None:
    from moxe.data.tokenizer import load_tokenizer
    from moxe.evaluation.last_word import evaluate_last_word
    from moxe.evaluation.perplexity import evaluate_perplexity
    from moxe.models.checkpoint import load_model

    if (args.task == "lambada") == (args.data is not None):
        raise UserError("say what to evaluate on: --data FILE_OR_FOLDER, or --task lambada, which brings its own data")
    if args.task and args.context_length is not None:
        raise UserError("--context-length is for perplexity: a --task reads each text whole")
    model, tokenizer = load_model(args.checkpoint), load_tokenizer(args.checkpoint)
    result = (evaluate_last_word if args.task else evaluate_perplexity)(
        model,
        itertools.islice(_texts(args), args.limit),
        tokenizer,
        progress=sys.stdout.isatty() and not args.json,
        **_given(args, "batch_size", *(() if args.task else ("context_length",))),
    )
    if args.json:
        print_json(result.to_dict())
    else:
        print_table(f"{args.checkpoint} on {args.data or args.task}", ("", ""), list(result.to_dict().items()))


def analyse(args: argparse.Namespace) -> None:
    from moxe.data.tokenizer import load_tokenizer
    from moxe.experiments.analysis import analyse_routing
    from moxe.files import write_whole
    from moxe.models.checkpoint import load_model
    from moxe.observability.analysis_plots import draw_analysis
    from moxe.observability.reading import tables

    analysis = analyse_routing(
        load_model(args.checkpoint),
        _texts(args),
        load_tokenizer(args.checkpoint),
        progress=sys.stdout.isatty() and not args.json,
        **_given(args, "max_tokens", "context_length", "batch_size", "seed"),
    )
    folder = args.out or Path(os.path.expanduser(args.checkpoint)) / "analysis"
    pictures = draw_analysis(analysis, folder)
    numbers = folder / "analysis.json"
    write_whole(numbers, json.dumps(analysis.to_dict(), indent=1) + "\n")
    if args.json:
        print_json(analysis.to_dict())
        return
    print(f"{analysis.tokens:,} tokens of {args.data}: {analysis.documents:,} documents, {analysis.blocks:,} blocks")
    print(f"loss {analysis.loss:.4f} nats a token; in brackets: 95% intervals\n")
    for table in tables(analysis):
        print_table(table.title, table.header, table.rows)
        print("\n".join(["", *table.readings, ""]))
    print("written: " + ", ".join(map(str, [numbers, *pictures])))


def explore(args: argparse.Namespace) -> None:
    from moxe.data.sources import read_documents
    from moxe.data.tokenizer import load_tokenizer
    from moxe.experiments.exploration import corpus_of_run, explore
    from moxe.models.checkpoint import load_model
    from moxe.observability.explorer.page import write_page

    if len(args.checkpoints) > 2:
        raise UserError(f"{len(args.checkpoints)} checkpoints are too many: a page shows one, or two side by side")
    out = args.out or Path(os.path.expanduser(args.checkpoints[0])) / "explore.html"
    _require_place_for(out)
    text = _text_to_explore(args)
    explorations = []
    for checkpoint in args.checkpoints:
        model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        if args.corpus is not None:
            documents = read_documents(
                args.corpus, text_field=args.text_field, document_separator=args.document_separator
            )
            corpus = {"corpus": documents, "corpus_name": args.corpus}
        else:
            corpus = corpus_of_run(checkpoint)
        exploration = explore(
            model,
            text,
            tokenizer,
            name=checkpoint,
            progress=sys.stdout.isatty(),
            **corpus,
            **_given(args, "max_tokens"),
        )
        explorations.append(exploration)
    write_page(explorations, out, text_name="the prompt" if args.text is None else os.path.basename(args.text))
    for exploration in explorations:
        tokens = len(exploration.pieces)
        loss = f"loss {exploration.losses.mean():.4f} nats a token"
        print(f"{exploration.name}: {tokens:,} token{'s' if tokens > 1 else ''}, {loss}")
        print(f"  rarity and what experts like: from {exploration.corpus_name}")
    print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def plot(args: argparse.Namespace) -> None:
    from moxe.observability.comparison import draw_comparison
    from moxe.observability.plots import draw_run
    from moxe.training.settings import find_run, group_by_setting

    runs = [find_run(run) for run in args.runs]
    if len(runs) > 1:
        settings = group_by_setting(runs)
        cut_short: list[str] = []
        pictures = draw_comparison(settings, args.out or Path("plots"), say=cut_short.append)
        of_settings = [f"{label}: {', '.join(map(str, paths))}" for label, paths in settings.items()]
        print("\n".join(map(printable, [*of_settings, *cut_short])))
    elif runs[0].label is not None:
        raise UserError(f"the label {runs[0].label!r} tells runs apart: give several runs, or leave it out")
    else:
        pictures = draw_run(runs[0].metrics, args.out or runs[0].metrics.parent / "plots")
    print("written: " + ", ".join(map(str, pictures)))


def _text_to_explore(args: argparse.Namespace) -> str:
    from moxe.experiments.exploration import read_text

    if args.text is not None and args.prompt is not None:
        raise UserError("--text and --prompt both say what the model reads: give one of them")
    if args.text is not None:
        return read_text(args.text)
    if args.prompt is not None:
        return args.prompt
    raise UserError("say what the model reads: --text FILE or --prompt TEXT")


def _require_place_for(file: Path) -> None:
    """Refuse a file that cannot be written before the work that fills it."""
    if file.is_dir():
        raise UserError(f"{str(file)!r} is a folder: name a file, such as {str(file / 'explore.html')!r}")
    nearest = next(folder for folder in file.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{str(file)!r} cannot be written: {str(nearest)!r} is no folder that you may write to")


def _texts(args: argparse.Namespace) -> Iterator[str]:
    from moxe.data.sources import read_documents
    from moxe.evaluation.last_word import LAMBADA

    read = partial(read_documents, text_field=args.text_field, document_separator=args.document_separator)
    if args.task == "lambada":
        return read(LAMBADA["source"], subset=LAMBADA["subset"], split=LAMBADA["split"])
    return read(args.data)


def generate(args: argparse.Namespace) -> None:
    from moxe.data.tokenizer import load_tokenizer
    from moxe.evaluation.generation import generate_text
    from moxe.models.checkpoint import load_model

    generate_text(
        load_model(args.checkpoint),
        load_tokenizer(args.checkpoint),
        args.prompt,
        streamer=lambda piece: print(piece, end="", flush=True),
        **_given(args, "max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "seed"),
    )
    print()


def info(args: argparse.Namespace) -> None:
    from moxe.models.accounting import CONTEXT, count_parameters, flops_per_token, state_bytes
    from moxe.models.architectures import architecture_of
    from moxe.models.checkpoint import load_config
    from moxe.recipe import load_recipe

    path = Path(os.path.expanduser(args.model))
    if path.is_dir():
        if args.overrides:
            raise UserError(
                f"the settings of the checkpoint {args.model!r} cannot be overridden: {args.overrides[0][0]}"
            )
        config = load_config(path)
    elif len(path.parts) > 1 and not path.exists():
        raise UserError(f"there is neither a checkpoint folder nor a recipe {args.model!r}")
    else:
        config = load_recipe(args.model, args.overrides).model_config()
    parameters, flops, state = count_parameters(config), flops_per_token(config), state_bytes(config)
    if args.json:
        print_json({**parameters.to_dict(), "state_bytes": state, **flops.to_dict()})
        return
    rows = [
        (part, total, parameters.active_by_part[part], flops.by_part[part].total if part in flops.by_part else 0)
        for part, total in parameters.total_by_part.items()
        if total
    ]
    rows.append(("total", parameters.total_parameters, parameters.active_parameters, flops.flops_per_token))
    print_table(args.model, ("", "parameters", "active a token", "FLOPs a token"), rows)
    if architecture_of(config).is_ours:
        print(f"A sequence of any length holds {state:,} bytes of state.")
    else:
        print(f"A sequence of {CONTEXT} tokens holds {state:,} bytes of keys and values; attention is that at its end.")


def reproduce(args: argparse.Namespace) -> int:
    from moxe.experiments.reproduce import reproduce as run_grid

    finished = run_grid(
        args.table,
        args.scale,
        overrides=args.overrides,
        # A reader of the report has these files elsewhere: of a path its name will do.
        command=shlex.join(["moxe", *(os.path.basename(word) if "/" in word else word for word in args.argv)]),
        **_given(args, "out", "seeds", "jobs", "lambada"),
    )
    return EXIT_FAILED if finished.failed else 0


def bench(args: argparse.Namespace) -> int:
    from moxe.benchmarks.run import run_benchmarks

    if os.environ.get("GOMP_SPINCOUNT") == THREAD_SPINS:
        del os.environ["GOMP_SPINCOUNT"]  # the measuring processes take the library's own value, as the peers would
    answered = run_benchmarks(
        args.questions,
        args.out,
        repeats=args.repeats,
        quick=args.quick,
        threads=args.threads,
        compile_peers=args.compile,
    )
    return 0 if answered else EXIT_FAILED


def doctor(args: argparse.Namespace) -> int:
    from moxe.doctor import diagnose
    from moxe.ops.backend import resolve_backend

    found, automatic = diagnose(), resolve_backend("auto", "cpu")
    if args.json:
        print_json({"auto": automatic, "backends": [asdict(diagnosis) for diagnosis in found]})
    else:
        _print_diagnoses(found, automatic)
    return 0 if all(diagnosis.is_right for diagnosis in found) else EXIT_FAILED


def verify_resume(args: argparse.Namespace) -> int:
    import tempfile

    from moxe.recipe import load_recipe
    from moxe.training.verify_resume import verify_resume as verify

    recipe = load_recipe(args.recipe, args.overrides)
    with tempfile.TemporaryDirectory(prefix="moxe-verify-resume-") as temporary:
        found = verify(recipe, args.out or Path(temporary, "runs"), kills=args.kills, **_given(args, "seed"))
    saving = sum(kill.while_saving for kill in found.kills)
    print(f"\nkilled {len(found.kills)} times, {saving} of them in the middle of a save")
    for name, expected in found.undisturbed.items():
        digest = found.killed.get(name, "missing")
        print(f"{'same' if digest == expected else 'DIFFERENT'}  {name}  SHA-256 {expected}")
        if digest != expected:
            print(f"{'':9}  {'':{len(name)}}  killed  {digest}")
    return 0 if found.is_exact else EXIT_FAILED


def _print_diagnoses(found: Sequence[Diagnosis], automatic: str) -> None:
    print("Largest difference from the backend 'reference' in float64, as a part of the largest value:\n")
    for diagnosis in found:
        verdict = "" if diagnosis.is_right else "  WRONG"
        print(f"backend {diagnosis.backend!r} on {diagnosis.device}{verdict}")
        if diagnosis.unavailable:
            print(f"  not here: {diagnosis.unavailable}")
        for name, error in diagnosis.errors.items():
            print(f"  {name:<17}  {error:.1e}")
    print(f"\nbackend 'auto' is {automatic!r} on the CPU")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own loses a help text that cannot be written and says nothing."""
        (file or sys.stderr).write(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of one command, and as `run` the function that carries it out.

    Raises:
        UserError: a command, option or value that does not exist or fit.
        SystemExit: after printing what `--help` or `--version` asks for.
    """
    arguments, overrides = split_overrides(argv)
    parser, commands = _parsers()
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    name = arguments[0]
    if not name.startswith("-") and name not in commands:
        nearest = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(commands)}"
        raise UserError(f"there is no command {name!r}: {hint}")
    args, unknown = parser.parse_known_args(arguments)
    if "overrides" not in args:
        unknown += [f"--{dotted}" for dotted, _ in overrides]
    if unknown:
        raise UserError(f"moxe {args.command} does not take {unknown[0]!r} (see moxe {args.command} --help)")
    args.overrides, args.argv = overrides, list(argv)
    return args


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--section.key value` and `--section.key=value` out of the arguments, wherever they stand.

    Raises:
        UserError: an override without a value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--":
            rest += [argument, *arguments]
        elif not argument.startswith("--") or "." not in name:
            rest.append(argument)
        else:
            if not equals:
                value = next(arguments, "--")
                if value.startswith("--"):
                    raise UserError(f"--{name} needs a value: --{name} VALUE or --{name}=VALUE")
            overrides.append((name, value))
    return rest, overrides


def _parsers() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="moxe",
        description="Train, evaluate and generate with MoxE, a mixture of xLSTM experts.",
        epilog="""\
examples:
  moxe train default                                    train on text that ships with Python
  moxe train local-text --data.source corpus.txt        train on your own text
  moxe watch runs/default                               losses and routing of a training that is going on
  moxe eval runs/default --data corpus.txt              perplexity and bits a byte
  moxe generate runs/default "The function returns"     go on from a prompt
  moxe info moxe-340m                                   size and cost of a model
  moxe analyse runs/default --data corpus.txt           whether the routing does what the theory says
  moxe plot runs/default                                pictures of a run, or of several on common axes
  moxe doctor                                           which backends are here, and whether they are right
  moxe verify-resume default                            kill a training, go on, compare the weights
  moxe reproduce table1                                 the paper's Table 1 at a scale that a laptop can train
  moxe bench training decoding                          speed and memory on this machine, beside other models

`moxe COMMAND --help` says more about a command.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moxe {moxe.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str, details: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "train",
        train,
        "train a model as a recipe says",
        """\
A recipe is YAML with the sections model, data and training. Any setting can be overridden:
  moxe train default --training.learning_rate 1e-3 --model.num_experts=4

The run writes its weights, tokenizer, metrics and pictures to <training.output_dir>/<name>/. The same command goes on
with a run that was stopped, exactly; a finished run is left alone. Ctrl-C and SIGTERM finish the step and save.""",
    )
    _add_recipe(sub)
    sub.add_argument("--name", metavar="NAME", help="name of the run (default: that of the recipe)")
    _add_overrides(sub)

    sub = command(
        "watch",
        watch,
        "show a training while it goes on",
        """\
Follows the folder of a run from its beginning, while moxe train runs elsewhere: the loss and its terms, speed, the load
of every expert, the difficulty, and warnings of experts that die, with what to try. On a terminal a view that is kept
up to date, otherwise a line for each line of metrics.jsonl. Ends when nobody trains in the folder any more, and says
whether the run is finished or how it goes on. Ctrl-C ends the view, not the training.""",
    )
    sub.add_argument("folder", metavar="RUN", help="folder of a run, such as runs/default")

    sub = command(
        "eval",
        evaluate,
        "measure a model on text",
        """\
Without --task: loss (nats a token), perplexity and bits a byte over all tokens of all documents.
With --task: perplexity and accuracy of the last word of each text, as LAMBADA measures them.""",
    )
    _add_checkpoint(sub)
    _add_text(sub, required=False)
    sub.add_argument(
        "--task",
        choices=("last_word", "lambada"),
        help="last_word: the last words of the texts of --data; lambada: those of the LAMBADA set on the hub",
    )
    sub.add_argument(
        "--context-length",
        type=_whole_number(1),
        metavar="N",
        help="without --task: windows of N tokens (default: whole documents, which a recurrent model alone can read)",
    )
    sub.add_argument("--batch-size", type=_whole_number(1), metavar="N", help="texts a forward pass, for speed only")
    sub.add_argument("--limit", type=_whole_number(1), metavar="N", help="only the first N texts")
    _add_json(sub)

    sub = command("generate", generate, "write on from a prompt, as the model goes")
    _add_checkpoint(sub)
    sub.add_argument("prompt", metavar="PROMPT", help="the text to go on from")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="length of the new text in tokens (default: 100)")
    sub.add_argument("--temperature", type=float, metavar="T", help="0: always the most probable token (default: 1)")
    sub.add_argument("--top-k", type=int, metavar="K", help="sample among the K most probable tokens")
    sub.add_argument("--top-p", type=float, metavar="P", help="sample among the fewest tokens that have probability P")
    sub.add_argument("--num-beams", type=int, metavar="N", help="beam search with N beams; prints at the end")
    sub.add_argument("--seed", type=_whole_number(0), metavar="N", help="makes sampling repeatable")

    sub = command("info", info, "say how large a model is and what a token costs")
    sub.add_argument("model", metavar="CHECKPOINT|RECIPE", help="folder of a trained model, or a recipe as for train")
    _add_overrides(sub)
    _add_json(sub)

    sub = command(
        "analyse",
        analyse,
        "see whether the routing of a model does what the theory says",
        """\
By layer: how the odds of group M follow the difficulty, beside 2 gamma; what the difficulty goes with; whether rare
tokens go to mLSTM experts; the load. Writes analysis.json and pictures; docs/analysis.md explains every number.""",
    )
    _add_checkpoint(sub)
    _add_text(sub, required=True)
    sub.add_argument(
        "--tokens", dest="max_tokens", type=_whole_number(1), metavar="N", help="tokens to analyse (default: 20000)"
    )
    sub.add_argument(
        "--context-length",
        type=_whole_number(1),
        metavar="N",
        help="tokens after which the model begins anew, as in training (default: only with a new document)",
    )
    sub.add_argument("--batch-size", type=_whole_number(1), metavar="N", help="texts a forward pass, for speed only")
    sub.add_argument("--seed", type=_whole_number(0), metavar="N", help="of the resampling behind the intervals")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: CHECKPOINT/analysis)")
    _add_json(sub)
    sub.set_defaults(task=None)

    sub = command(
        "explore",
        explore,
        "see where the tokens of a text go, and why: one HTML page",
        """\
The page shows the text shaded by difficulty, loss, entropy or group; the load; what each expert likes and how far back
it remembers; and the odds beside the theory. It opens without a network. Two checkpoints stand side by side:
  moxe explore runs/default runs/no-group --text my_text.txt --out page.html
docs/explore.md reads a page.""",
    )
    sub.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="one or two folders of trained MoxE models")
    sub.add_argument("--text", metavar="FILE", help="UTF-8 text that the model reads")
    sub.add_argument("--prompt", metavar="TEXT", help="the same, given here")
    sub.add_argument(
        "--tokens",
        dest="max_tokens",
        type=_whole_number(1, MOST_TOKENS),
        metavar="N",
        help=f"take the first N tokens (default: all; a text of more than {MOST_TOKENS:,} is refused)",
    )
    sub.add_argument(
        "--corpus",
        metavar="FILE_OR_FOLDER",
        help="text that says how rare a token is and what an expert likes: .txt, .jsonl or .parquet (default: the "
        "built-in corpus if the run was trained on it, else the text itself)",
    )
    _add_text_format(sub)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the page (default: CHECKPOINT/explore.html)")

    sub = command(
        "plot",
        plot,
        "draw the pictures of one or several training runs",
        """\
Reads metrics.jsonl alone, also of a run that goes on or was killed, and writes each picture as PNG and SVG: losses,
utilisation of the experts, routing, gradients, tokens a second. Several runs share their axes:
  moxe plot runs/full-0 runs/full-1 runs/no-group-0 runs/no-group-1
  moxe plot full=runs/a full=runs/b "no group loss=runs/c" --out figures

Runs with the same label are one line, their mean, in a band from the least to the greatest of them, over the steps that
all of them have. Without labels so are runs whose recipe.yaml differs in the seed alone; names, paths and how often a
run validates and saves do not count.""",
    )
    sub.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN", help="folder of a run, such as runs/default, or a metrics.jsonl"
    )
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the files (default: RUN/plots; for several runs: plots)"
    )

    sub = command(
        "doctor",
        doctor,
        "say which backends this machine has and check each",
        """\
Runs both cells and a small model, outputs and gradients, in float64 on every backend that is here, and prints how far
they lie from the reference. The backend cpu is compiled first if it has not been.""",
    )
    _add_json(sub)

    sub = command(
        "verify-resume",
        verify_resume,
        "kill a training at random points and see whether it ends the same",
        """\
Trains the recipe twice: once undisturbed, once killed with SIGKILL at random points, half of them in the middle of a
save, and started again by the same command each time. Compares what both leave by SHA-256. A short run will do:
  moxe verify-resume default --training.max_steps 60 --training.save_steps 10""",
    )
    _add_recipe(sub)
    sub.add_argument("--kills", type=_whole_number(1), default=3, metavar="N", help="kills (default: %(default)s)")
    sub.add_argument("--seed", type=_whole_number(0), metavar="N", help="of the random points (default: 0)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="keep both runs in this folder (default: remove them)")
    _add_overrides(sub)

    sub = command(
        "reproduce",
        reproduce,
        "train every model of a table of the paper, with several seeds, and report",
        """\
tables:
"""
        + "\n".join(f"  {name:<8}{content}" for name, content in TABLES.items())
        + """

Writes results.json, Markdown tables and report.html. Runs that are done are not repeated, and the same command goes on
with a grid that was stopped. Settings of data and training hold for every run:
  moxe reproduce table1 --scale small --jobs 2 --data.source train.txt --data.validation_source val.txt""",
    )
    sub.add_argument("table", metavar="TABLE", help=", ".join(TABLES))
    sub.add_argument(
        "--scale", default="tiny", metavar="SCALE", help=f"{', '.join(SCALES)} (default: %(default)s, a smoke run)"
    )
    sub.add_argument("--seeds", type=_whole_number(1), metavar="N", help="runs of each row (default: the scale's)")
    sub.add_argument("--jobs", type=_whole_number(1), metavar="N", help="runs at a time (default: one a core)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: results/SCALE)")
    sub.add_argument(
        "--lambada",
        metavar="FILE",
        help='.jsonl of {"text": ...} rows whose last words are scored, or none (default: LAMBADA from the hub)',
    )
    _add_overrides(sub)

    sub = command(
        "bench",
        bench,
        "measure speed and memory on this machine",
        "questions:\n" + "\n".join(f"  {name:<10}{question}" for name, question in QUESTIONS.items()),
    )
    sub.add_argument("questions", nargs="*", metavar="QUESTION", help="what to measure (default: everything)")
    sub.add_argument(
        "--out", type=Path, default=Path("bench-results"), metavar="DIR", help="folder for figures and pictures"
    )
    sub.add_argument("--repeats", type=_whole_number(1), metavar="N", help="timed calls of each side")
    sub.add_argument("--quick", action="store_true", help="tiny sizes, only to see that everything runs")
    sub.add_argument("--threads", type=_whole_number(1), metavar="N", help="threads (default: as torch chooses)")
    sub.add_argument("--compile", action="store_true", help="let the transformers models try torch.compile too")
    return parser, commands.choices


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from the list below, or the path of a YAML file")
    parser.epilog = f"{parser.epilog}\n\n{RECIPES}"  # the lines of an argument's help may break inside a name


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a trained model, such as runs/default")


def _add_text(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--data", required=required, metavar="FILE_OR_FOLDER", help="text to read: .txt, .jsonl or .parquet"
    )
    _add_text_format(parser)


def _add_text_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-field",
        default=DataConfig.text_field,
        metavar="NAME",
        help="field (.jsonl) or column (.parquet) that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--document-separator",
        default=DataConfig.document_separator,
        metavar="LINE",
        help="line that ends a document of a .txt file (default: %(default)s)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    # `split_overrides` has taken them out before; this line is for the help text.
    parser.add_argument(
        "--section.key", dest="overrides", metavar="VALUE", default=[], help="override a setting of the recipe"
    )


def _whole_number(lowest: int, highest: int = 2**63 - 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or len(text) > len(str(highest)) or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {lowest} to {highest}")
        return int(text)

    return convert


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given; the library has the defaults of the others."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object; JSON has no infinity and no NaN, so both become null."""
    print(json.dumps(_finite(result), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A title and names with their numbers: drawn on a terminal, aligned plain text elsewhere."""
    cells = [[str(row[0]).replace("_", " "), *map(_readable, row[1:])] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left", show_header=any(header))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in cells:
            table.add_row(*row)
        Console().print(table)
        return
    lines = [list(header), *cells] if any(header) else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for line in lines:
        name, *numbers = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *numbers]))


def _readable(number: float | str) -> str:
    if isinstance(number, str):
        return number
    return f"{number:,}" if isinstance(number, int) else f"{number:,.4f}"

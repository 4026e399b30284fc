"""One question in a process of its own: `python -m moxe.benchmarks.worker QUESTION --out FILE`.

A fresh process has an allocator, a thread pool and caches that no other question has used, and what one question does
to a machine's memory ends with it.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch

from moxe.benchmarks import QUESTIONS
from moxe.benchmarks.report import CheckFailed, Report
from moxe.benchmarks.training import SETTINGS


def answer(
    question: str,
    *,
    repeats: int,
    quick: bool,
    setting: str | None = None,
    compile_peers: bool = False,
) -> Report:
    """Measures one question; a check that fails makes a report without figures."""
    module = importlib.import_module(f"moxe.benchmarks.{question}")
    sizes = module.QUICK if quick else module.FULL
    options = {"setting": setting, "compile_peers": compile_peers} if setting else {}
    try:
        return module.measure(sizes, repeats=repeats, **options)
    except CheckFailed as failure:
        return Report(question, module.TITLE, failed=str(failure))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("question", choices=tuple(QUESTIONS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true", dest="compile_peers")
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    if threads := args.pop("threads"):
        torch.set_num_threads(threads)
    report = answer(args.pop("question"), **args)
    out.write_text(json.dumps(report.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Times tokenising: on the threads of the tokenizers library, and in one and more processes.

    python benchmarks/tokenisation.py text.txt [tokenizer.json] [--processes 1 2] [--repeats 5]

All ways take turns in the same run, on text that is in memory, and must give the same tokens to the last byte. What
counts is the ratio of medians: the machine may be shared.
"""

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

import moxe.data.workers as workers
from moxe.data.encoding import Encoding, document_hash
from moxe.data.sources import read_documents
from moxe.data.tokenizer import load_tokenizer, train_tokenizer
from moxe.data.tokens import encoding_of, text_batches

THREADS = "threads of the library"
# Documents whose copies are looked for, as a held-out part is.
HELD_OUT = 100


def encode(texts: list[str], encoding: Encoding, num_workers: int, *, in_workers: bool) -> tuple[float, str, int]:
    """Seconds, a hash of all tokens and lengths, and the number of tokens."""
    batches = text_batches((text, 0) for text in texts)
    start = time.perf_counter()
    encoded = workers.encode_in_workers if in_workers else workers.encode_batches
    results = [tokens_and_lengths for _, tokens_and_lengths in encoded(batches, encoding, num_workers)]
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for tokens, lengths in results:
        digest.update(tokens.tobytes())
        digest.update(lengths.tobytes())
    return seconds, digest.hexdigest(), sum(len(tokens) for tokens, _ in results)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", nargs="?", help="a tokenizer.json; without one, one of 4,096 tokens is trained")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)

    texts = list(read_documents(str(args.text), text_field="text", document_separator="<|endoftext|>"))
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(texts, 4096)
    encoding = encoding_of(tokenizer, map(document_hash, texts[:HELD_OUT]))
    ways = {THREADS: (1, False), **{f"{count} process{'es' * (count > 1)}": (count, True) for count in args.processes}}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    digests = set()
    num_tokens = 0
    for _ in range(args.repeats):
        for way, (num_workers, in_workers) in ways.items():
            took, digest, num_tokens = encode(texts, encoding, num_workers, in_workers=in_workers)
            seconds[way].append(took)
            digests.add(digest)
    if len(digests) > 1:
        raise SystemExit("the tokens differ")

    title = f"{num_tokens:,} tokens, {len(texts):,} documents, {workers.own_cores()} of {os.cpu_count()} cores"
    table = Table(title=f"{title}; the same tokens every time")
    for column in ("", "seconds, median", "lowest", "highest", "tokens a second", "times as fast as threads"):
        table.add_column(column, justify="right" if column else "left")
    base = statistics.median(seconds[THREADS])
    for way, took in seconds.items():
        median = statistics.median(took)
        figures = (median, min(took), max(took))
        table.add_row(
            way, *(f"{value:.2f}" for value in figures), f"{num_tokens / median:,.0f}", f"{base / median:.2f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""How large the page of `moxe explore` is, how fast it opens in a browser, and how fast it answers.

    python benchmarks/page.py CHECKPOINT TEXT [--repeats N]

The first 2,000 and 20,000 tokens of TEXT, or as many as it has. Times are medians (least to greatest) of N openings in
a headless chromium, each to the second frame after what was done. Every opening checks that the page shows every token
and that the key has moved the focus.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from moxe.data.tokenizer import load_tokenizer
from moxe.experiments.exploration import explore, read_text
from moxe.models.checkpoint import load_model
from moxe.observability.explorer.page import write_page

LENGTHS = (2_000, 20_000)
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no chromium to open the page with")
    model, tokenizer, text = load_model(args.checkpoint), load_tokenizer(args.checkpoint), read_text(args.text)
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        for length in LENGTHS:
            start = time.perf_counter()
            exploration = explore(model, text, tokenizer, name=args.checkpoint, max_tokens=length)
            seconds = time.perf_counter() - start
            page = Path(folder, f"{length}.html")
            write_page([exploration], page, text_name=args.text)
            tokens = len(exploration.pieces)
            print(f"{tokens:,} tokens: read in {seconds:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
            openings = [answers(browser, page, tokens) for _ in range(args.repeats)]
            for what in openings[0]:
                times = [opening[what] for opening in openings]
                print(f"  {what:<22} {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
        browser.close()


def answers(browser: Browser, page: Path, tokens: int) -> dict[str, float]:
    """Seconds of one opening of the page, and of what a reader does then."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})

    def timed(act: Callable[[], Any]) -> float:
        start = time.perf_counter()
        act()
        tab.evaluate(TWO_FRAMES)
        return time.perf_counter() - start

    seconds = {"opening": timed(lambda: tab.goto(page.as_uri()))}
    assert tab.locator("[data-token]").count() == tokens
    tab.locator('[data-token="0"]').focus()
    seconds["an arrow key"] = timed(lambda: tab.keyboard.press("ArrowRight"))
    assert tab.evaluate("document.activeElement.dataset.token") == "1"
    seconds["another measure"] = timed(lambda: tab.select_option("#measure", "loss"))
    seconds["lighting up an expert"] = timed(lambda: tab.locator('svg [role="button"]').first.click())
    tab.close()
    return seconds


if __name__ == "__main__":
    main()

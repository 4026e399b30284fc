"""Draws explore.png: the page of `moxe explore` for a trained run over a document that was held out of its training.

    make train
    python docs/images/draw_page.py runs/default

Needs chromium, and playwright, which comes with `pip install -e '.[test]'`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from moxe.data.corpus import prepare
from moxe.recipe import load_recipe

PICTURE = Path(__file__).with_name("explore.png")
SIZE = {"width": 1280, "height": 740}
SHOWN = 1215  # of the page, from its top
LENGTH = range(2_500, 6_000)  # of the document, in characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run that is finished")
    run = parser.parse_args().run
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no chromium to draw the page with: install it (Debian's package is called chromium)")
    recipe = load_recipe(f"{run}/recipe.yaml")
    texts = prepare(recipe.data, seed=recipe.training.seed).validation_texts
    with tempfile.TemporaryDirectory() as folder:
        text, page = Path(folder, "held-out.txt"), Path(folder, "page.html")
        text.write_text(next(text for text in texts if len(text) in LENGTH), encoding="utf-8")
        subprocess.run(["moxe", "explore", run, "--text", text, "--out", page], check=True)
        draw(page, chromium)
    print(f"written: {PICTURE}")


def draw(page: Path, chromium: str) -> None:
    """The page with an expert and one of its tokens chosen."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(page.as_uri())
        tab.locator("#layer").select_option("1")
        tab.locator('svg [role="button"]').nth(9).click()
        tab.locator(".text .lit").nth(12).click()
        tab.evaluate("scrollTo(0, 0)")
        clip = {"x": 0, "y": 0, "width": SIZE["width"], "height": SHOWN}
        tab.screenshot(path=PICTURE, full_page=True, clip=clip)
        browser.close()


if __name__ == "__main__":
    main()

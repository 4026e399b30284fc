"""A tiny model, what it made of a text, and the page of it in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moxe.data.tokenizer import train_tokenizer
from moxe.experiments.exploration import explore
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.observability.explorer.exploration import Exploration
from moxe.observability.explorer.page import write_page
from tests.browser import Visit, launched, visit, why_unavailable
from tests.models.tiny import tiny_model
from tests.sentences import SENTENCES

CORPUS = [" ".join(SENTENCES[number % 4][number % 7 :] for number in range(20))] * 3
# Lines of unequal length, spaces at an end and in a row, characters of several tokens, and what HTML gives a meaning.
TEXT = (
    "\n".join(SENTENCES)
    + '  \n\n\tthe "old" <b>man</b> & the sea &amp; \N{EURO SIGN}5 \N{GRINNING FACE} '
    + " ".join(SENTENCES)
    + "\n"
)


@dataclass(frozen=True)
class Made:
    """A page and what it was made of."""

    model: MoxEForCausalLM
    tokenizer: PreTrainedTokenizerFast
    exploration: Exploration
    path: Path


Open = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=290)


@pytest.fixture(scope="session")
def explored(tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[MoxEForCausalLM, Exploration]]:
    """Makes a model with some settings, which reads TEXT."""

    def make(name: str = "tiny", text: str = TEXT, **settings: Any) -> tuple[MoxEForCausalLM, Exploration]:
        model = tiny_model(**{"vocab_size": 300, "num_hidden_layers": 3, **settings})
        return model, explore(model, text, tokenizer, name=name, corpus=CORPUS, corpus_name="a corpus")

    return make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, explored, tokenizer: PreTrainedTokenizerFast) -> Made:
    model, exploration = explored()
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page([exploration], path, text_name="a text")
    return Made(model, tokenizer, exploration, path)


@pytest.fixture(scope="session")
def made_pair(tmp_path_factory: pytest.TempPathFactory, explored) -> tuple[list[Exploration], Path]:
    """Two models that differ in much: the routers, the layers, the experts, what these remember."""
    explorations = [
        explored("first")[1],
        explored("second", num_hidden_layers=2, num_experts=6, router_kind="standard", expert_kind="ffn")[1],
    ]
    path = tmp_path_factory.mktemp("pair") / "pair.html"
    write_page(explorations, path, text_name="a text")
    return explorations, path


@pytest.fixture(scope="module")
def visiting() -> Iterator[Open]:
    """Opens a page in the browser, as `tests.browser.visit` does."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with launched() as browser:
        yield partial(visit, browser)

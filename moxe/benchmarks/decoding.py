"""What does a generated token cost as the context grows, and how large is what the model carries?

Legend: B rows, S tokens, H key-value heads, Dh head size.

One row, one token at a time: the forward pass that `generate` calls for each. A peer's key-value cache is filled with
random keys and values of the wanted length, which take as long to read as true ones. Our state has one size and one
cost at every position, so it comes from a short prompt; that this is so is measured too, once, behind a long context
that was really read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2ForCausalLM, Qwen2MoeForCausalLM

from moxe.benchmarks import peers
from moxe.benchmarks.checks import FLOAT64_BOUND, relative_error, require, tiny_ids, tiny_model
from moxe.benchmarks.peers import LABELS, OURS
from moxe.benchmarks.report import Figure, Report, number, spread
from moxe.benchmarks.timing import Samples, time_in_turn
from moxe.models.cache import MoxECache
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

TITLE = "Decoding: one token at a time, batch 1"
COLUMNS = ["context", "model", "weights", "ms a token (range)", "MoxE's speed / its", "cache or state, MB"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("qwen", "gemma")

Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        model: settings of our configuration; the peers are sized after it.
        contexts: tokens in front of the timed ones, rising.
        longest_of_peers: the longest context in which the peers are timed.
        prompt: tokens that our state has really read.
        really_read: length of the context that our model reads once in full, or None.
        chunk: tokens read in one call on the way there.
        tokens_a_sample: tokens whose mean is one sample.
    """

    model: dict[str, Any]
    contexts: tuple[int, ...]
    longest_of_peers: int
    prompt: int
    really_read: int | None
    chunk: int = 1024
    tokens_a_sample: int = 8
    seconds_a_side: float = 20.0


FULL = Sizes(
    model={"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4},
    contexts=(256, 2048, 8192, 32768, 65536),
    longest_of_peers=32768,
    prompt=256,
    really_read=65536,
)
QUICK = Sizes(
    model={"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1},
    contexts=(64, 512, 1024),
    longest_of_peers=512,
    prompt=16,
    really_read=None,
    tokens_a_sample=2,
    seconds_a_side=1.0,
)


@torch.inference_mode()
def measure(sizes: Sizes, *, repeats: int) -> Report:
    """Times every side at every context, all sides of a context in turn."""
    report = Report("decoding", TITLE, COLUMNS, check=_check())
    config = MoxEConfig(**sizes.model)
    models = {(side, weights): _model(side, config, weights) for side in (OURS, *PEERS) for weights in DTYPES}
    costs: dict[tuple[str, str], dict[int, float]] = {key: {} for key in models}
    for context in sizes.contexts:
        carried: dict[tuple[str, str], MoxECache | DynamicCache] = {}
        for key, model in models.items():
            if key[0] == OURS:
                carried[key] = _read(model, sizes.prompt, sizes.chunk)
            elif context <= sizes.longest_of_peers:
                carried[key] = _filled_cache(model, context)
        bytes_carried = {key: carried_bytes(cache) for key, cache in carried.items()}
        samples = _time(models, carried, sizes, repeats)
        for (side, weights), own in samples.items():
            costs[side, weights][context] = own.median
            ratio = own.median / samples[OURS, weights].median
            _add_side(report, context, side, weights, own, bytes_carried[side, weights], ratio)
    if sizes.really_read is not None:
        _add_really_read(report, models, sizes, repeats)
    _add_crossings(report, costs, sizes)
    return report


def _model(side: str, config: MoxEConfig, weights: str) -> Any:
    torch.manual_seed(0)
    if side == OURS:
        model: Any = MoxEForCausalLM(config)
    elif side == "qwen":
        model = Qwen2MoeForCausalLM(peers.qwen_config(config))
    else:
        model = Gemma2ForCausalLM(peers.gemma_config(config))
    return model.to(DTYPES[weights]).eval()


def _read(model: MoxEForCausalLM, tokens: int, chunk: int) -> MoxECache:
    """Our state behind random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = MoxECache(1)
    for part in ids.split(chunk, dim=1):
        model(part, cache_params=cache, use_cache=True, logits_to_keep=1)
    return cache


def _filled_cache(model: Any, context: int) -> DynamicCache:
    """Random keys and values of `context` tokens; a sliding layer keeps its window of them."""
    config = model.config
    cache = DynamicCache(config=config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, context, size)
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def carried_bytes(cache: MoxECache | DynamicCache) -> int:
    """Bytes of everything a model carries from token to token."""
    if isinstance(cache, MoxECache):
        return cache.memory_bytes()
    tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(model: Any, cache: MoxECache | DynamicCache, tokens: int) -> Step:
    """Some tokens one behind the other; each takes the most probable one after the last."""
    name = "cache_params" if isinstance(cache, MoxECache) else "past_key_values"
    token = torch.zeros(1, 1, dtype=torch.int64)

    def decode() -> None:
        nonlocal token
        for _ in range(tokens):
            logits: Tensor = model(token, use_cache=True, logits_to_keep=1, **{name: cache}).logits
            token = logits[:, -1:].argmax(-1)

    return decode


def _time(
    models: dict[tuple[str, str], Any],
    carried: Mapping[tuple[str, str], MoxECache | DynamicCache],
    sizes: Sizes,
    repeats: int,
) -> dict[tuple[str, str], Samples]:
    """Seconds a token of every side that has something carried."""
    steps = {" ".join(key): _step(models[key], cache, sizes.tokens_a_sample) for key, cache in carried.items()}
    samples = time_in_turn(steps, repeats=repeats, seconds_a_side=sizes.seconds_a_side)
    return {
        key: Samples(tuple(seconds / sizes.tokens_a_sample for seconds in own.seconds))
        for key, own in zip(carried, samples.values(), strict=True)
    }


def _add_side(
    report: Report, context: int, side: str, weights: str, own: Samples, size: int, ratio: float, *, read: str = ""
) -> None:
    label = LABELS[side] + read
    times = spread([1e3 * seconds for seconds in own.seconds])
    report.add_row(f"{context:,}", label, weights, times, "" if side == OURS else f"{ratio:.2f}", number(size / 1e6))
    about = {"context": context, "weights": weights, "really_read": bool(read)}
    report.add_timing(LABELS[side], own, **about, ours_over_this=ratio)
    report.figures.append(Figure(LABELS[side], "carried bytes", (float(size),), about))


def _add_really_read(report: Report, models: dict[tuple[str, str], Any], sizes: Sizes, repeats: int) -> None:
    assert sizes.really_read is not None
    ours = {key: model for key, model in models.items() if key[0] == OURS}
    carried = {key: _read(model, sizes.really_read, sizes.chunk) for key, model in ours.items()}
    for (side, weights), own in _time(ours, carried, sizes, repeats).items():
        size = carried_bytes(carried[side, weights])
        _add_side(report, sizes.really_read, side, weights, own, size, 1.0, read=" (read in full)")


def _add_crossings(report: Report, costs: dict[tuple[str, str], dict[int, float]], sizes: Sizes) -> None:
    for weights in DTYPES:
        for peer in PEERS:
            where = crossing(costs[OURS, weights], costs[peer, weights])
            if where is None:
                said = f"is not slower than MoxE up to {sizes.longest_of_peers:,} tokens"
            elif where <= min(sizes.contexts):
                said = f"is slower than MoxE from {min(sizes.contexts):,} tokens on, the shortest context measured"
            else:
                said = f"becomes slower than MoxE at about {number(where)} tokens"
            report.notes.append(f"{weights}: {LABELS[peer]} {said}")


def crossing(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The context from which on theirs costs more than ours, on straight lines over the logarithm of the context.

    None when ours costs more at the longest context that both have.
    """
    contexts = sorted(ours.keys() & theirs.keys())
    behind = {context: theirs[context] - ours[context] for context in contexts}
    if behind[contexts[-1]] <= 0:
        return None
    for shorter, longer in reversed(list(pairwise(contexts))):
        if behind[shorter] <= 0:
            part = -behind[shorter] / (behind[longer] - behind[shorter])
            return math.exp(math.log(shorter) + part * (math.log(longer) - math.log(shorter)))
    return float(contexts[0])


def _check() -> str:
    model, ids = tiny_model("auto").eval(), tiny_ids(1, 40)
    full = model(ids, use_cache=False).logits
    cache = MoxECache(1)
    steps = [model(token, cache_params=cache, use_cache=True).logits for token in ids.split(1, dim=1)]
    error = relative_error(torch.cat(steps, dim=1), full)
    return require("logits token by token in float64 against the whole text at once", error, FLOAT64_BOUND)

"""How much of its memory an expert keeps: against the paper's cells token by token, and plain loops over all pairs."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moxe.errors import UserError
from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.models.modeling_xlstm import XLSTMForCausalLM
from moxe.observability.memory import (
    MAX_CHANNELS,
    MAX_TOKENS,
    ExpertMemory,
    ForgetGates,
    MemoryRecording,
    expert_memory,
    memory_of_experts,
    reaches,
    record_memory,
)
from tests.models.tiny import TINY, tiny_model, token_ids
from tests.modules.comparison import assert_equal
from tests.modules.paper import kinds_of, mlstm_forget_gates, slstm_forget_gates, weights_of

TOKENS, HEADS = 23, TINY["num_heads"]
every_kind = pytest.mark.parametrize("kind", ["xlstm", "mlstm", "slstm"])


def read(model: MoxEForCausalLM, ids: Tensor, *lengths: int) -> tuple[MemoryRecording, list[Tensor]]:
    """The recording of one text read in parts of these lengths, and the experts of its tokens in each layer."""
    chosen, state = [], None
    with torch.no_grad(), record_memory(model) as recording:
        for part in ids.split(lengths, dim=1):
            output = model(part, cache_params=state, use_cache=True, output_router_logits=True)
            state = output.cache_params
            chosen.append([layer.expert_indices[0] for layer in output.routing])
    return recording, [torch.cat(parts) for parts in zip(*chosen, strict=True)]


def gates_of(recording: MemoryRecording, layer: int, expert: int) -> ForgetGates:
    gates = recording.layers[layer][expert]
    assert gates is not None
    return gates


def reach_by_double_loop(
    log_forget: list[list[float]], positions: list[int]
) -> tuple[list[list[int]], list[list[bool]]]:
    """Of every token and channel: how far the earliest token is of which one half is left, and if it is the first."""
    reach, censored = [], []
    for j in range(len(positions)):
        kept = [
            [i for i in range(j + 1) if math.prod(math.exp(log_forget[t][c]) for t in range(i + 1, j + 1)) >= 0.5]
            for c in range(len(log_forget[0]))
        ]
        reach.append([positions[j] - positions[min(of_channel)] for of_channel in kept])
        censored.append([min(of_channel) == 0 for of_channel in kept])
    return reach, censored


def quantile_by_loop(reach: list[float], censored: list[bool], q: float) -> float | None:
    """Kaplan and Meier: the share S that reaches further falls by (1 - ended / at risk) at each r."""
    surviving = 1.0
    for r in sorted(set(reach)):
        at_risk = sum(other >= r for other in reach)
        ended = sum(other == r and not open_ for other, open_ in zip(reach, censored, strict=True))
        surviving *= 1 - ended / at_risk
        if 1 - surviving >= q - 1e-9:
            return r
    return None


def constant(f: float, tokens: int, channels: int = 2, every: int = 1) -> ExpertMemory:
    return expert_memory(torch.full((tokens, channels), f).log(), every * torch.arange(tokens), f)


@every_kind
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_recorded_gates_are_those_of_the_papers_cells_over_an_experts_own_tokens(kind: str, backend: str):
    model = tiny_model(expert_kind=kind, backend=backend)
    inputs: list[Tensor] = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in model.model.layers
    ]
    recording, chosen = read(model, token_ids(1, TOKENS), TOKENS)
    for hook in hooks:
        hook.remove()
    for layer, (h, indices) in enumerate(zip(inputs, chosen, strict=True)):
        experts = model.model.layers[layer].get_submodule("experts")
        for expert, (name, place) in enumerate(kinds_of(kind, TINY["num_experts"])):
            own, weights = h[(indices == expert).any(-1)], weights_of(experts.get_submodule(name), place)
            assert len(own) > 1, "the text is too short to test anything"
            of_cell = {"mlstm": mlstm_forget_gates, "slstm": slstm_forget_gates}[name]
            expected = of_cell(own, weights, HEADS).flatten(1).detach()
            gates = gates_of(recording, layer, expert)
            assert_equal(gates.log_forget, expected.float())
            assert gates.mean == pytest.approx(float(expected.exp().mean()))


@every_kind
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("lengths", [(1, 22), (2, 2, 19), (9, 7, 7)])
def test_reading_in_parts_gives_the_memory_of_reading_at_once(kind: str, backend: str, lengths: tuple[int, ...]):
    model, ids = tiny_model(expert_kind=kind, backend=backend), token_ids(1, TOKENS)
    whole, chosen = read(model, ids, TOKENS)
    parts, chosen_in_parts = read(model, ids, *lengths)
    for layer in range(TINY["num_hidden_layers"]):
        assert torch.equal(chosen[layer], chosen_in_parts[layer])
        for expert in range(TINY["num_experts"]):
            assert_equal(gates_of(parts, layer, expert).log_forget, gates_of(whole, layer, expert).log_forget)
            assert gates_of(parts, layer, expert).mean == pytest.approx(gates_of(whole, layer, expert).mean)
            places = (chosen[layer] == expert).any(-1).nonzero().flatten()
            of_parts = expert_memory(gates_of(parts, layer, expert).log_forget, places, None)
            assert of_parts == expert_memory(gates_of(whole, layer, expert).log_forget, places, None)
            assert of_parts.tokens == len(places) > 1


def test_a_last_token_alone_is_recorded_where_it_takes_no_step():
    ids = token_ids(1, TOKENS)
    whole, _ = read(tiny_model(backend="torch"), ids, TOKENS)
    rest, _ = read(tiny_model(backend="torch"), ids, TOKENS - 1, 1)
    assert_equal(gates_of(rest, 1, 0).log_forget, gates_of(whole, 1, 0).log_forget)


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_last_token_that_would_pass_unseen_is_refused(backend: str):
    model = tiny_model(backend=backend)
    with pytest.raises(ValueError, match="at least two tokens"):
        read(model, token_ids(1, TOKENS), TOKENS - 1, 1)
    with torch.no_grad():  # and the model is as before
        state = model(token_ids(1, 3), use_cache=True).cache_params
        model(token_ids(1, 1), cache_params=state, use_cache=True)


def test_a_recording_is_of_one_text_from_its_beginning_to_its_end():
    model, ids = tiny_model(), token_ids(2, 6)
    with record_memory(model), pytest.raises(ValueError, match="the call has 2"):
        model(ids)
    with record_memory(model), pytest.raises(ValueError, match="the call has 2"):
        model(ids[:1], document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    with record_memory(model):
        model(ids[:1])
        with pytest.raises(ValueError, match="cache_params"):
            model(ids[:1])


def test_masked_columns_are_no_tokens():
    model, ids = tiny_model(), token_ids(1, TOKENS)
    whole, chosen = read(model, ids, TOKENS)
    padded = torch.cat([ids, ids[:, :4]], dim=1)
    mask = (torch.arange(TOKENS + 4) < TOKENS).long()[None]
    with torch.no_grad(), record_memory(model) as recording:
        routing = model(padded, attention_mask=mask, output_router_logits=True).routing
    memories = memory_of_experts(recording, [layer.expert_indices[0] for layer in routing])
    assert memories == memory_of_experts(whole, chosen)


def hooks_of(model: MoxEForCausalLM) -> list[Any]:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_recording_changes_no_output_and_leaves_no_hook_behind():
    model, ids = tiny_model(), token_ids(1, TOKENS)
    expected = model(ids).logits
    with record_memory(model):
        assert hooks_of(model)
        assert torch.equal(model(ids).logits, expected)
    assert not hooks_of(model)
    with pytest.raises(KeyError), record_memory(model):
        raise KeyError
    assert not hooks_of(model)


@pytest.mark.parametrize(
    "settings", [{"expert_memory": "token"}, {"expert_kind": "ffn"}, {"expert_kind": "ffn", "expert_memory": "token"}]
)
def test_experts_without_a_memory_have_none(settings: dict[str, str]):
    recording, chosen = read(tiny_model(**settings), token_ids(1, TOKENS), TOKENS)
    nothing = [[None] * TINY["num_experts"]] * TINY["num_hidden_layers"]
    assert recording.layers == nothing
    assert memory_of_experts(recording, chosen) == nothing


def test_a_model_without_experts_is_refused():
    model = XLSTMForCausalLM(XLSTMConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_heads=2))
    with pytest.raises(UserError, match="XLSTMForCausalLM has no experts"), record_memory(model):
        pass


def test_an_expert_without_tokens_and_one_with_a_single_token():
    recording, chosen = read(tiny_model(), token_ids(1, 1), 1)
    assert chosen[0].shape == (1, 2)
    for expert, memory in enumerate(memory_of_experts(recording, chosen)[0]):
        mean = gates_of(recording, 0, expert).mean
        assert (mean is not None) == (expert in chosen[0])
        assert memory == ExpertMemory(int(expert in chosen[0]), mean, [None] * 3, 0)
    assert expert_memory(torch.empty(0, 3), torch.empty(0).long(), None) == ExpertMemory(0, None, [None] * 3, 0)
    assert expert_memory(torch.zeros(1, 3), torch.tensor([7]), 0.5) == ExpertMemory(1, 0.5, [None] * 3, 0)


def test_each_expert_is_read_with_its_own_places_in_the_text():
    recording, chosen = read(tiny_model(), token_ids(1, TOKENS), TOKENS)
    for layer, memories in enumerate(memory_of_experts(recording, chosen)):
        for expert, memory in enumerate(memories):
            places = torch.tensor([t for t in range(TOKENS) if expert in chosen[layer][t].tolist()])
            gates = gates_of(recording, layer, expert)
            assert memory == expert_memory(gates.log_forget, places, gates.mean)


def test_routing_of_another_text_is_refused():
    recording, chosen = read(tiny_model(), token_ids(1, TOKENS), TOKENS)
    with pytest.raises(ValueError, match="tokens but positions of"):
        memory_of_experts(recording, [indices[:-1] for indices in chosen])


def test_of_a_wide_memory_evenly_spaced_channels_are_kept_and_the_mean_is_over_all():
    log_forget = torch.rand(5, 2, 3 * MAX_CHANNELS).log()
    gates = ForgetGates()
    gates.add(log_forget[:2])
    gates.add(log_forget[2:])
    kept = gates.log_forget
    assert kept.shape == (5, MAX_CHANNELS)
    assert gates.mean == pytest.approx(float(log_forget.exp().mean()))
    places = [log_forget.flatten(1)[0].tolist().index(value) for value in kept[0].tolist()]
    assert (places[0], places[-1]) == (0, 6 * MAX_CHANNELS - 1)
    assert set(torch.tensor(places).diff().tolist()) == {6, 7}
    assert torch.equal(kept, log_forget.flatten(1)[:, places])


@pytest.mark.parametrize("every", [1, 5])
def test_a_constant_gate_reaches_as_many_tokens_as_halve_it(every: int):
    """0.9^6 > 1/2 > 0.9^7; the tokens of the expert stand `every` tokens apart."""
    assert constant(0.9, 400, every=every) == ExpertMemory(400, 0.9, [6.0 * every] * 3, 6 * every)


def test_a_memory_that_forgets_nothing_reaches_beyond_every_text():
    assert constant(1.0, 300) == ExpertMemory(300, 1.0, [None] * 3, 299)


def test_the_bound_is_what_was_seen_and_not_how_long_the_text_is():
    """A memory that forgets nothing for 101 tokens, and from then on all at every token."""
    log_forget = torch.zeros(200, 1)
    log_forget[101:] = -math.inf
    memory = expert_memory(log_forget, torch.arange(200), 0.5)
    assert (memory.reach_quantiles[0], memory.reach_quantiles[2], memory.reach_bound) == (0.0, None, 100)


@pytest.mark.parametrize("log_forget", [-math.inf, -1e30, -0.7])
def test_a_memory_that_forgets_at_once_reaches_nothing(log_forget: float):
    memory = expert_memory(torch.full((300, 2), log_forget), torch.arange(300), 0.0)
    assert memory == ExpertMemory(300, 0.0, [0.0] * 3, 0)


def test_one_shut_gate_hides_nothing_of_what_comes_after_it():
    """In float32, or without a bound, a sum behind -1e30 would have no digits left for gates of 0.9."""
    log_forget = torch.full((40, 1), 0.9).log()
    log_forget[10] = -1e30
    reach, censored = reaches(log_forget, torch.arange(40))
    assert reach.flatten().tolist() == [*range(7), 6, 6, 6, *range(7), *[6] * 23]
    assert censored.flatten().tolist() == [True] * 7 + [False] * 33


def test_gates_behind_a_long_text_keep_their_digits():
    """Sums of some 60,000 nats: in float32 they would be multiples of 2^-8, and the reach off by several tokens."""
    log_forget = torch.full((53_000, 1), -1.2)
    log_forget[50_000:] = -math.log(2) / 1000.5
    reach, _ = reaches(log_forget, torch.arange(53_000))
    assert reach[-9:].unique().tolist() == [1000]


def test_a_quantile_is_the_smallest_reach_that_has_its_share_and_not_the_next():
    """Two of twenty reach no further than themselves, but in floating point 1 - 18 / 20 is less than 0.1."""
    log_forget = torch.zeros(10, 2)
    log_forget[5] = -math.inf
    reach, censored = reaches(log_forget, torch.arange(10))
    assert reach[:, 0].tolist() == [*range(5), *range(5)]
    assert int((~censored & (reach == 0)).sum()) == 2
    assert expert_memory(log_forget, torch.arange(10), None).reach_quantiles[0] == 0


gates_and_gaps = st.lists(st.tuples(st.floats(-3, 0), st.floats(-0.2, 0), st.integers(1, 9)), min_size=1, max_size=20)


@given(gates_and_gaps)
def test_reaches_and_their_quantiles_are_those_of_plain_loops(tokens: list[tuple[float, float, int]]):
    log_forget = [[first - 1e-3, second - 1e-3] for first, second, _ in tokens]
    positions = torch.tensor([gap for *_, gap in tokens]).cumsum(0)
    of_loop, censored_of_loop = reach_by_double_loop(log_forget, positions.tolist())
    reach, censored = reaches(torch.tensor(log_forget, dtype=torch.float64), positions)
    assert reach.tolist() == of_loop
    assert censored.tolist() == censored_of_loop
    memory = expert_memory(torch.tensor(log_forget, dtype=torch.float64), positions, None)
    flat, flat_censored = list(chain(*of_loop)), list(chain(*censored_of_loop))
    assert memory.reach_quantiles == [quantile_by_loop(flat, flat_censored, q) for q in (0.1, 0.5, 0.9)]


def test_of_many_tokens_evenly_spaced_ones_are_looked_back_from():
    tokens = 2 * MAX_TOKENS
    log_forget = torch.full((tokens, 1), 0.9).log()
    log_forget[-1] = -10
    reach, censored = reaches(log_forget, torch.arange(tokens))
    assert reach.shape == censored.shape == (MAX_TOKENS, 1)
    assert (int(reach[0]), bool(censored[0])) == (0, True)
    assert (int(reach[-1]), bool(censored[-1])) == (0, False)
    assert set(reach[4:-1].flatten().tolist()) == {6}

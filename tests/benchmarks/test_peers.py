"""The sides of the comparison are of one size, and train."""

from __future__ import annotations

import math

import pytest
import torch

from moxe.benchmarks import peers
from moxe.benchmarks.training import FULL, QUICK, training_step
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM

CONFIG = QUICK.config


def needs(side: str) -> None:
    if side in peers.OFFICIAL:
        pytest.importorskip("xlstm", reason="the official package is not installed")


def parameters(side: str, config: MoxEConfig) -> int:
    with torch.device("meta"):
        return peers.non_embedding_parameters(peers.build(side, config, 16, peers.plain_setting(side)).model)


@pytest.mark.parametrize("side", [side for side in peers.LABELS if side != peers.OURS])
@pytest.mark.parametrize("config", [QUICK.config, FULL.config], ids=["quick", "full"])
def test_every_peer_has_our_number_of_parameters(side: str, config: MoxEConfig):
    needs(side)
    ours = parameters(peers.OURS, config)
    assert abs(parameters(side, config) / ours - 1) < peers.PARAMETER_TOLERANCE


def test_token_embedding_and_head_are_not_counted():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2}
    small, large = (MoxEForCausalLM(MoxEConfig(vocab_size=v, **sizes)) for v in (10, 1000))
    counted = peers.non_embedding_parameters(small)
    assert counted == peers.non_embedding_parameters(large)
    assert counted == sum(p.numel() for p in small.parameters()) - 2 * 10 * 32


@pytest.mark.parametrize("side", tuple(peers.LABELS))
def test_every_side_starts_at_the_loss_of_a_guess_and_learns_its_batch(side: str):
    needs(side)
    setting = peers.plain_setting(side)
    trainee = peers.build(side, CONFIG, 16, setting)
    step = training_step(trainee, setting, 2, 16, CONFIG.vocab_size)
    losses = [step() for _ in range(5)]
    assert losses[0] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    assert losses[-1] < losses[0]


def test_a_side_that_needs_the_official_package_is_unavailable_without_it(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    assert [side for side in peers.LABELS if not peers.is_available(side)] == list(peers.OFFICIAL)


def test_settings_say_what_a_side_ran_in():
    assert peers.plain_setting("qwen").name == "fp32, eager"
    assert peers.plain_setting("moxe").name == "fp32"
    assert [setting.name for setting in peers.best_settings("moxe", compiled=True)] == ["fp32 medium", "bf16"]
    assert "bf16, grouped_mm, compiled" in [setting.name for setting in peers.best_settings("qwen", compiled=True)]


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="side='gpt' is not one of: moxe, released, xlstm, qwen, gemma"):
        peers.build("gpt", CONFIG, 16, peers.Setting())

"""What `import moxe` gives: the public names, and a model that transformers' Auto classes know."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import moxe

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def test_the_public_names_are_those_of_the_readme():
    moxe_names = {"MoxEConfig", "MoxEModel", "MoxEForCausalLM"}
    assert set(moxe.__all__) == {*moxe_names, "XLSTMConfig", "XLSTMModel", "XLSTMForCausalLM", "__version__"}
    assert all(hasattr(moxe, name) for name in moxe.__all__)


def test_the_auto_classes_load_what_save_pretrained_wrote(tmp_path: Path):
    torch.manual_seed(0)
    model = moxe.MoxEForCausalLM(moxe.MoxEConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is moxe.MoxEConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is moxe.MoxEModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is moxe.MoxEForCausalLM
    input_ids = torch.arange(8)[None]
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded.eval()(input_ids).logits, model(input_ids).logits)


def test_loading_twice_changes_nothing():
    before = moxe.MoxEModel
    moxe.register()
    assert moxe.MoxEModel is before

"""A dense xLSTM language model: token embedding, sLSTM and mLSTM blocks, final norm, language-model head.

Legend: B rows, S columns, N real tokens (packed), D hidden size, V vocabulary.

It is what MoxE is without routers and experts, and everything around the blocks is that of MoxE: packed documents,
padding, the recurrent state, generation.
"""

from __future__ import annotations

from torch import Tensor, nn

from moxe.models.cache import Continuation, MoxECache
from moxe.models.configuration_xlstm import XLSTMConfig
from moxe.models.modeling_moxe import MoxEForCausalLM, MoxEModel, make_mlstm, make_slstm, mix, step_mixer
from moxe.models.packed import PackedTokens
from moxe.modules.router import RouterOutput


class XLSTMBlock(nn.Module):
    """One block of the model; its module is called `slstm` or `mlstm`, after its kind."""

    def __init__(self, config: XLSTMConfig, block: int) -> None:
        super().__init__()
        self.kind = config.block_kind(block)
        self.add_module(self.kind, make_slstm(config, block, 1) if self.kind == "slstm" else make_mlstm(config, 1))
        self.names_in_cache = (f"layers.{block}.{self.kind}",)

    def forward(
        self, x: Tensor, tokens: PackedTokens, cache: MoxECache | None, at: Continuation | None
    ) -> tuple[Tensor, None]:
        """x [N, D] -> y [N, D], and no routing; without `at`, by a step in place on the cache."""
        mixer, (name,) = getattr(self, self.kind), self.names_in_cache
        if at is None:
            assert cache is not None
            return step_mixer(mixer, name, x, x, cache), None
        return x + mix(mixer, name, x, tokens.sequences, cache, at), None


class XLSTMModel(MoxEModel):
    """The blocks without a language-model head."""

    config_class = XLSTMConfig
    _no_split_modules = ["XLSTMBlock"]  # noqa: RUF012

    def _make_layer(self, config: XLSTMConfig, layer: int) -> XLSTMBlock:
        return XLSTMBlock(config, layer)


class XLSTMForCausalLM(MoxEForCausalLM):
    """An xLSTM language model; `forward` and `generate` are those of MoxE, and its loss is the cross-entropy.

    Example:
        >>> model = XLSTMForCausalLM(XLSTMConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=2))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """

    config_class = XLSTMConfig
    model_class = XLSTMModel
    _no_split_modules = ["XLSTMBlock"]  # noqa: RUF012
    loss_terms = ("loss", "lm_loss")

    def _losses(
        self,
        hidden: Tensor,
        targets: Tensor,
        routing: tuple[RouterOutput, ...],
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Tensor]:
        lm_loss, _, _ = self._lm_loss(hidden, targets, num_items_in_batch)
        return {"loss": lm_loss, "lm_loss": lm_loss}

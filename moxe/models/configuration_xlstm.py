"""Configuration of a dense xLSTM language model, made of the blocks of MoxE.

Every default of the model is written here and nowhere else.
"""

from __future__ import annotations

from moxe.models.configuration_moxe import RecurrentConfig


class XLSTMConfig(RecurrentConfig):
    """Sizes of an xLSTM language model: groups of one sLSTM block and then `mlstm_per_slstm` mLSTM blocks.

    Args:
        vocab_size: number of tokens V.
        hidden_size: width D of the residual stream; divisible by `num_heads`.
        num_hidden_layers: blocks, of both kinds together; the last group may be cut short.
        num_heads: heads H of every cell.
        mlstm_per_slstm: mLSTM blocks that follow each sLSTM block: 5 for xLSTM[5:1].
        conv_kernel_size: taps of the causal depthwise convolution.
        qkv_block_size: block size of the block-diagonal q, k, v projections of the mLSTM block.
        mlstm_expansion: inner width of the mLSTM block as a multiple of D.
        slstm_ffn_expansion: width of the sLSTM block's gated feed-forward part as a multiple of D.
        norm_eps: epsilon of every normalisation.
        tie_word_embeddings: share the embedding with the language-model head.
        backend: implementation of the two cells: `auto`, `reference`, `torch`,
            `cpu` (C++, compiled on first use).
        use_cache: whether a forward pass without labels returns its recurrent state by default.

    Raises:
        ValueError: for an unknown name, a size out of range or sizes that do not divide, naming the value.
    """

    model_type = "moxe_xlstm"
    # Beside the logits; what transformers' Trainer leaves out of its predictions.
    keys_to_ignore_at_inference = ["cache_params", "lm_loss"]  # noqa: RUF012

    vocab_size: int = 49152
    hidden_size: int = 1024
    num_hidden_layers: int = 36
    num_heads: int = 8
    mlstm_per_slstm: int = 5
    conv_kernel_size: int = 4
    qkv_block_size: int = 16
    mlstm_expansion: float = 2.0
    slstm_ffn_expansion: float = 1.7
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    backend: str = "auto"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def num_residual_blocks(self) -> int:
        """Blocks that add to the residual stream, one behind the other."""
        return self.num_hidden_layers

    def block_kind(self, block: int) -> str:
        """`slstm` or `mlstm`, for the blocks 0, 1, 2, ..."""
        return "mlstm" if block % (self.mlstm_per_slstm + 1) else "slstm"

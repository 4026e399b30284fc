"""Gemma 2, Qwen1.5-MoE and Llama of transformers, trained on the same packed rows as MoxE.

Legend: B rows, S columns, N real tokens (packed), D hidden size, E experts, V vocabulary.

Each class is that of transformers under its own name, so a saved model is an ordinary checkpoint of it. What is added
is the call that training makes: documents of a row do not see each other, a column that the attention mask leaves out
is no token at all, and the targets are those that MoxE is scored on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func
from transformers.utils.generic import ModelOutput, can_return_tuple

from moxe.models.packed import PackedTokens, check_vocabulary, next_labels, pack_tokens
from moxe.ops.cross_entropy import IGNORED, linear_cross_entropy


@dataclass
class BaselineOutput(ModelOutput):
    """Output of a call with labels or documents.

    `loss` is `lm_loss`, a mean over targets, plus in a mixture of experts `router_aux_loss_coef` times the load
    balancing loss of transformers. `load_balancing_loss` is that loss over the experts a token, so that uniform routing
    gives 1 as in MoxE; other values do not compare with MoxE's. MoxE takes the loss of each layer and their mean, while
    transformers pools counts and probabilities over all layers before it multiplies them, so that layers which favour
    different experts cancel. `logits` are left out when training with labels. There are no statistics of the routing.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    routing: tuple[Any, ...] | None = None


class _PackedCausalLM:
    """Goes before a causal language model of transformers; a call with neither labels nor documents is that model's."""

    config: Any
    model: Any
    lm_head: Any
    generation_config: Any
    training: bool
    # The Trainer then leaves the division by the number of targets of the whole batch to `forward`.
    accepts_loss_kwargs = True
    # The loss and its terms, by their names in the output.
    loss_terms: tuple[str, ...] = ("loss", "lm_loss")

    def __init__(self, config: Any) -> None:
        # transformers sets the embedding of the padding token to 0 and never trains it. Here the attention mask tells
        # padding from tokens, and a tokenizer may pad with its end-of-text token, which has to be learned.
        pad_token_id, config.pad_token_id = config.pad_token_id, None
        super().__init__(config)  # pyright: ignore[reportCallIssue], the class behind this one takes it
        config.pad_token_id = self.generation_config.pad_token_id = pad_token_id

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers, each weight under its name in the model: the experts of a layer are one tensor.

        The format of earlier releases, which has a tensor for each expert, is `save_original_format=True`.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Next-token logits, and with labels the loss.

        Args:
            input_ids: [B, S] token ids.
            attention_mask: [B, S]; a column with 0 is no token at all, for the attention, the router and every loss.
            labels: [B, S], usually `input_ids`; the shift by one is done here. -100 is ignored. No target crosses a
                document or a padding column.
            document_ids: [B, S] whole numbers >= 0; where they change along a row a document begins, which sees nothing
                before it and whose positions begin at 0.
            output_router_logits: for a call with neither labels nor documents.
            logits_to_keep: n for the logits of the last n columns only; 0 for all, or for none when training with
                labels.
            num_items_in_batch: targets of the whole (accumulated) batch. The language-model loss is then their sum over
                this number, and the router's loss is weighted by this call's share of the targets.
            position_ids, past_key_values, inputs_embeds, use_cache, kwargs: as the class of transformers takes them,
                for a call with neither labels nor documents; its output is that class's too.

        Raises:
            ValueError: in a call with labels or documents, for token ids or labels outside the vocabulary, shapes that
                do not agree, and position_ids, inputs_embeds or past_key_values.
        """
        if labels is None and document_ids is None:
            if output_router_logits is not None:
                kwargs["output_router_logits"] = output_router_logits
            return super().forward(  # pyright: ignore[reportAttributeAccessIssue], it is that of the class behind
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        for name, other in (
            ("position_ids", position_ids),
            ("inputs_embeds", inputs_embeds),
            ("past_key_values", past_key_values),
        ):
            if other is not None:
                raise ValueError(f"a call with labels or document_ids takes no {name}")
        if input_ids is None:
            raise ValueError("a call with labels or document_ids needs input_ids")
        tokens = pack_tokens(input_ids, attention_mask, document_ids, labels)
        check_vocabulary("token id", tokens.pack(input_ids), self.config.vocab_size)
        hidden, router_logits = self._run(tokens, tokens.pack(input_ids))
        losses: dict[str, Any] = {}
        if labels is not None:
            targets = next_labels(tokens.pack(labels), tokens.sequences)
            check_vocabulary("label", targets[targets != IGNORED], self.config.vocab_size)
            losses = self._losses(hidden, targets, router_logits, num_items_in_batch)
        logits = None
        if logits_to_keep:
            logits = self._logits(tokens.unpack(hidden)[:, -logits_to_keep:])
        elif labels is None or not self.training:
            logits = tokens.unpack(self._logits(hidden))
        return BaselineOutput(logits=logits, **losses)

    def _run(self, tokens: PackedTokens, input_ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states [N, D] and each router's logits [N, E] for the packed ids [N].

        transformers sees rows whose real tokens stand at their left. From positions that begin anew, without a mask and
        a cache, it finds the sequences; each column behind a row's last token is one of its own.
        """
        position = _positions(tokens).to(input_ids.device)
        place = None if tokens.column is None else _places_at_the_left(tokens.column, tokens.shape)
        if place is None:
            rows = [values.view(tokens.shape) for values in (input_ids, position)]
        else:
            empty = input_ids.new_zeros(tokens.shape[0] * tokens.shape[1])
            rows = [empty.index_copy(0, place, values).view(tokens.shape) for values in (input_ids, position)]
        output = self.model(input_ids=rows[0], position_ids=rows[1], use_cache=False, **self._router_options())
        router_logits = tuple(getattr(output, "router_logits", None) or ())
        packed = [x.flatten(0, -2) for x in (output.last_hidden_state, *router_logits)]
        if place is not None:
            packed = [x.index_select(0, place) for x in packed]
        return packed[0], tuple(packed[1:])

    def _router_options(self) -> dict[str, bool]:
        return {}

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed over the targets [N] of the hidden states [N, D]."""
        return linear_cross_entropy(hidden, self.lm_head.weight, targets)

    def _losses(
        self,
        hidden: Tensor,
        targets: Tensor,
        router_logits: tuple[Tensor, ...],
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """The loss and its terms. Without any target the language-model loss is 0."""
        num_targets = int((targets != IGNORED).sum())
        total = num_targets if num_items_in_batch is None else float(num_items_in_batch)
        lm_loss = self._cross_entropy(hidden, targets) / max(total, 1)
        if not router_logits:
            return {"loss": lm_loss, "lm_loss": lm_loss}
        chosen = self.config.num_experts_per_tok
        # The annotation there is that of a single layer.
        layers: Any = router_logits
        load_balancing = load_balancing_loss_func(layers, self.config.num_experts, chosen)
        assert isinstance(load_balancing, Tensor)
        share = 1.0 if num_items_in_batch is None else num_targets / max(total, 1)
        return {
            "loss": lm_loss + share * self.config.router_aux_loss_coef * load_balancing,
            "lm_loss": lm_loss,
            "load_balancing_loss": load_balancing / chosen,
        }


class LlamaForCausalLM(_PackedCausalLM, transformers.LlamaForCausalLM):
    """Llama."""


class Gemma2ForCausalLM(_PackedCausalLM, transformers.Gemma2ForCausalLM):
    """Gemma 2, whose logits are capped: c tanh(logits / c)."""

    def _logits(self, hidden: Tensor) -> Tensor:
        logits, cap = self.lm_head(hidden), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.config.final_logit_softcapping is None:
            return super()._cross_entropy(hidden, targets)
        counts = (targets != IGNORED).nonzero().flatten()
        logits = self._logits(hidden[counts])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets[counts], reduction="sum")


class Qwen2MoeForCausalLM(_PackedCausalLM, transformers.Qwen2MoeForCausalLM):
    """Qwen1.5-MoE, whose loss always holds that of the routers."""

    loss_terms = ("loss", "lm_loss", "load_balancing_loss")

    def _router_options(self) -> dict[str, bool]:
        return {"output_router_logits": True}


def _positions(tokens: PackedTokens) -> Tensor:
    """[N] the place of each token in its sequence, on the host."""
    begin = tokens.cu_seqlens[:-1]
    return torch.arange(int(tokens.cu_seqlens[-1])) - begin.repeat_interleave(tokens.cu_seqlens.diff())


def _places_at_the_left(column: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N] places in the flattened [B * S] of the tokens at `column`, when nothing stands between those of a row."""
    row = column // shape[1]
    length = row.bincount(minlength=shape[0])
    before = length.cumsum(0) - length
    return row * shape[1] + torch.arange(len(row), device=row.device) - before[row]

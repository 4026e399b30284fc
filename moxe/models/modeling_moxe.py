"""The MoxE model: token embedding, N MoxE layers, final norm, language-model head.

Legend: B rows, S columns, N real tokens (packed), D hidden size, E experts, K experts a token, V vocabulary.

The columns that the attention mask leaves out are dropped before the first layer and put back after the last: inside
the model every tensor is packed [N, D], and `Segments` says which tokens form a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from moxe.models.cache import Continuation, MoxECache
from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.packed import PackedTokens, check_vocabulary, next_labels, pack_tokens
from moxe.modules.experts import Experts, ReadState, WriteState
from moxe.modules.feed_forward import FeedForwardBlocks
from moxe.modules.losses import RouterLosses, hardness_of, router_losses
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.router import Router, RouterOutput
from moxe.modules.slstm import SLSTMBlocks
from moxe.modules.stacks import small_init_std
from moxe.ops.backend import core_dtype, resolve_backend
from moxe.ops.cross_entropy import IGNORED, linear_cross_entropies
from moxe.ops.grouped_linear import FEW_ROWS, grouped_linear
from moxe.ops.routing import ExpertRows
from moxe.ops.segments import Segments

_MIXERS = ("slstm_mixer", "mlstm_mixer")


@dataclass
class MoxEModelOutput(ModelOutput):
    """Output of the model without a head; `routing` holds one `RouterOutput` a layer over the packed tokens."""

    last_hidden_state: Tensor | None = None
    cache_params: MoxECache | None = None
    routing: tuple[RouterOutput, ...] | None = None


@dataclass
class MoxECausalLMOutput(ModelOutput):
    """Output of the language model.

    `loss` is equation 21. The other losses are its terms before their coefficients: `lm_loss` a mean over targets, the
    router losses means over real tokens and layers. `logits` are left out when training with labels. `routing` (only
    if asked for) holds one `RouterOutput` a layer over [B, S]; columns that are masked out hold 0, and -1 as expert
    index.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MoxECache | None = None
    lm_loss: Tensor | None = None
    difficulty_loss: Tensor | None = None
    group_loss: Tensor | None = None
    z_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    routing: tuple[RouterOutput, ...] | None = None


class MoxELayer(nn.Module):
    """Sequence mixer (an sLSTM block, then an mLSTM block), router, experts, and the shared expert if there is one."""

    def __init__(self, config: MoxEConfig, layer: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        first_block = config.num_residual_blocks // config.num_hidden_layers * layer
        self.slstm_mixer = make_slstm(config, first_block, 1)
        self.mlstm_mixer = make_mlstm(config, 1)
        self.router = Router(
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            router_kind=config.router_kind,
            bias_kind=config.bias_kind,
            gamma=config.gamma,
            difficulty_threshold=config.difficulty_threshold,
            router_bias=config.router_bias,
            load_balancing=config.load_balancing,
        )
        make_block = {
            "mlstm": partial(make_mlstm, config, ffn_size=config.mlstm_ffn_size),
            "slstm": partial(make_slstm, config, first_block + 2),
            "ffn": partial(_make_ffn, config, config.ffn_residual),
        }
        self.experts = Experts(
            num_experts=config.num_experts,
            expert_kind=config.expert_kind,
            expert_memory=config.expert_memory,
            make_block=make_block,
            backend=config.backend,
            residual=config.ffn_residual,
        )
        kinds = self.experts.ranges if self.experts.keeps_state else ()
        self.shared_expert = None
        if config.shared_expert != "none":
            # A whole block, with its norm also where the routed feed-forward experts have none.
            make_shared = {**make_block, "ffn": partial(_make_ffn, config, True)}[config.shared_expert]
            self.shared_expert = make_shared(1)
        whole = (*_MIXERS, *(("shared_expert",) if config.shared_expert in ("mlstm", "slstm") else ()))
        self.names_of_whole_blocks = {name: f"layers.{layer}.{name}" for name in whole}
        self.names_of_experts = {kind: f"layers.{layer}.experts.{kind}" for kind in kinds}
        self.names_in_cache = (*self.names_of_whole_blocks.values(), *self.names_of_experts.values())

    def forward(
        self, x: Tensor, tokens: PackedTokens, cache: MoxECache | None, at: Continuation | None
    ) -> tuple[Tensor, RouterOutput]:
        """x [N, D] -> y [N, D] and what the router decided; without `at`, by a step in place on the cache."""
        if at is None:
            assert cache is not None
            return self.step(x, tokens, cache)
        for name in _MIXERS:
            x = x + mix(getattr(self, name), self.names_of_whole_blocks[name], x, tokens.sequences, cache, at)
        routing = self.router(x)
        read, write = self._expert_state(cache, at)
        y = self.experts(x, routing.expert_indices, routing.expert_weights, tokens.sequences, read, write)
        if isinstance(self.shared_expert, FeedForwardBlocks):
            y = y + self.shared_expert(x, tokens.sequences, None, False)[0]
        elif self.shared_expert is not None:
            y = y + mix(self.shared_expert, self.names_of_whole_blocks["shared_expert"], x, tokens.sequences, cache, at)
        return y, routing

    def step(self, x: Tensor, tokens: PackedTokens, cache: MoxECache) -> tuple[Tensor, RouterOutput]:
        """`forward` in C++ for one token of each row of a cache that `is_ready`; x is float32 or float64."""
        for name in _MIXERS:
            x = step_mixer(getattr(self, name), self.names_of_whole_blocks[name], x, x, cache)
        routing = self.router(x)
        chosen = routing.expert_indices, routing.expert_weights
        h = x.to(self.router.weight.dtype)
        if self.experts.keeps_state:
            states = {kind: cache.states[block] for kind, block in self.names_of_experts.items()}
            y = self.experts.step(x, *chosen, states)
        else:
            y = self.experts(h, *chosen, tokens.sequences, lambda kind, rows: None, None).to(x.dtype)
        if isinstance(self.shared_expert, FeedForwardBlocks):
            y += self.shared_expert(h, tokens.sequences, None, False)[0]
        elif self.shared_expert is not None:
            y = step_mixer(self.shared_expert, self.names_of_whole_blocks["shared_expert"], x, y, cache)
        return y, routing

    def _expert_state(self, cache: MoxECache | None, at: Continuation) -> tuple[ReadState, WriteState | None]:
        if cache is None:
            return lambda kind, rows: None, None

        def read(kind: str, rows: ExpertRows) -> dict[str, Tensor] | None:
            return cache.read(self.names_of_experts[kind], at, rows.sequence, rows.expert)

        def write(kind: str, rows: ExpertRows, state: dict[str, Tensor]) -> None:
            first, last = self.experts.ranges[kind]
            cache.write(self.names_of_experts[kind], last - first, at, rows.sequence, rows.expert, state)

        return read, write


def mix(
    mixer: SLSTMBlocks | MLSTMBlocks,
    name_in_cache: str,
    x: Tensor,
    sequences: Segments,
    cache: MoxECache | None,
    at: Continuation,
) -> Tensor:
    """What a block that every token meets adds to the residual stream [N, D]; its state is read and kept."""
    if cache is None:
        return mixer(x, sequences, None, False)[0]
    y, state = mixer(x, sequences, cache.read_mixer(name_in_cache, at), True)
    assert state is not None
    cache.write_mixer(name_in_cache, at, state)
    return y


def step_mixer(
    mixer: SLSTMBlocks | MLSTMBlocks, name_in_cache: str, x: Tensor, residual: Tensor, cache: MoxECache
) -> Tensor:
    """residual + f(x) [N, D], in C++, for one token of each row of a cache that `is_ready`."""
    only, weight = torch.zeros(len(x), 1, dtype=torch.int64), x.new_ones(len(x), 1)
    y = residual.clone()
    mixer.step(x, only, weight, 0, cache.states[name_in_cache], y)
    return y


def make_mlstm(config: Any, num_blocks: int, *, ffn_size: int = 0) -> MLSTMBlocks:
    """mLSTM blocks as a configuration of a model of xLSTM blocks describes them."""
    return MLSTMBlocks(
        num_blocks,
        hidden_size=config.hidden_size,
        inner_size=config.mlstm_inner_size,
        num_heads=config.num_heads,
        conv_kernel_size=config.conv_kernel_size,
        qkv_block_size=config.qkv_block_size,
        ffn_size=ffn_size,
        norm_eps=config.norm_eps,
        num_residual_blocks=config.num_residual_blocks,
        backend=config.backend,
    )


def make_slstm(config: Any, residual_block: int, num_blocks: int) -> SLSTMBlocks:
    """sLSTM blocks as a configuration of a model of xLSTM blocks describes them, in their place among its blocks."""
    return SLSTMBlocks(
        num_blocks,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        conv_kernel_size=config.conv_kernel_size,
        ffn_size=config.slstm_ffn_size,
        norm_eps=config.norm_eps,
        residual_block=residual_block,
        num_residual_blocks=config.num_residual_blocks,
        backend=config.backend,
    )


def _make_ffn(config: MoxEConfig, has_norm: bool, num_blocks: int) -> FeedForwardBlocks:
    return FeedForwardBlocks(
        num_blocks,
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_size,
        norm_eps=config.norm_eps if has_norm else None,
        num_residual_blocks=config.num_residual_blocks,
        backend=config.backend,
    )


class MoxEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MoxEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["MoxELayer"]  # noqa: RUF012
    # Drafted tokens can not be taken back from a recurrent state.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=small_init_std(self.config.hidden_size))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            # What a checkpoint holds stays, also where it lacks another tensor of the same module.
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            loaded = [(tensor, tensor.clone()) for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
            reset()
            for tensor, value in loaded:
                tensor.copy_(value)


class MoxEModel(MoxEPreTrainedModel):
    """The layers without a language-model head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [self._make_layer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self._blocks_with_state = [name for layer in layers for name in layer.names_in_cache]
        self.post_init()

    def _make_layer(self, config: Any, layer: int) -> Any:
        return MoxELayer(config, layer)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache_params: MoxECache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoxEModelOutput:
        """Runs the layers; arguments as in `MoxEForCausalLM.forward`. Hidden states of masked columns are 0."""
        tokens = self.pack(input_ids, attention_mask, document_ids)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        x, cache, routing = self.run(tokens, input_ids, document_ids, cache_params, use_cache)
        return MoxEModelOutput(last_hidden_state=tokens.unpack(x), cache_params=cache, routing=routing)

    def pack(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        labels: Tensor | None = None,
    ) -> PackedTokens:
        """Checks the inputs of a call and finds its real tokens.

        Raises:
            ValueError: for shapes that do not agree or token ids outside the vocabulary.
        """
        tokens = pack_tokens(input_ids, attention_mask, document_ids, labels)
        check_vocabulary("token id", tokens.pack(input_ids), self.config.vocab_size)
        return tokens

    def run(
        self,
        tokens: PackedTokens,
        input_ids: Tensor,
        document_ids: Tensor | None,
        cache: MoxECache | None,
        use_cache: bool,
    ) -> tuple[Tensor, MoxECache | None, tuple[RouterOutput, ...]]:
        """Hidden states [N, D] after the final norm, the state, and what each router decided."""
        batch, length = tokens.shape
        if use_cache and cache is None:
            cache = MoxECache(batch)
        if cache is not None and cache.batch_size != batch:
            raise ValueError(f"cache_params holds {cache.batch_size} rows but input_ids has {batch}")
        embedded = self.embed_tokens(tokens.pack(input_ids))
        if cache is not None and self._takes_a_step(embedded, tokens, document_ids, cache):
            x, routing = self._run_layers(embedded.to(core_dtype(embedded)), tokens, cache, None)
            x = x.to(embedded.dtype)
        else:
            at, last_document = _continuation(tokens, document_ids, cache)
            x, routing = self._run_layers(embedded, tokens, cache, at)
            if cache is not None:
                cache.document = last_document
        if cache is not None:
            cache.seq_length += length
        return self.norm(x), cache, routing

    def _run_layers(
        self, x: Tensor, tokens: PackedTokens, cache: MoxECache | None, at: Continuation | None
    ) -> tuple[Tensor, tuple[RouterOutput, ...]]:
        routing = []
        for layer in self.layers:
            x, decided = layer(x, tokens, cache, at)
            if decided is not None:  # a layer without a router
                routing.append(decided)
        return x, tuple(routing)

    def _takes_a_step(
        self, embedded: Tensor, tokens: PackedTokens, document_ids: Tensor | None, cache: MoxECache
    ) -> bool:
        """Whether this is one token of each of a few rows that go on, which `MoxELayer.step` can take."""
        device = embedded.device.type
        return (
            not torch.compiler.is_compiling()
            and tokens.column is None
            and tokens.shape[1] == 1
            and tokens.shape[0] <= FEW_ROWS
            and not torch.is_grad_enabled()
            and device == "cpu"
            and not torch.is_autocast_enabled(device)
            and resolve_backend(self.config.backend, device) == "cpu"
            and cache.is_ready(self._blocks_with_state, None if document_ids is None else document_ids[:, 0], embedded)
        )


def _continuation(
    tokens: PackedTokens, document_ids: Tensor | None, cache: MoxECache | None
) -> tuple[Continuation, Tensor]:
    """Which sequences go on where their row of the cache stopped; and the document each row is in afterwards."""
    row, sequences = tokens.row, tokens.sequences
    is_last = torch.ones(len(row), dtype=torch.bool)
    is_last[:-1] = row[1:] != row[:-1]
    continues = torch.zeros(len(row), dtype=torch.bool)
    if cache is None:
        return Continuation(sequences, row, continues, is_last), torch.empty(0)
    document = torch.zeros(len(row), dtype=torch.int64)
    if document_ids is not None and len(row):
        first_token = sequences.cu_seqlens[:-1].to(document_ids.device)
        document = tokens.pack(document_ids)[first_token].cpu()
    is_first = torch.ones(len(row), dtype=torch.bool)
    is_first[1:] = is_last[:-1]
    # Without document ids a call continues whatever its row was in.
    same = cache.document[row] == document if document_ids is not None else cache.document[row] >= 0
    continues = is_first & same
    last_document = cache.document.clone()
    last_document[row[is_last]] = (
        document[is_last]
        if document_ids is not None
        else torch.where(continues[is_last], cache.document[row[is_last]], 0)
    )
    every_row_continues = len(row) == cache.batch_size and bool(continues.all()) and bool(is_last.all())
    return Continuation(sequences, row, continues, is_last, every_row_continues), last_document


class LanguageModelHead(nn.Linear):
    """Logits; a few rows without gradients, as in decoding, by a product that does nothing but read the weights."""

    def __init__(self, hidden_size: int, vocab_size: int, *, backend: str) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.backend = backend

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., V] for hidden [..., D]."""
        rows = hidden.flatten(0, -2)
        if torch.is_grad_enabled() or len(rows) > FEW_ROWS:
            return super().forward(hidden)
        logits = grouped_linear(rows, self.weight[None], (0, len(rows)), backend=self.backend)
        return logits.unflatten(0, hidden.shape[:-1])


class MoxEForCausalLM(MoxEPreTrainedModel, GenerationMixin):
    """A MoxE language model.

    Example:
        >>> model = MoxEForCausalLM(MoxEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The Trainer then leaves the division by the number of targets of the whole batch to `forward`.
    accepts_loss_kwargs = True
    # The loss (equation 21) and its terms, by their names in the output.
    loss_terms = ("loss", "lm_loss", "difficulty_loss", "group_loss", "z_loss", "load_balancing_loss")

    model_class: type[MoxEModel] = MoxEModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, backend=config.backend)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache_params: MoxECache | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MoxECausalLMOutput:
        """Next-token logits, and with labels the loss of equation 21.

        Args:
            input_ids: [B, S] token ids.
            attention_mask: [B, S]; a column with 0 is no token at all, for the recurrence, the router and every loss.
            labels: [B, S], usually `input_ids`; the shift by one is done here. -100 is ignored. The target of a token
                is the label of the next token of its sequence, so no target crosses a document or a padding column.
            document_ids: [B, S] whole numbers >= 0; where they change along a row all state begins anew.
            cache_params: state to continue from; it is updated in place and returned.
            use_cache: whether to return the state; by default when not training and without labels.
            output_router_logits: whether to return `routing`.
            logits_to_keep: n for the logits of the last n columns only; 0 for all, or for none when training with
                labels: the loss does not need them, and with a large vocabulary they are most of the memory.
            num_items_in_batch: targets of the whole (accumulated) batch. The language-model loss is then their sum over
                this number, and router losses are weighted by this call's share of the targets.

        Raises:
            ValueError: for token ids or labels outside the vocabulary or shapes that do not agree.
        """
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training and labels is None
        tokens = self.model.pack(input_ids, attention_mask, document_ids, labels)
        hidden, cache, routing = self.model.run(tokens, input_ids, document_ids, cache_params, use_cache)
        losses: dict[str, Tensor] = {}
        if labels is not None:
            targets = next_labels(tokens.pack(labels), tokens.sequences)
            check_vocabulary("label", targets[targets != IGNORED], self.config.vocab_size)
            losses = self._losses(hidden, targets, routing, num_items_in_batch)
        logits = None
        if logits_to_keep:
            logits = self.lm_head(tokens.unpack(hidden)[:, -logits_to_keep:])
        elif labels is None or not self.training:
            logits = tokens.unpack(self.lm_head(hidden))
        unpacked = tuple(_unpack_routing(tokens, decided) for decided in routing) if output_router_logits else None
        return MoxECausalLMOutput(logits=logits, cache_params=cache, routing=unpacked, **losses)

    def _losses(
        self,
        hidden: Tensor,
        targets: Tensor,
        routing: tuple[RouterOutput, ...],
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Equation 21 and its terms, by their names in the output. Without any target the language-model loss is 0."""
        config = self.config
        lm_loss, share, of_tokens = self._lm_loss(hidden, targets, num_items_in_batch)
        hardness = None
        if config.difficulty_target == "token_loss":
            hardness = hardness_of(of_tokens, targets, config.vocab_size)
        losses = [
            router_losses(
                decided,
                config.group_loss_kind,
                hardness=hardness,
                detach_difficulty_target=config.detach_difficulty_target,
            )
            for decided in routing
        ]
        means = RouterLosses(
            *(torch.stack([getattr(loss, f.name) for loss in losses]).mean() for f in fields(RouterLosses))
        )
        router_loss = (
            config.difficulty_loss_coef * means.difficulty
            + config.group_loss_coef * means.group
            + config.router_z_loss_coef * means.z
        )
        if config.load_balancing == "loss":
            router_loss = router_loss + config.load_balancing_loss_coef * means.load_balancing
        return {
            "loss": lm_loss + share * router_loss,
            "lm_loss": lm_loss,
            "difficulty_loss": means.difficulty,
            "group_loss": means.group,
            "z_loss": means.z,
            "load_balancing_loss": means.load_balancing,
        }

    def update_balancing_bias(self, assignments: Tensor) -> None:
        """Moves the experts' biases of `load_balancing="bias"` towards an equal load: b_e += rate sign(mean - load_e).

        To be called once for each step of the optimiser that is made, with what the whole step sent to each expert: the
        sum over its forward passes (and processes) of

            torch.stack([routing.assignments() for routing in model(**batch, output_router_logits=True).routing])

        MoxETrainer does so. With a trainer that does not call it the load is not balanced at all. The biases are
        buffers: `state_dict` and checkpoints hold them, in the dtype of the model; bfloat16 is too coarse to train in.

        Args:
            assignments: [layers, E] numbers of tokens, on any device.

        Raises:
            ValueError: for a model without these biases, or assignments of another shape.
        """
        config = self.config
        load_balancing = getattr(config, "load_balancing", None)  # a model without experts has no such setting
        if load_balancing != "bias":
            raise ValueError(f"load_balancing={load_balancing!r} has no bias to update: it must be 'bias'")
        shape = (config.num_hidden_layers, config.num_experts)
        if assignments.shape != shape:
            raise ValueError(f"assignments must be [layers, E] = {list(shape)}, got {list(assignments.shape)}")
        for layer, counts in zip(self.model.layers, assignments, strict=True):
            assert isinstance(layer, MoxELayer)
            layer.router.move_balancing_bias(counts, config.balancing_bias_rate)

    def _lm_loss(
        self, hidden: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, float, Tensor]:
        """The cross-entropy over the number of targets, which share of the whole batch's targets these are, and each
        token's own [N], detached."""
        num_targets = int((targets != IGNORED).sum())
        total = num_targets if num_items_in_batch is None else float(num_items_in_batch)
        weight, backend = self.lm_head.weight, self.config.backend
        cross_entropy, of_tokens = linear_cross_entropies(hidden, weight, targets, backend=backend)
        share = 1.0 if num_items_in_batch is None else num_targets / max(total, 1)
        return cross_entropy / max(total, 1), share, of_tokens

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache_params: MoxECache | None = None,
        past_key_values: MoxECache | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs,
    ) -> dict:
        """Only the columns that the state has not seen; `generate` calls it before every step.

        The output of `generate` calls the state `past_key_values`, so it may be given back under that name too. What is
        generated belongs to the document of the prompt's last column.
        """
        cache_params = past_key_values if cache_params is None else cache_params
        if document_ids is not None:
            generated = input_ids.shape[1] - document_ids.shape[1]
            document_ids = torch.cat([document_ids, document_ids[:, -1:].expand(-1, generated)], dim=1)
        if cache_params is not None:
            input_ids = input_ids[:, cache_params.get_seq_length() :]
        length = input_ids.shape[1]
        if length == 0:
            raise ValueError(
                "cache_params has already seen every token of input_ids: there is nothing to continue from"
            )
        return {
            "input_ids": input_ids,
            "attention_mask": None if attention_mask is None else attention_mask[:, -length:],
            "document_ids": None if document_ids is None else document_ids[:, -length:],
            "cache_params": cache_params,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """There are no keys and values to cache: `forward` makes the state itself."""
        return False


def _unpack_routing(tokens: PackedTokens, routing: RouterOutput) -> RouterOutput:
    return RouterOutput(
        logits=tokens.unpack(routing.logits),
        unbiased_logits=tokens.unpack(routing.unbiased_logits),
        difficulty=None if routing.difficulty is None else tokens.unpack(routing.difficulty),
        expert_indices=tokens.unpack(routing.expert_indices, fill=-1),
        expert_weights=tokens.unpack(routing.expert_weights),
    )

"""The paper's equations in plain torch, one token after the other: what modules and models are held against.

Written from the paper and for reading, without one line of moxe; used in float64. Tensors are of one row: x [S, D]. A
block's weights are a dictionary with the names of its state dict, without the axis of the stack. `keep` [S] marks the
tokens that a block sees: one that it does not see enters neither the state nor the convolution's window, and its
output is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Weights = dict[str, Tensor]
EPS = 1e-5


def weights_of(module: nn.Module, block: int = 0) -> Weights:
    """The weights of one block of a stack, still attached to the parameters."""
    return {name: parameter[block] for name, parameter in module.named_parameters()}


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def normalise(x: Tensor, weight: Tensor, heads: int = 1) -> Tensor:
    """Layer norm over each of `heads` equal parts."""
    parts = x.unflatten(-1, (heads, -1))
    centred = parts - parts.mean(-1, keepdim=True)
    return (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS)).flatten(-2) * weight


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """y_t = bias + sum of the taps times the newest inputs, the last tap on x_t; weight [C, T]."""
    taps = weight.shape[1]
    seen = [torch.zeros_like(x[0])] * taps
    out = []
    for t in range(len(x)):
        if keep[t]:
            seen = [*seen[1:], x[t]]
        out.append(bias + sum(weight[:, j] * seen[j] for j in range(taps)))
    return torch.stack(out)


def mlstm_cell(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, keep: Tensor) -> Tensor:
    """q, k, v [S, H, Dh], gates [S, H] -> h [S, H, Dh]; k is scaled by 1/sqrt(Dh)."""
    steps, heads, size = q.shape
    c, n = q.new_zeros(heads, size, size), q.new_zeros(heads, size)
    m = q.new_full((heads,), -math.inf)
    out = []
    for t in range(steps):
        if not keep[t]:
            out.append(torch.zeros_like(v[t]))
            continue
        log_f = torch.log(torch.sigmoid(fgate[t]))
        m_new = torch.maximum(log_f + m, igate[t])
        f, i = torch.exp(log_f + m - m_new), torch.exp(igate[t] - m_new)
        key = k[t] / math.sqrt(size)
        c = f[:, None, None] * c + i[:, None, None] * key[:, :, None] * v[t][:, None, :]
        n = f[:, None] * n + i[:, None] * key
        m = m_new
        read = (c * q[t][:, :, None]).sum(1)
        scale = torch.maximum((n * q[t]).sum(-1).abs(), torch.exp(-m))
        out.append(read / scale[:, None])
    return torch.stack(out)


def slstm_cell(gates: Tensor, recurrent: Tensor, keep: Tensor) -> Tensor:
    """gates [S, H, 4, Dh] (W x + b; i, f, z, o), recurrent [H, Dh, 4, Dh] -> h [S, H, Dh]."""
    c, n, h = (torch.zeros_like(gates[0, :, 0]) for _ in range(3))
    m = torch.full_like(c, -math.inf)
    out = []
    for t in range(len(gates)):
        if not keep[t]:
            out.append(torch.zeros_like(h))
            continue
        raw = gates[t] + (h[:, :, None, None] * recurrent).sum(1)
        igate, fgate, zgate, ogate = raw[:, 0], raw[:, 1], raw[:, 2], raw[:, 3]
        log_f = torch.log(torch.sigmoid(fgate))
        m_new = torch.maximum(log_f + m, igate)
        f, i = torch.exp(log_f + m - m_new), torch.exp(igate - m_new)
        c = f * c + i * torch.tanh(zgate)
        n = f * n + i
        m = m_new
        h = torch.sigmoid(ogate) * c / n
        out.append(h)
    return torch.stack(out)


def mlstm_block(x: Tensor, w: Weights, heads: int, keep: Tensor | None = None) -> Tensor:
    """f(x); the block is x + f(x)."""
    keep = torch.ones(len(x), dtype=torch.bool) if keep is None else keep
    (q, k, v, igate, fgate), convolved, gate = _mlstm_inputs(x, w, heads, keep)
    h = mlstm_cell(q, k, v, igate, fgate, keep)
    mixed = normalise(h.flatten(1), w["head_norm.weight"], heads) + w["skip"] * convolved
    out = (mixed * silu(gate)) @ w["down_proj.weight"].T
    if "ffn.up_proj.weight" in w:
        out = out + feed_forward_block(x + out, part(w, "ffn"))
    return out * keep[:, None]


def mlstm_forget_gates(x: Tensor, w: Weights, heads: int) -> Tensor:
    """log f [S, H], every token seen."""
    (*_, fgate), _, _ = _mlstm_inputs(x, w, heads, torch.ones(len(x), dtype=torch.bool))
    return torch.log(torch.sigmoid(fgate))


def _mlstm_inputs(
    x: Tensor, w: Weights, heads: int, keep: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """q, k, v [S, H, Dh], igate and fgate [S, H]; the convolved branch and the other one."""
    branch, gate = (normalise(x, w["norm.weight"]) @ w["up_proj.weight"].T).chunk(2, -1)
    convolved = silu(causal_conv(branch, w["conv.weight"], w["conv.bias"], keep))
    q = _by_blocks(convolved, w["q_proj.weight"])
    k = _by_blocks(convolved, w["k_proj.weight"])
    v = _by_blocks(branch, w["v_proj.weight"])
    gates = torch.cat([q, k, v], -1) @ w["gate_weight"].T + w["gate_bias"]
    q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (q, k, v))
    return (q, k, v, gates[:, :heads], gates[:, heads:]), convolved, gate


def slstm_block(x: Tensor, w: Weights, heads: int, keep: Tensor | None = None) -> Tensor:
    """f(x); the block is x + f(x)."""
    keep = torch.ones(len(x), dtype=torch.bool) if keep is None else keep
    h = slstm_cell(_slstm_gates(x, w, heads, keep), w["recurrent_weight"], keep)
    mixed = normalise(h.flatten(1), w["head_norm.weight"], heads)
    return (mixed + feed_forward_block(x + mixed, part(w, "ffn"))) * keep[:, None]


def slstm_forget_gates(x: Tensor, w: Weights, heads: int) -> Tensor:
    """log f [S, H, Dh], every token seen: of f~ = W x_t + R h_{t-1} + b."""
    keep = torch.ones(len(x), dtype=torch.bool)
    gates = _slstm_gates(x, w, heads, keep)
    h = slstm_cell(gates, w["recurrent_weight"], keep)
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    recurrent = torch.einsum("shi,hio->sho", before, w["recurrent_weight"][:, :, 1])
    return torch.log(torch.sigmoid(gates[:, :, 1] + recurrent))


def _slstm_gates(x: Tensor, w: Weights, heads: int, keep: Tensor) -> Tensor:
    """W x + b [S, H, 4, Dh] in the order i, f, z, o."""
    normed = normalise(x, w["norm.weight"])
    convolved = silu(causal_conv(normed, w["conv.weight"], w["conv.bias"], keep))
    i_and_f = torch.einsum("shi,hio->sho", convolved.unflatten(-1, (heads, -1)), w["if_proj.weight"])
    z_and_o = torch.einsum("shi,hio->sho", normed.unflatten(-1, (heads, -1)), w["zo_proj.weight"])
    return torch.stack([*i_and_f.chunk(2, -1), *z_and_o.chunk(2, -1)], 2) + w["gate_bias"]


def feed_forward_block(x: Tensor, w: Weights, keep: Tensor | None = None) -> Tensor:
    """f(x); the block is x + f(x). Without a norm's weight there is no norm."""
    normed = normalise(x, w["norm.weight"]) if "norm.weight" in w else x
    gate, up = (normed @ w["up_proj.weight"].T).chunk(2, -1)
    out = (silu(gate) * up) @ w["down_proj.weight"].T
    return out if keep is None else out * keep[:, None]


def _by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal product; weight [blocks, in, out]."""
    size = weight.shape[1]
    return torch.cat([x[:, b * size : (b + 1) * size] @ weight[b] for b in range(len(weight))], -1)


def block(kind: str, x: Tensor, w: Weights, heads: int, keep: Tensor | None = None) -> Tensor:
    if kind == "ffn":
        return feed_forward_block(x, w, keep)
    return {"mlstm": mlstm_block, "slstm": slstm_block}[kind](x, w, heads, keep)


@dataclass
class Routed:
    difficulty: Tensor  # [S]
    unbiased: Tensor  # [S, E]
    logits: Tensor  # [S, E]
    probabilities: Tensor  # [S, E]
    experts: Tensor  # [S, K]
    weights: Tensor  # [S, K]


def route(h: Tensor, w: Weights, *, k: int, gamma: float) -> Routed:
    """Equations 5 to 8, and the choice in 9, by probability plus balancing bias where there is one."""
    difficulty = torch.sigmoid(h @ w["difficulty_weight"] + w["difficulty_bias"])
    unbiased = h @ w["weight"].T + w["bias"]
    logits = unbiased.clone()
    half = unbiased.shape[1] // 2
    for e in range(unbiased.shape[1]):
        logits[:, e] = unbiased[:, e] + (gamma if e < half else -gamma) * difficulty
    probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    scores = probabilities + w["balancing_bias"] if "balancing_bias" in w else probabilities
    chosen = [sorted(range(2 * half), key=lambda e, p=row: -p[e])[:k] for row in scores.tolist()]
    experts = torch.tensor(chosen).reshape(len(h), k)
    picked = probabilities.gather(1, experts)
    return Routed(difficulty, unbiased, logits, probabilities, experts, picked / picked.sum(-1, keepdim=True))


def mix_experts(
    h: Tensor,
    experts: nn.Module,
    kinds: list[tuple[str, int]],
    chosen: Tensor,
    weights: Tensor,
    heads: int,
    residual: bool = True,
) -> Tensor:
    """Equation 9 as written, y = sum_e w_e Expert_e(h), every expert over the whole row with unseen tokens masked out.

    `kinds` names each expert's kind and its place in the stack of that kind. Without `residual` Expert_e(h) = f_e(h).
    """
    y = torch.zeros_like(h)
    for e, (kind, place) in enumerate(kinds):
        keep = (chosen == e).any(-1)
        weight = (weights * (chosen == e)).sum(-1)
        f = block(kind, h, weights_of(getattr(experts, kind), place), heads, keep)
        y = y + weight[:, None] * (h + f if residual else f)
    return y


def kinds_of(expert_kind: str, num_experts: int) -> list[tuple[str, int]]:
    """Experts 0 to E/2 - 1 are mLSTM and the rest sLSTM in an `xlstm` layer; else all are of one kind."""
    half = num_experts // 2
    if expert_kind == "xlstm":
        return [("mlstm", e) if e < half else ("slstm", e - half) for e in range(num_experts)]
    return [(expert_kind, e) for e in range(num_experts)]


def layer_forward(
    x: Tensor,
    layer: nn.Module,
    expert_kind: str,
    *,
    heads: int,
    k: int,
    gamma: float,
    memory: str = "sequence",
    residual: bool = True,
    shared: str = "none",
) -> tuple[Tensor, Routed]:
    """One MoxE layer over one row [S, D]: equation 4, then 5 to 9."""
    x = x + slstm_block(x, weights_of(layer.get_submodule("slstm_mixer")), heads)
    h = x + mlstm_block(x, weights_of(layer.get_submodule("mlstm_mixer")), heads)
    router = layer.get_submodule("router")
    routed = route(h, {**dict(router.named_parameters()), **dict(router.named_buffers())}, k=k, gamma=gamma)
    kinds = kinds_of(expert_kind, routed.logits.shape[1])
    parts = [slice(0, len(h))] if memory == "sequence" else [slice(t, t + 1) for t in range(len(h))]
    experts = layer.get_submodule("experts")
    y = torch.cat(
        [mix_experts(h[p], experts, kinds, routed.experts[p], routed.weights[p], heads, residual) for p in parts]
    )
    if shared != "none":
        y = y + block(shared, h, weights_of(layer.get_submodule("shared_expert")), heads)
    return y, routed


def model_forward(model: PreTrainedModel, row: Tensor) -> tuple[Tensor, list[Routed]]:
    """Logits [S, V] of one row of token ids [S], and what each layer's router decided."""
    config: Any = model.config
    x = model.get_parameter("model.embed_tokens.weight")[row]
    routed = []
    for layer in model.get_submodule("model.layers").children():
        x, decided = layer_forward(
            x,
            layer,
            config.expert_kind,
            heads=config.num_heads,
            k=config.num_experts_per_tok,
            gamma=config.gamma,
            memory=config.expert_memory,
            residual=config.ffn_residual,
            shared=config.shared_expert,
        )
        routed.append(decided)
    return normalise(x, model.get_parameter("model.norm.weight")) @ model.get_parameter("lm_head.weight").T, routed

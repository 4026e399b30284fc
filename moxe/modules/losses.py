"""The four router losses of one layer (equations 10 to 20), each a mean over its tokens.

Legend: N packed tokens, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moxe.modules.router import RouterOutput
from moxe.ops.cross_entropy import IGNORED


@dataclass(frozen=True, eq=False)
class RouterLosses:
    """0-d tensors, not yet weighted by their coefficients."""

    difficulty: Tensor
    group: Tensor
    z: Tensor
    load_balancing: Tensor


@dataclass(frozen=True, eq=False)
class Hardness:
    """What the next token cost the model, as a target of the difficulty instead of the router's entropy."""

    values: Tensor  # [N] in [0, 1], without a gradient
    is_known: Tensor  # [N] bool; the others' values count for nothing


def hardness_of(losses: Tensor, targets: Tensor, vocab_size: int) -> Hardness:
    """min(loss_t / log V, 1) for cross-entropies [N] in nats and their targets [N], -100 where there is none."""
    return Hardness((losses.detach() / math.log(max(vocab_size, 2))).clamp(max=1), targets != IGNORED)


def router_losses(
    routing: RouterOutput,
    group_loss_kind: str,
    *,
    hardness: Hardness | None = None,
    detach_difficulty_target: bool = False,
) -> RouterLosses:
    """All four losses of a routing decision over [N] tokens; 0 when there is no token."""
    if not len(routing.logits):
        zero = routing.logits.sum()
        return RouterLosses(zero, zero, zero, zero)
    probabilities = torch.softmax(routing.logits, dim=-1)
    return RouterLosses(
        difficulty=difficulty_loss(routing, hardness=hardness, detach_target=detach_difficulty_target),
        group=group_loss(probabilities, group_loss_kind),
        z=torch.logsumexp(routing.logits, dim=-1).square().mean(),
        load_balancing=load_balancing_loss(probabilities, routing.expert_indices),
    )


def normalised_entropy(unbiased_logits: Tensor) -> Tensor:
    """Entropy of softmax over [..., E] logits as a fraction of log E, in [0, 1] (10)."""
    log_p = torch.log_softmax(unbiased_logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(unbiased_logits.shape[-1])


def difficulty_loss(routing: RouterOutput, *, hardness: Hardness | None = None, detach_target: bool = False) -> Tensor:
    """mean_t (d_t - H_t)^2 with H_t the normalised entropy of the unbiased logits (11), or the token's hardness.

    Args:
        hardness: the targets, and the tokens that the mean is over; 0 when there is none.
        detach_target: whether the entropy is a target without a gradient.
    """
    if routing.difficulty is None:
        return routing.logits.new_zeros(())
    if hardness is not None:
        distances = (routing.difficulty - hardness.values).square() * hardness.is_known
        return distances.sum() / hardness.is_known.sum().clamp(min=1)
    target = normalised_entropy(routing.unbiased_logits)
    return (routing.difficulty - (target.detach() if detach_target else target)).square().mean()


def group_loss(probabilities: Tensor, kind: str) -> Tensor:
    """How far the groups' mean mass P_M, P_S is from one half each: `kl` is (12) to (18), the others are released code.

    `kl`: KL([P_M, P_S] || [1/2, 1/2]); `squared_difference`: (P_M - P_S)^2; `squared_distance`:
    (P_M - 1/2)^2 + (P_S - 1/2)^2; `jensen_shannon`: the Jensen-Shannon divergence to [1/2, 1/2].
    """
    half = probabilities.shape[-1] // 2
    mass = torch.stack([probabilities[..., :half].sum(-1).mean(), probabilities[..., half:].sum(-1).mean()])
    uniform = torch.full_like(mass, 0.5)
    if kind == "kl":
        return _kl(mass, uniform)
    if kind == "squared_difference":
        return (mass[0] - mass[1]).square()
    if kind == "squared_distance":
        return (mass - 0.5).square().sum()
    middle = (mass + uniform) / 2
    return (_kl(mass, middle) + _kl(uniform, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def load_balancing_loss(probabilities: Tensor, expert_indices: Tensor) -> Tensor:
    """E sum_e F_e P_e with F_e the share of assignments and P_e the mean probability of expert e (20); 1 if uniform."""
    experts = probabilities.shape[-1]
    counts = torch.bincount(expert_indices.flatten(), minlength=experts).to(probabilities.dtype)
    return experts * (counts / expert_indices.numel() * probabilities.mean(0)).sum()

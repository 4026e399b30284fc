"""Parameters of E blocks of one shape, stacked: a mixer is a stack of one, the experts of a kind are a stack of E.

Legend: N rows sorted by block, E blocks, C channels, H heads, Q diagonal blocks, T taps.

Every module here takes rows together with the `Segments` that say which rows belong to which block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moxe.ops.conv import causal_conv
from moxe.ops.grouped_linear import grouped_block_linear, grouped_linear
from moxe.ops.norm import stacked_layer_norm
from moxe.ops.segments import Segments

# What a block carries from token to token: tensors by name, each with one entry a segment in front.
BlockState = dict[str, Tensor]


def small_init_std(dim: int) -> float:
    """Standard deviation of input projections, sqrt(2 / (5 dim)) (Nguyen and Salazar, 2019)."""
    return math.sqrt(2 / (5 * dim))


def wang_init_std(dim: int, num_blocks: int) -> float:
    """Standard deviation of output projections behind `num_blocks` residual blocks, 2 / (num_blocks sqrt(dim))."""
    return 2 / (num_blocks * math.sqrt(dim))


def parameters_of(block: nn.Module, names: Iterable[tuple[str, str]]) -> list[Tensor]:
    """A block's parameters by (child, name), its own with an empty child.

    As by attributes, which cost an nn.Module several times more: with a dozen a block, that is felt when decoding.
    """
    found = []
    for child, name in names:
        module = block._modules[child] if child else block
        assert module is not None
        parameter = module._parameters.get(name)
        found.append(getattr(module, name) if parameter is None else parameter)
    return found


class StackedLinear(nn.Module):
    """y = x W^T, [N, I] -> [N, O]; weight [E, O, I]."""

    def __init__(self, num_blocks: int, in_size: int, out_size: int, *, init_std: float, backend: str) -> None:
        super().__init__()
        self.init_std, self.backend = init_std, backend
        self.weight = nn.Parameter(torch.empty(num_blocks, out_size, in_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return grouped_linear(x, self.weight, segments.row_offsets, backend=self.backend)


class StackedBlockLinear(nn.Module):
    """Block-diagonal product, [N, Q, I] -> [N, Q, O]; weight [E, Q, I, O]."""

    def __init__(
        self, num_blocks: int, diagonal: int, in_size: int, out_size: int, *, init_std: float, backend: str
    ) -> None:
        super().__init__()
        self.init_std, self.backend = init_std, backend
        self.weight = nn.Parameter(torch.empty(num_blocks, diagonal, in_size, out_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return grouped_block_linear(x, self.weight, segments.row_offsets, backend=self.backend)


class StackedConv(nn.Module):
    """SiLU of a causal depthwise convolution, [N, C] -> [N, C]; weight [E, C, T], bias [E, C]. See `moxe.ops.conv`."""

    def __init__(self, num_blocks: int, channels: int, taps: int, *, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_blocks, channels, taps))
        self.bias = nn.Parameter(torch.empty(num_blocks, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, segments: Segments, state: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        return causal_conv(
            x,
            self.weight,
            self.bias,
            segments,
            silu=True,
            initial_state=state,
            return_final_state=return_state,
            backend=self.backend,
        )


class StackedLayerNorm(nn.Module):
    """Layer normalisation without bias, [N, C] -> [N, C], over each of `heads` parts of C; weight [E, C]."""

    def __init__(self, num_blocks: int, channels: int, *, eps: float, heads: int = 1, backend: str) -> None:
        super().__init__()
        self.eps, self.heads, self.backend = eps, heads, backend
        self.weight = nn.Parameter(torch.empty(num_blocks, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return stacked_layer_norm(
            x, self.weight, segments.row_offsets, heads=self.heads, eps=self.eps, backend=self.backend
        )

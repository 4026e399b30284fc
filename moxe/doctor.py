"""Which backends this machine has, and how far each lies from the reference in float64.

Legend: N packed tokens, H heads, Dh head size, G segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.ops.backend import BACKENDS, resolve_backend
from moxe.ops.mlstm import mlstm
from moxe.ops.segments import Segments
from moxe.ops.slstm import slstm

# Of a tensor's largest value, in float64; a right implementation differs by the order of its sums alone.
LARGEST_ERROR = 1e-9
_LENGTHS, _GROUPS, _HEADS, _SIZE = (150, 1, 0, 67, 33), (0, 3, 5), 2, 24


@dataclass(frozen=True)
class Diagnosis:
    """One backend on one device: why it is not there, or the errors of each check (outputs and gradients alike)."""

    backend: str
    device: str
    unavailable: str | None
    errors: dict[str, float]

    @property
    def is_right(self) -> bool:
        """Whether every error is below `LARGEST_ERROR` (also where a result is NaN)."""
        return all(error <= LARGEST_ERROR for error in self.errors.values())


def diagnose() -> list[Diagnosis]:
    """Checks every backend on every device of this machine that it runs on, against `reference` on the CPU."""
    expected = {name: check("reference", "cpu") for name, check in CHECKS.items()}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for device in devices:
        for backend in BACKENDS:
            if backend == "reference" or (backend == "cpu" and device != "cpu"):
                continue
            try:
                resolve_backend(backend, device)
            except ValueError as error:
                found.append(Diagnosis(backend, device, str(error), {}))
                continue
            errors = {}
            for name, check in CHECKS.items():
                outputs, gradients = check(backend, device)
                errors[f"{name} outputs"] = _largest_error(outputs, expected[name][0])
                errors[f"{name} gradients"] = _largest_error(gradients, expected[name][1])
            found.append(Diagnosis(backend, device, None, errors))
    return found


# (backend, device) -> outputs and gradients, the same random problem each time.
Check = Callable[[str, str], tuple[list[Tensor], list[Tensor]]]


def _check_mlstm(backend: str, device: str) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths(_LENGTHS)
    q, k, v = (_leaf((segments.num_tokens, _HEADS, _SIZE), generator, device) for _ in range(3))
    igate, fgate = (_leaf((segments.num_tokens, _HEADS), generator, device) for _ in range(2))
    h, state = mlstm(q, k, v, igate, fgate, segments, return_final_state=True, backend=backend)
    assert state is not None
    memory = state.c * state.m.exp()[..., None, None]  # what is stored, whatever its scale
    return _with_gradients([h, memory], [q, k, v, igate, fgate])


def _check_slstm(backend: str, device: str) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths(_LENGTHS, _GROUPS)
    gates = _leaf((segments.num_tokens, _HEADS, 4, _SIZE), generator, device)
    recurrent = _leaf((segments.num_groups, _HEADS, _SIZE, 4, _SIZE), generator, device, scale=_SIZE**-0.5)
    h, state = slstm(gates, recurrent, segments, return_final_state=True, backend=backend)
    assert state is not None
    return _with_gradients([h, state.h], [gates, recurrent])


def _check_model(backend: str, device: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    config = MoxEConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        num_experts=4,
        qkv_block_size=4,  # fits into a vector of float64 on every processor: the path that a default model takes
        backend=backend,
    )
    model = MoxEForCausalLM(config).double().train()
    torch.nn.Module.to(model, device)
    ids = torch.randint(0, 61, (3, 29), generator=torch.Generator().manual_seed(0)).to(device)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach().cpu()], [p.grad.cpu() for p in model.parameters() if p.grad is not None]


CHECKS: dict[str, Check] = {"mLSTM": _check_mlstm, "sLSTM": _check_slstm, "model": _check_model}


def _leaf(shape: tuple[int, ...], generator: torch.Generator, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device).requires_grad_()


def _with_gradients(outputs: list[Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        loss = loss + (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [out.detach().cpu() for out in outputs], [gradient.cpu() for gradient in gradients]


def _largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, as a part of the largest value of all tensors; NaN stays NaN."""
    largest = max(float(x.abs().max()) for x in expected)
    return float(torch.stack([(a - b).abs().max() for a, b in zip(actual, expected, strict=True)]).max()) / largest

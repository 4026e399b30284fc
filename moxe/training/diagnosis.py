"""Where a step's numbers stopped being finite, in one clause: the layer, the part and the term.

What is looked at, in this order: the parameters; the forward pass of the step's batches, run once more; the gradients.
The first that is not finite is named, for what comes behind it is not finite because of it.

Legend: N rows, E blocks of a stack, H heads, Dh head size, I inner size of an mLSTM block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moxe.models.accounting import part_of
from moxe.modules.experts import Experts
from moxe.modules.mlstm import MLSTMBlocks
from moxe.modules.slstm import SLSTMBlocks
from moxe.ops.mlstm.projections import mlstm_projections
from moxe.ops.slstm.gates import slstm_gates

NAMED_GRADIENTS = 3  # a gradient that is not finite spreads to all in front of it: the others say nothing more
_MLSTM_GATES = ("input gate", "forget gate")
_SLSTM_GATES = ("input gate", "forget gate", "cell input", "output gate")
# How the parameters of gates lie in a stack: type of the block, end of the name -> (view with one axis of gates, that
# axis, the gates).
_Gates = tuple[Callable[[Tensor], Tensor], int, tuple[str, ...]]
_GATES: dict[tuple[type[nn.Module], str], _Gates] = {
    (MLSTMBlocks, "gate_weight"): (lambda w: w.unflatten(1, (2, -1)), 1, _MLSTM_GATES),  # [E, 2 H, 3 I]
    (MLSTMBlocks, "gate_bias"): (lambda w: w.unflatten(1, (2, -1)), 1, _MLSTM_GATES),  # [E, 2 H]
    (SLSTMBlocks, "gate_bias"): (lambda w: w, 2, _SLSTM_GATES),  # [E, H, 4, Dh]
    (SLSTMBlocks, "recurrent_weight"): (lambda w: w, 3, _SLSTM_GATES),  # [E, H, Dh, 4, Dh]
    (SLSTMBlocks, "if_proj.weight"): (lambda w: w.unflatten(3, (2, -1)), 3, _SLSTM_GATES[:2]),  # [E, H, Dh, 2 Dh]
    (SLSTMBlocks, "zo_proj.weight"): (lambda w: w.unflatten(3, (2, -1)), 3, _SLSTM_GATES[2:]),  # [E, H, Dh, 2 Dh]
}


@dataclass(frozen=True)
class Diagnosis:
    """What is not finite in a step.

    Args:
        finding: a clause, such as "lm_loss is not finite, first layer 1, mlstm_experts, keys (...)".
        is_in_weights: whether the weights themselves are not finite, so that no other batch can do better.
    """

    finding: str
    is_in_weights: bool = False


def diagnose(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], losses: Mapping[str, float]) -> Diagnosis:
    """Where a step that is not finite went wrong.

    Of several processes each looks at its own batches; only one of them may find the place.

    Args:
        model: with the gradients of the step, not clipped: clipping spreads a NaN over all of them.
        batches: the inputs of the step's forward passes.
        losses: the terms of the step's loss by name.
    """
    broken = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if broken:
        others = _and_more(len(broken) - 1)
        return Diagnosis(f"the weights are not finite: {_describe_parameter(model, broken[0])}{others}", True)
    terms = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if terms:
        place = next(filter(None, (_first_in_forward(model, batch) for batch in batches)), "")
        where = f", first {place}" if place else ", though every module's output is finite"
        return Diagnosis(f"{', '.join(terms)} {'is' if len(terms) == 1 else 'are'} not finite{where}")
    return Diagnosis(_describe_gradients(model))


def _describe_parameter(model: nn.Module, name: str) -> str:
    """How many numbers of a parameter are not finite, and of which experts and gates."""
    wrong = ~torch.isfinite(model.get_parameter(name).detach())
    count = int(wrong.sum())
    places = [_place(name)]
    experts = re.match(r"(.*\.experts)\.(\w+)\.", name)
    if experts is not None:
        module = model.get_submodule(experts[1])
        assert isinstance(module, Experts)
        first = module.ranges[experts[2]][0]
        numbers = [str(first + index) for index in wrong.flatten(1).any(1).nonzero().flatten().tolist()]
        places.append(f"expert {' and '.join(numbers)}")
    for (kind, ending), (view, axis, gates) in _GATES.items():
        owner = name.removesuffix(f".{ending}")
        if owner != name and isinstance(model.get_submodule(owner), kind):
            of_gates = view(wrong).movedim(axis, 0).flatten(1).any(1)
            places += [gate for gate, is_wrong in zip(gates, of_gates, strict=True) if is_wrong]
    return f"{count:,} of the {wrong.numel():,} numbers of {name} ({', '.join(places)})"


def _first_in_forward(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """The first module, in the order they run, whose output is not finite in the forward pass of a batch; or ""."""
    outputs: dict[str, Any] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[name] = output
        if not all(_is_finite(tensor) for tensor in _tensors(output)):
            raise _NotFiniteError(_describe_module(model, name, args, outputs))

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, module, args, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(**batch)
    except _NotFiniteError as found:
        return str(found)
    finally:
        for hook in hooks:
            hook.remove()
    return ""


class _NotFiniteError(Exception):
    """Ends a forward pass at the module that its text describes."""


def _describe_module(model: nn.Module, name: str, args: tuple[Any, ...], outputs: Mapping[str, Any]) -> str:
    """Place and name of a module whose output is not finite; inside a block, of the gate or cell that gave its input.

    q, k, v, the gates and the cell are no modules: they are computed again from what the block's modules gave.
    """
    parent, _, child = name.rpartition(".")
    block = model.get_submodule(parent)
    if isinstance(block, MLSTMBlocks) and child == "down_proj" and not _is_finite(args[0]):
        convolved, branch = outputs[f"{parent}.conv"][0], outputs[f"{parent}.up_proj"].chunk(2, dim=-1)[0]
        weights = (block.q_proj.weight, block.k_proj.weight, block.v_proj.weight, block.gate_weight, block.gate_bias)
        values = mlstm_projections(convolved, branch, *weights, args[1].row_offsets, backend=block.backend)
        inside = dict(zip(("queries", "keys", "values", *_MLSTM_GATES), values, strict=True))
    elif isinstance(block, SLSTMBlocks) and child == "head_norm" and not _is_finite(args[0]):
        convolved, normed = outputs[f"{parent}.conv"][0], outputs[f"{parent}.norm"]
        weights = (block.if_proj.weight, block.zo_proj.weight, block.gate_bias.flatten(2))
        gates = slstm_gates(convolved, normed, *weights, args[1].row_offsets, backend=block.backend)
        inside = dict(zip(_SLSTM_GATES, gates.unbind(2), strict=True))
    else:
        return f"{_place(name)} ({name})"
    wrong = next((what for what, value in inside.items() if not _is_finite(value)), None)
    if wrong is None:
        largest = float(inside["input gate"].abs().max())
        wrong = f"cell, all of whose inputs are finite, its input gate at most {largest:.3g} in size"
    return f"{_place(parent)}, {wrong} ({parent})"


def _describe_gradients(model: nn.Module) -> str:
    """The parameters whose gradients are not finite, those nearest to the loss first."""
    with_gradient = [(name, p.grad) for name, p in reversed(list(model.named_parameters())) if p.grad is not None]
    broken = [name for name, gradient in with_gradient if not _is_finite(gradient)]
    if not broken:
        name, gradient = max(with_gradient, key=lambda named: float(named[1].abs().max()))
        largest = float(gradient.abs().max())
        return (
            f"the loss and every gradient are finite but their norm is not: the largest number, {largest:.3g}, is in "
            f"the gradient of {name} ({_place(name)})"
        )
    named = ", ".join(f"{name} ({_place(name)})" for name in broken[:NAMED_GRADIENTS])
    others = _and_more(len(broken) - NAMED_GRADIENTS)
    return f"the loss is finite but its gradient is not: from the loss backwards, first in {named}{others}"


def _place(name: str) -> str:
    """Layer and part of a module or parameter: "layer 1, mlstm_experts"; "layer 1" for what is of no one part."""
    layer = re.match(r"model\.layers\.(\d+)(\.experts)?$", name)
    if layer is not None:
        return f"layer {layer[1]}" + (", sum over experts" if layer[2] else "")
    layer, part = re.match(r"model\.layers\.(\d+)\.", name), part_of(f"{name}.")
    return part if layer is None else f"layer {layer[1]}, {part}"


def _and_more(count: int) -> str:
    return f" and {count} more parameter{'s' if count > 1 else ''}" if count > 0 else ""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(output: Any) -> Iterable[Tensor]:
    """The tensors of a module's output: tuples, lists, states by name and dataclasses are looked into."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, tuple | list) else []

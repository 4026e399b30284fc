"""The recurrent state of a model: what generation carries from token to token instead of a key-value cache.

Legend: B rows, E blocks of a stack (1 for a mixer), G segments, S tokens of this call.

Its size does not depend on how many tokens were seen. Every tensor is [B, E, ...].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moxe.errors import UserError
from moxe.modules.stacks import BlockState
from moxe.ops.backend import core_dtype
from moxe.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class Continuation:
    """How the segments of a call relate to the rows of a cache; host tensors."""

    segments: Segments
    row: Tensor  # [G] row of each segment
    continues: Tensor  # [G] bool: the segment goes on where its row stopped
    is_last: Tensor  # [G] bool: its final state is the row's
    # Every row of the cache goes on, in one segment: then state b belongs to segment b, and none begins anew.
    every_row_continues: bool = False


class MoxECache:
    """State of every block of every layer, for B rows.

    Args:
        batch_size: rows B.
    """

    # What transformers asks of a state that is given to `generate`: it changes in place and has no earlier token in it.
    is_compileable = False
    is_croppable = False

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.states: dict[str, BlockState] = {}
        self.seq_length = 0
        # Document each row is in; -1 before its first token.
        self.document = torch.full((batch_size,), -1)

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.seq_length

    def is_ready(self, blocks: Iterable[str], document: Tensor | None, like: Tensor) -> bool:
        """Whether one token of each row can take a step in place (`moxe.ops.mlstm.step`, `moxe.ops.slstm.step`).

        Every row must go on, and each of the blocks have a state already, contiguous and in the precision that the
        operation computes in; what the convolution keeps may be bfloat16 where that is float32.

        Args:
            document: [B] the document of each row's token; None for that which the row is in.
        """
        current = self.document.tolist()
        goes_on = all(number >= 0 for number in current) if document is None else document.tolist() == current
        if not goes_on:
            return False
        computed = core_dtype(like)
        of_conv = (computed,) if computed == torch.float64 else (computed, torch.bfloat16)
        for block in blocks:
            if block not in self.states:
                return False
            for name, tensor in self.states[block].items():
                if tensor.dtype not in (of_conv if name == "conv" else (computed,)) or not tensor.is_contiguous():
                    return False
        return True

    def read_mixer(self, block: str, at: Continuation) -> BlockState | None:
        """State before every segment of a mixer; None when all of them begin empty."""
        if at.every_row_continues and (state := self.states.get(block)) is not None:
            return {name: tensor[:, 0] for name, tensor in state.items()}
        segment = torch.arange(at.segments.num_segments)
        return self.read(block, at, segment, torch.zeros_like(segment))

    def write_mixer(self, block: str, at: Continuation, new: BlockState) -> None:
        """Keeps the state of a mixer behind every segment that is the last of its row."""
        if at.every_row_continues and (state := self.states.get(block)) is not None:
            self.states[block] = {name: new[name].detach().to(old.dtype)[:, None] for name, old in state.items()}
            return
        segment = torch.arange(at.segments.num_segments)
        self.write(block, 1, at, segment, torch.zeros_like(segment), new)

    def read(self, block: str, at: Continuation, segment: Tensor, expert: Tensor) -> BlockState | None:
        """State before the given segments of the given experts of a block; None when all of them begin empty."""
        state = self.states.get(block)
        if state is None:
            return None
        if at.every_row_continues:
            return {name: tensor[segment.to(tensor.device), expert.to(tensor.device)] for name, tensor in state.items()}
        continues = at.continues[segment]
        if not continues.any():
            return None
        row = at.row[segment]
        begins = (~continues).nonzero().flatten()
        read = {}
        for name, tensor in state.items():
            device = tensor.device
            part = tensor[row.to(device), expert.to(device)]
            if len(begins):
                part[begins.to(device)] = _empty_value(name)
            read[name] = part
        return read

    def write(
        self, block: str, num_experts: int, at: Continuation, segment: Tensor, expert: Tensor, new: BlockState
    ) -> None:
        """Keeps the state behind the given segments where it is the last of its row.

        A row whose last segment is not a continuation begins anew for every expert, also for those it did not reach.
        """
        if block not in self.states:
            self.states[block] = {
                name: tensor.new_full((self.batch_size, num_experts, *tensor.shape[1:]), _empty_value(name))
                for name, tensor in new.items()
            }
        if at.every_row_continues:
            for name, tensor in self.states[block].items():
                tensor[segment.to(tensor.device), expert.to(tensor.device)] = new[name].detach().to(tensor.dtype)
            return
        fresh_rows = at.row[at.is_last & ~at.continues]
        kept = at.is_last[segment].nonzero().flatten()
        row, expert = at.row[segment][kept], expert[kept]
        for name, tensor in self.states[block].items():
            device = tensor.device
            if len(fresh_rows):
                tensor[fresh_rows.to(device)] = _empty_value(name)
            values = new[name].detach()
            values = values if len(kept) == len(values) else values[kept.to(device)]
            tensor[row.to(device), expert.to(device)] = values.to(tensor.dtype)

    def memory_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was; generation with beams calls it."""
        self.select_rows(beam_idx)

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the given rows, in this order; a row may be dropped or repeated."""
        for state in self.states.values():
            for name, tensor in state.items():
                state[name] = tensor.index_select(0, rows.to(tensor.device))
        self.document = self.document[rows.cpu()]
        self.batch_size = len(rows)

    def save(self, path: str | Path) -> None:
        """Writes the state as a safetensors file; a file of that name is replaced when the new one is whole."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors()}
        unfinished = Path(f"{path}.unfinished")
        save_file({**tensors, "document": self.document}, unfinished, metadata={"seq_length": str(self.seq_length)})
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> MoxECache:
        """Reads what `save` wrote.

        Raises:
            UserError: when there is no such file or it holds no cache.
        """
        try:
            opened = safe_open(path, "pt", device=device)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can not be read as a saved MoxE state: {error}") from None
        with opened as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            if "document" not in names or "seq_length" not in metadata:
                raise UserError(f"{path} holds no saved MoxE state: it lacks 'document' or 'seq_length'")
            document = file.get_tensor("document").cpu()
            cache = cls(len(document))
            cache.document, cache.seq_length = document, int(metadata["seq_length"])
            for name in sorted(names - {"document"}):
                block, _, part = name.rpartition("/")
                cache.states.setdefault(block, {})[part] = file.get_tensor(name)
        return cache

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for block, state in self.states.items():
            for name, tensor in state.items():
                yield f"{block}/{name}", tensor


def _empty_value(name: str) -> float:
    """Before the first token the stabiliser m is -inf and everything else 0."""
    return -torch.inf if name == "m" else 0.0

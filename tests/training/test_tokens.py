"""A token that the model does not know is one sentence that names it and its place."""

from __future__ import annotations

import pytest
import torch

from moxe.errors import UserError
from moxe.training.tokens import require_known_tokens


def batch(**changes: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Rows of every id from 0 to 63, with (row, column, id) set in a tensor of this name."""
    ids = torch.arange(64).reshape(4, 16)
    tensors = {"input_ids": ids.clone(), "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    tensors["labels"][0, :3] = -100
    for name, (row, column, value) in changes.items():
        tensors[name][row, column] = value
    return tensors


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("token", [64, 10**9, -1, -101])
def test_an_id_outside_the_vocabulary_is_named_with_its_row_and_column(key: str, token: int):
    with pytest.raises(UserError, match=rf"^step 7 holds the id {token} in row 2, column 5 of its {key}, .* 0 to 63"):
        require_known_tokens(batch(**{key: (2, 5, token)}), 64, "step 7")


def test_the_ignored_label_is_no_token():
    with pytest.raises(UserError, match="id -100 in row 1, column 1 of its input_ids"):
        require_known_tokens(batch(input_ids=(1, 1, -100)), 64, "a batch")


def test_every_id_of_the_vocabulary_passes_and_so_does_what_is_masked_out():
    require_known_tokens(batch(), 64, "a batch")
    require_known_tokens({"input_ids": torch.arange(64)[None]}, 64, "a batch")
    masked = batch(input_ids=(3, 15, 999), attention_mask=(3, 15, 0), labels=(3, 15, 999))
    require_known_tokens(masked, 64, "a batch")

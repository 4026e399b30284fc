"""Segments: offsets in, everything that follows from them out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moxe.ops.segments import Segments


@given(lengths=st.lists(st.integers(0, 9), max_size=12), data=st.data())
def test_everything_follows_from_the_lengths(lengths: list[int], data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    offsets = (0, *sorted(cuts), len(lengths))
    segments = Segments.from_lengths(lengths, offsets)

    assert segments.num_segments == len(lengths)
    assert segments.num_tokens == sum(lengths)
    assert segments.num_groups == len(offsets) - 1
    assert segments.lengths.tolist() == lengths
    assert segments.cu_seqlens.tolist() == [sum(lengths[:g]) for g in range(len(lengths) + 1)]
    assert segments.row_offsets == tuple(sum(lengths[:first]) for first in offsets)
    tokens = [(g, t) for g, length in enumerate(lengths) for t in range(length)]
    assert segments.segment_of_token.tolist() == [g for g, _ in tokens]
    assert segments.position_of_token.tolist() == [t for _, t in tokens]


@given(lengths=st.lists(st.integers(0, 9), max_size=12))
def test_without_group_offsets_there_is_one_group_of_all_segments(lengths: list[int]):
    segments = Segments.from_lengths(lengths)
    assert segments.group_offsets == (0, len(lengths))
    assert segments.row_offsets == (0, sum(lengths))


def test_lengths_may_be_a_tensor():
    assert Segments.from_lengths(torch.tensor([2, 3], dtype=torch.int32)).cu_seqlens.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, 2]), r"start at 0 and never decrease, got \[1, 2\]"),
        (torch.tensor([0, 3, 2]), r"start at 0 and never decrease, got \[0, 3, 2\]"),
        (torch.tensor([0, 3], dtype=torch.int32), "int32"),
        (torch.tensor([0.0, 3.0]), "float32"),
        (torch.tensor([[0, 3]]), r"\(1, 2\)"),
        (torch.zeros(0, dtype=torch.int64), r"\(0,\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_offsets_that_are_none_are_refused(cu_seqlens: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Segments(cu_seqlens)


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"never decrease, got \[0, 2, 1\]"):
        Segments.from_lengths([2, -1])


@pytest.mark.parametrize("group_offsets", [(1, 2), (0, 1), (0, 3), (0, 2, 1, 2), (0, -1, 2)])
def test_group_offsets_that_do_not_rise_from_0_to_the_number_of_segments_are_refused(group_offsets: tuple[int, ...]):
    with pytest.raises(ValueError, match="group_offsets must rise from 0 to G=2"):
        Segments.from_lengths([3, 4], group_offsets)

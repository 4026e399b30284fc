"""Segment layouts that every op over segments is tried on."""

from __future__ import annotations

from moxe.ops.segments import Segments

# Lengths of the segments, and the first segment of each group (and the number of segments behind the last).
LAYOUTS: dict[str, tuple[list[int], tuple[int, ...]]] = {
    "one token": ([1], ()),
    "odd length": ([23], ()),
    "no segments": ([], ()),
    "segments without tokens": ([0, 0, 0], ()),
    "empty segments between": ([0, 7, 0, 0, 3, 0], ()),
    "decoding step": ([1, 1, 1, 1, 1], ()),
    "unequal lengths": ([5, 1, 13, 2, 29, 8, 1], ()),
    "three groups": ([4, 9, 0, 1, 17, 3], (0, 2, 3, 6)),
    "groups without segments or tokens": ([6, 2, 0, 11], (0, 0, 2, 2, 3, 4, 4)),
}


def segments_of(layout: str) -> Segments:
    lengths, group_offsets = LAYOUTS[layout]
    return Segments.from_lengths(lengths, group_offsets)


def group_of_segment(segments: Segments) -> list[int]:
    offsets = segments.group_offsets
    return [e for e in range(segments.num_groups) for _ in range(offsets[e], offsets[e + 1])]

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k25lite.vision.packing import PackedLayout, Segments, check_grids

CPU = torch.device("cpu")
side = st.integers(1, 4).map(lambda n: 2 * n)
batches = st.lists(st.tuples(st.integers(1, 4), side, side), min_size=1, max_size=12)


def pool_one_by_one(hidden: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
    """The definition, item after item: mean over frames, then each 2x2 block in raster order."""
    out, start = [], 0
    for t, h, w in grids:
        frames = hidden[start : start + t * h * w].view(t, h, w, -1).mean(0)
        out += [frames[y : y + 2, x : x + 2].flatten(0, 1) for y in range(0, h, 2) for x in range(0, w, 2)]
        start += t * h * w
    return torch.stack(out)


@given(batches)
def test_order_is_a_permutation_and_to_raster_undoes_it(grids):
    layout = PackedLayout.of(grids, 2, CPU)
    patches = sum(t * h * w for t, h, w in grids)
    assert sorted(layout.order.tolist()) == list(range(patches))
    hidden = torch.randn(patches, 3)
    torch.testing.assert_close(layout.to_raster(hidden[layout.order]), hidden)


@given(batches)
def test_merged_is_the_mean_over_frames_then_2x2_blocks_in_item_order(grids):
    hidden = torch.randn(sum(t * h * w for t, h, w in grids), 3)
    layout = PackedLayout.of(grids, 2, CPU)
    torch.testing.assert_close(layout.merged(hidden[layout.order]), pool_one_by_one(hidden, grids))


@given(batches)
def test_without_pooling_each_frame_keeps_its_own_tokens(grids):
    hidden = torch.randn(sum(t * h * w for t, h, w in grids), 3)
    layout = PackedLayout.of(grids, 2, CPU)
    as_images = [(1, h, w) for t, h, w in grids for _ in range(t)]
    torch.testing.assert_close(layout.merged(hidden[layout.order], False), pool_one_by_one(hidden, as_images))


@given(batches, st.integers(1, 200))
def test_blocks_cover_the_batch_in_order_and_respect_the_limit(grids, limit):
    layout = PackedLayout.of(grids, 2, CPU)
    blocks = layout.blocks(limit)
    assert [grid for block in blocks for grid in block.grids] == layout.grids
    torch.testing.assert_close(torch.cat([block.order for block in blocks]), layout.order)
    for block in blocks:
        assert len(block.order) == sum(block.segments().lengths)
        assert len(block.order) <= limit or len(block.grids) == 1


@given(batches)
def test_equal_lengths_are_neighbours_so_each_length_is_one_run(grids):
    segments = PackedLayout.of(grids, 2, CPU).segments()
    lengths = [length for _, length in segments.runs]
    # At most one run per (frames, length): a 1 x 16 image and a 4 x 4 chunk have equal length but are pooled differently.
    assert len(lengths) <= len({(t, t * h * w) for t, h, w in grids})
    assert segments.cu_seqlens.tolist() == [0, *np.cumsum(segments.lengths).tolist()]


def test_position_and_frame_by_hand():
    layout = PackedLayout.of([(2, 2, 4)], 2, CPU)
    # raster 0 1 2 3 / 4 5 6 7 -> blocks (0 1 4 5) (2 3 6 7), the same in both frames
    assert layout.order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert layout.position.tolist() == [0, 1, 4, 5, 2, 3, 6, 7] * 2
    assert layout.frame.tolist() == [1] * 8 + [2] * 8
    assert PackedLayout.of([(1, 2, 2)], 2, CPU).frame.tolist() == [0] * 4


def test_segments_per_frame_when_attention_must_not_cross_frames():
    layout = PackedLayout.of([(3, 2, 2), (1, 2, 4)], 2, CPU)
    assert layout.segments(space_time=True).lengths == (8, 12)
    assert layout.segments(space_time=False).lengths == (8, 4, 4, 4)
    assert Segments((4, 4, 8), CPU).runs == [(2, 4), (1, 8)]


@pytest.mark.parametrize(
    ("grid_thw", "patches", "message"),
    [
        ([[1, 4, 4]], 15, "describes 16 patches, but pixel_values holds 15"),
        ([[1, 4, 4], [5, 2, 2]], 36, r"grid_thw\[1\] = \[5, 2, 2\]: a chunk has 1 to 4 frames"),
        ([[0, 4, 4]], 0, r"grid_thw\[0\] = \[0, 4, 4\]: a chunk has 1 to 4 frames"),
        ([[1, 3, 4]], 12, "positive multiples of 2"),
        ([[1, 0, 4]], 0, "positive multiples of 2"),
        ([[4, 4]], 16, r"must be \[items, 3\] integers"),
        ([[1.0, 4.0, 4.0]], 16, r"must be \[items, 3\] integers"),
    ],
)
def test_grids_that_cannot_be_are_named(grid_thw, patches, message):
    with pytest.raises(ValueError, match=message):
        check_grids(torch.tensor(grid_thw), patches, max_frames=4, merge=2)


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        check_grids(torch.zeros(0, 3, dtype=torch.long), 0, max_frames=4, merge=2)

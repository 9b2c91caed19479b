"""The geometry of a packed batch: everything about it that depends on the grids alone, never on a pixel.

A batch of images and video chunks is one long sequence of patches. `grid_thw` says how to read it: item i is `t` frames of
`h x w` patches, in raster order, frame after frame. Inside the encoder the same patches stand in another order, chosen so
that every later step is a view instead of a gather:

- items of equal (t, h*w) are neighbours, so their attention is one batched call;
- inside a frame the four patches of a 2x2 merge block are neighbours, so the spatial merge is a reshape;
- the frames of an item follow each other, so temporal pooling is a mean over one axis of a reshape.

Attention does not mind: position and time enter by embeddings, not by the order in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import torch

Grid = tuple[int, int, int]  # frames, rows of patches, columns of patches


def check_grids(grid_thw: torch.Tensor, patches: int, *, max_frames: int, merge: int) -> list[Grid]:
    """The grids as plain integers, or a ValueError that names the item that cannot be.

    Args:
        grid_thw: [items, 3] integers, (frames, rows, columns) in patches.
        patches: how many patches came with them.
        max_frames: longest chunk the encoder has a temporal embedding for.
        merge: rows and columns must be multiples of this.
    """
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        raise ValueError(f"grid_thw must be [items, 3] integers, got {grid_thw.dtype} {list(grid_thw.shape)}")
    if not len(grid_thw):
        raise ValueError("grid_thw is empty: there is nothing to encode")
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    for index, (t, h, w) in enumerate(grids):
        if not 1 <= t <= max_frames:
            raise ValueError(f"grid_thw[{index}] = {[t, h, w]}: a chunk has 1 to {max_frames} frames")
        if h < merge or w < merge or h % merge or w % merge:
            raise ValueError(f"grid_thw[{index}] = {[t, h, w]}: rows and columns must be positive multiples of {merge}")
    expected = sum(t * h * w for t, h, w in grids)
    if expected != patches:
        raise ValueError(f"grid_thw describes {expected} patches, but pixel_values holds {patches}")
    return grids


@dataclass(frozen=True)
class Segments:
    """Who may attend to whom: the sequence is cut into consecutive segments, and attention stays inside each.

    Attributes:
        lengths: tokens per segment, in sequence order.
        device: where `cu_seqlens` lives.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(segments, length) of each run of neighbours that are equally long."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """[segments + 1] int32, cumulative lengths: what variable-length kernels read."""
        return torch.tensor(np.cumsum([0, *self.lengths]), dtype=torch.int32).to(self.device, non_blocking=True)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class PackedLayout:
    """How a batch stands inside the encoder.

    Attributes:
        grids: the items' grids in the encoder's order.
        sizes: the different (h, w) among them. Position tables hold one row per patch of each size,
            in raster order, size after size.
        order: [patches] index that takes raster patches, as given, to the encoder's order.
        position: [patches] row of the position tables for each patch, in the encoder's order.
        frame: [patches] 0 in an image, f + 1 in frame f of a chunk, in the encoder's order.
        items: the place, among the given items, of each item in the encoder's order.
    """

    grids: list[Grid]
    sizes: list[tuple[int, int]]
    order: torch.Tensor
    position: torch.Tensor
    frame: torch.Tensor
    items: list[int]
    merge: int

    @classmethod
    def of(cls, grids: Sequence[Grid], merge: int, device: torch.device) -> PackedLayout:
        starts = np.cumsum([0] + [t * h * w for t, h, w in grids])
        items = sorted(range(len(grids)), key=lambda i: (grids[i][0], grids[i][1] * grids[i][2], grids[i]))
        sizes = sorted({(h, w) for _, h, w in grids})
        rows = dict(zip(sizes, np.cumsum([0] + [h * w for h, w in sizes]), strict=False))
        parts: list[np.ndarray] = []
        for (t, h, w), same in groupby(items, key=lambda i: grids[i]):
            members = starts[list(same)]
            raster, within, frame = _item_order(t, h, w, merge)
            parts.append(
                np.stack(
                    [
                        (members[:, None] + raster).ravel(),
                        np.tile(within + rows[h, w], len(members)),
                        np.tile(frame, len(members)),
                    ]
                )
            )
        order, position, frames = torch.from_numpy(np.concatenate(parts, axis=1)).to(device, non_blocking=True)
        return cls([grids[i] for i in items], sizes, order, position, frames, items, merge)

    @property
    def device(self) -> torch.device:
        return self.order.device

    def segments(self, space_time: bool = True) -> Segments:
        """One segment per item, or per frame when attention is not to cross frames."""
        lengths = [t * h * w if space_time else h * w for t, h, w in self.grids for _ in range(1 if space_time else t)]
        return Segments(tuple(lengths), self.device)

    def blocks(self, tokens: int) -> list[PackedLayout]:
        """The same batch as consecutive blocks of whole items, each of at most `tokens` patches where an item allows it.

        Items never look at each other, so running the encoder block by block gives the same result; small blocks keep
        the activations of a layer in the processor's cache.
        """
        cuts, filled = [0], 0
        for index, (t, h, w) in enumerate(self.grids):
            if filled and filled + t * h * w > tokens:
                cuts.append(index)
                filled = 0
            filled += t * h * w
        blocks, start = [], 0
        for first, last in zip(cuts, [*cuts[1:], len(self.grids)], strict=True):
            stop = start + sum(t * h * w for t, h, w in self.grids[first:last])
            blocks.append(
                PackedLayout(
                    self.grids[first:last],
                    self.sizes,
                    self.order[start:stop],
                    self.position[start:stop],
                    self.frame[start:stop],
                    self.items[first:last],
                    self.merge,
                )
            )
            start = stop
        return blocks

    def to_raster(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, hidden] in the encoder's order -> in the order the patches were given."""
        return torch.empty_like(hidden).index_copy(0, self.order, hidden)

    def merged(self, hidden: torch.Tensor, temporal_pooling: bool = True) -> torch.Tensor:
        """[patches, hidden] in the encoder's order -> [merged tokens, merge * merge, hidden], items as given.

        Report, section 4.2: the mean over the frames of a chunk, then 2x2 neighbours side by side. Without pooling every
        frame keeps its own tokens.
        """
        area, width = self.merge**2, hidden.shape[-1]
        groups = [(t, m, len(list(same))) for (t, m), same in groupby((t, h * w) for t, h, w in self.grids)]
        parts = []
        # split, not slices: the backward of each slice would fill a tensor of the whole batch with zeros.
        for (t, m, n), part in zip(groups, hidden.split([t * m * n for t, m, n in groups]), strict=True):
            if temporal_pooling and t > 1:
                part = part.view(n, t, m, width).mean(dim=1)  # (n t m) c -> n m c
            parts.append(part.reshape(-1, area, width))
        merged = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.items == list(range(len(self.items))):
            return merged
        lengths = np.array([(1 if temporal_pooling else t) * h * w // area for t, h, w in self.grids])
        starts = np.cumsum(lengths) - lengths
        back = np.concatenate([starts[i] + np.arange(lengths[i]) for i in np.argsort(self.items)])
        return merged[torch.from_numpy(back).to(self.device, non_blocking=True)]


@lru_cache(maxsize=256)  # of a large chunk each holds a megabyte
def _item_order(t: int, h: int, w: int, merge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the patches of one item in the encoder's order: raster index in the item, raster index in the frame, frame."""
    raster = np.arange(h * w).reshape(h // merge, merge, w // merge, merge)
    within = np.tile(raster.transpose(0, 2, 1, 3).ravel(), t)  # (h p) (w q) -> (h w p q), once per frame
    frame = np.repeat(np.arange(t), h * w)
    return within + frame * (h * w), within, frame + (t > 1)

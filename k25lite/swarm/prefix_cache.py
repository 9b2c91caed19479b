"""Prefix caching: the key-value cache of the conversations that a language model has read, for those that go on from there.

An agent sends its whole conversation at every step, and agents of a team begin alike. Serving engines keep the keys and
values of what they have read (vLLM's automatic prefix caching, SGLang's RadixAttention). Simplified: whole sequences and no
tree of blocks, so that a beginning which several share is kept once for each.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache

Ids = tuple[int, ...]
Layers = list[tuple[Tensor, Tensor]]  # of each layer the keys and values, [heads, tokens, head size]; [] of no tokens


class PrefixCache:
    """Keys and values of token sequences, those that were used last.

    Args:
        capacity: tokens kept, at most; a sequence that is longer is not kept.
    """

    def __init__(self, capacity: int):
        self.capacity, self.tokens = capacity, 0
        self._kept = dict[Ids, Layers]()  # the one that was used last is last
        self._sorted: list[Ids] = []  # neighbours in this order have the longest beginnings in common

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int]) -> Layers:
        """Of as many tokens at the beginning of `ids` as are known."""
        wanted = tuple(ids)
        place = bisect_right(self._sorted, wanted)
        near = self._sorted[max(place - 1, 0) : place + 1]
        count, known = max(((_in_common(each, wanted), each) for each in near), default=(0, ()))
        if not count:
            return []
        self._kept[known] = layers = self._kept.pop(known)
        return [(keys[:, :count], values[:, :count]) for keys, values in layers]

    def keep(self, ids: Sequence[int], layers: Layers) -> None:
        """Keep a sequence, in the place of the one that it goes on from."""
        new = tuple(ids)
        if len(new) > self.capacity:
            return
        place = bisect_left(self._sorted, new)
        if place < len(self._sorted) and self._sorted[place][: len(new)] == new:
            return  # it is the beginning of one that is kept
        if place and self._sorted[place - 1] == new[: len(self._sorted[place - 1])]:
            place -= 1
            self._drop(place)
        self._sorted.insert(place, new)
        self._kept[new] = layers
        self.tokens += len(new)
        while self.tokens > self.capacity:
            self._drop(bisect_left(self._sorted, next(iter(self._kept))))

    def clear(self) -> None:
        self._kept.clear()
        self._sorted.clear()
        self.tokens = 0

    def _drop(self, place: int) -> None:
        ids = self._sorted.pop(place)
        del self._kept[ids]
        self.tokens -= len(ids)


def _in_common(first: Ids, second: Ids) -> int:
    """Tokens at the beginning that are the same."""
    short = min(len(first), len(second))
    if first[:short] == second[:short]:
        return short
    return next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)


def length(layers: Layers) -> int:
    """Tokens."""
    return layers[0][0].shape[1] if layers else 0


def joined(rows: Sequence[Layers]) -> DynamicCache:
    """One cache for a batch, padded at the beginning; at least one row is not empty."""
    columns = max(map(length, rows))
    cache = DynamicCache()
    for index, layer in enumerate(next(filter(None, rows))):
        whole = [of.new_zeros(len(rows), len(of), columns, of.shape[-1]) for of in layer]
        for row, layers in enumerate(rows):
            if layers:
                for padded, of in zip(whole, layers[index], strict=True):
                    padded[row, :, columns - length(layers) :] = of
        cache.update(*whole, index)
    return cache

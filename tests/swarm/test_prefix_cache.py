"""What is kept of token sequences: the longest beginning is found, what was used last stays, and no more than allowed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from k25lite.swarm.prefix_cache import Layers, PrefixCache, joined, length

sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def layers_of(ids: list[int]) -> Layers:
    """Two layers of two heads, whose keys tell the tokens and whose values tell where they stand."""
    keys = torch.tensor(ids, dtype=torch.float32).expand(2, -1)[..., None].repeat(1, 1, 3)
    places = torch.arange(len(ids), dtype=torch.float32).expand(2, -1)[..., None].repeat(1, 1, 5)
    return [(keys, places), (keys + 0.5, places)]


@given(st.lists(sequences, max_size=12), sequences)
def test_the_longest_known_beginning_is_found(kept, wanted):
    cache = PrefixCache(1000)
    for ids in kept:
        cache.keep(ids, layers_of(ids))
    longest = max(n for n in range(len(wanted) + 1) if not n or any(ids[:n] == wanted[:n] for ids in kept))
    found = cache.find(wanted)
    assert length(found) == longest
    for (keys, places), (expected, numbered) in zip(found, layers_of(wanted[:longest]), strict=False):
        assert torch.equal(keys, expected)
        assert torch.equal(places, numbered)


@given(st.lists(st.tuples(sequences, sequences), max_size=20), st.integers(0, 20))
def test_no_more_is_kept_than_allowed_and_no_beginning_twice(work, capacity):
    cache = PrefixCache(capacity)
    for ids, wanted in work:
        cache.keep(ids, layers_of(ids))
        cache.find(wanted)
        kept = list(cache._kept)
        assert cache._sorted == sorted(kept)
        assert cache.tokens == sum(map(len, kept)) <= capacity
        assert not any(one != other and one == other[: len(one)] for one in kept for other in kept)


def test_what_was_used_longest_ago_goes_first():
    cache = PrefixCache(9)
    for ids in ([1, 1, 1], [2, 2, 2], [3, 3, 3]):
        cache.keep(ids, layers_of(ids))
    assert length(cache.find([1, 1])) == 2  # used again
    cache.keep([4, 4], layers_of([4, 4]))
    assert [length(cache.find([n] * 3)) for n in (1, 2, 3, 4)] == [3, 0, 3, 2]
    cache.keep([5] * 10, layers_of([5] * 10))  # more than fits at all: nothing goes for it
    assert [length(cache.find([n] * 3)) for n in (1, 3, 4, 5)] == [3, 3, 2, 0]


def test_rows_are_joined_at_their_ends():
    cache = joined([layers_of([7, 8]), [], layers_of([1, 2, 3])])
    assert cache.get_seq_length() == 3
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[0, 7, 8], [0, 0, 0], [1, 2, 3]]
    assert cache.layers[1].values[:, 1, :, 4].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 2]]

import pytest
import torch
import torch.nn.functional as F

from k25lite.vision.attention import dense_attention_map, has_varlen_kernel, packed_attention
from k25lite.vision.packing import Segments


def one_by_one(query, key, value, lengths):
    parts = zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
    )


@pytest.mark.parametrize("lengths", [(7,), (4, 4, 4), (3, 5, 5, 2, 5, 1)])
def test_packed_equals_one_by_one(lengths):
    query, key, value = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64)
    packed = packed_attention(query, key, value, Segments(lengths, query.device))
    torch.testing.assert_close(packed, one_by_one(query, key, value, lengths))


def test_dense_map_is_block_diagonal_and_gives_the_same_output():
    lengths = (3, 5, 2)
    query, key, value = torch.randn(3, 10, 2, 8)
    weights = dense_attention_map(query, key, Segments(lengths, query.device))
    inside = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    assert (weights[:, ~inside] == 0).all()
    assert (weights[:, inside] > 0).all()
    torch.testing.assert_close(
        torch.einsum("hqk,khd->qhd", weights, value), one_by_one(query, key, value, lengths), atol=1e-5, rtol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_kernel_equals_one_by_one_in_half_precision():
    lengths = (3, 64, 64, 17, 1)
    query, key, value = torch.randn(3, sum(lengths), 4, 32, device="cuda").unbind()
    half = [x.bfloat16() for x in (query, key, value)]
    assert has_varlen_kernel(half[0].device, torch.bfloat16)
    packed = packed_attention(*half, Segments(lengths, query.device))
    torch.testing.assert_close(packed.float(), one_by_one(query, key, value, lengths), atol=2e-2, rtol=2e-2)

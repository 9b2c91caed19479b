"""Attention inside the segments of a packed sequence, without ever forming an [L, L] mask."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F

from k25lite.vision.packing import Segments


def packed_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Softmax attention of every token to the tokens of its own segment.

    Two ways to the same numbers. In half precision on a GPU of compute capability 8.0 or more: one variable-length
    flash kernel for all segments. Elsewhere: one batched call per run of equally long neighbours, which
    `PackedLayout` makes few.

    Args:
        query, key, value: [tokens, heads, head_dim].
        segments: cuts the tokens; its lengths add up to `tokens`.

    Returns:
        [tokens, heads, head_dim].
    """
    if has_varlen_kernel(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = segments.cu_seqlens, segments.max_seqlen
        return cast(torch.Tensor, varlen_attn(query, key, value, cu, cu, longest, longest))
    # split, not slices: the backward of a slice fills a whole tensor with zeros, that of a split is one concatenation.
    tokens = [n * length for n, length in segments.runs]
    outputs = []
    for run, *parts in zip(segments.runs, *(x.split(tokens) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(0, run).transpose(1, 2) for part in parts)  # (n l) H D -> n H l D
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@cache
def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length flash kernel runs there: CUDA, compute capability >= 8.0, half precision."""
    return dtype in (torch.float16, torch.bfloat16) and has_bf16(device)


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 pays there: CUDA, compute capability >= 8.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def dense_attention_map(query: torch.Tensor, key: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The attention weights as one [heads, tokens, tokens] matrix, zero across segments. For looking and for tests:
    its size is quadratic, so keep it to a few hundred tokens."""
    segment = torch.repeat_interleave(torch.tensor(segments.lengths, device=query.device))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * query.shape[-1] ** -0.5
    return scores.masked_fill(segment[:, None] != segment, -torch.inf).softmax(-1)

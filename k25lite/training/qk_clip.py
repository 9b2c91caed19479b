"""QK-Clip: bounds the attention logits by scaling the query and key weights of the heads that went too far.

Source: Kimi K2 report (arXiv 2507.20534, section 2.1). Not covered: attention that normalises its queries and keys, whose
logits are bounded as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_max_logits"
# Logits held at once while their maxima are sought: about a CPU core's second-level cache; enough work for a GPU.
CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**25}


class QKClip:
    """Watch the attention logits of a model, and scale down the heads in which they exceed a threshold.

    It finds the trainable layers of transformers' multi-head latent attention (DeepseekV3), and of attention with separate
    query and key projections (Llama). `MuonClip` drives it; any other optimiser can: `step(number)` after its own step.

    Attributes:
        layers: name -> attention module.
        highest, clipped: [heads of all layers] the maxima at the last recorded step and which were clipped; None before.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0, every: int = 1):
        if threshold <= 0 or every < 1:
            raise ValueError(f"the threshold and the interval must be positive, got {threshold} and {every}")
        self.threshold, self.every = threshold, every
        self.layers: dict[str, Any] = {name: module for name, module in model.named_modules() if can_clip(module)}
        if not self.layers:
            raise ValueError("QK-Clip finds no trainable attention it can clip; qk_clip_threshold=None switches it off")
        for name, module in self.layers.items():
            if module.config._attn_implementation not in ("sdpa", ATTENTION):
                raise ValueError(f'QK-Clip needs the attention implementation "sdpa"; {name} has another')
        for module in self.layers.values():
            module.config._attn_implementation = ATTENTION
        self.heads = [module.config.num_attention_heads for module in self.layers.values()]
        self.highest: torch.Tensor | None = None
        self.clipped: torch.Tensor | None = None
        self.record(0)

    def record(self, number: int) -> None:
        """Forget the maxima so far; from now on record them if they are due at step `number` (from 0)."""
        for module, heads in zip(self.layers.values(), self.heads, strict=True):
            module.max_logits = torch.full((heads,), -torch.inf, device=query_projection(module).weight.device)
            module.record_max_logits = number % self.every == 0

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Clip if step `number` was recorded, and prepare for the next. Every process must call it."""
        if number % self.every == 0:
            self.highest = torch.cat([module.max_logits for module in self.layers.values()])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(self.highest, dist.ReduceOp.MAX)
            # An infinite logit would scale its head to zero. No branch on the outcome: a GPU would have to wait for it.
            self.clipped = (self.highest > self.threshold) & self.highest.isfinite()
            gamma = torch.where(self.clipped, self.threshold / self.highest, 1.0)
            for module, factors in zip(self.layers.values(), gamma.split(self.heads), strict=True):
                scale_logits(module, factors)
        self.record(number + 1)


def query_projection(attention: Any) -> nn.Linear:
    """The linear layer whose output is the queries; a DeepseekV3 may have a bottleneck before it."""
    return attention.q_proj if getattr(attention, "q_b_proj", None) is None else attention.q_b_proj


def can_clip(module: Any) -> bool:
    """Whether it is a trainable attention layer of transformers, of a kind that `scale_logits` knows."""
    latent, plain = hasattr(module, "kv_b_proj"), hasattr(module, "k_proj") and not hasattr(module, "q_norm")
    known = hasattr(module, "q_proj") and hasattr(module, "config") and (latent or plain)
    return known and query_projection(module).weight.requires_grad


def scale_logits(attention: Any, gamma: torch.Tensor) -> None:
    """Multiply the logits of each head by its factor, gamma [heads], in place, through the query and key weights.

    Latent attention: sqrt(gamma) on either side of the part without position; gamma on the rotary queries, because all
    heads share the rotary key (K2 report, section 2.1). Grouped queries share their key as well: gamma on the queries.
    """

    def by_head(parameter: torch.Tensor) -> torch.Tensor:  # heads rows columns, or heads rows 1 for a bias
        return parameter.view(len(gamma), -1, *parameter.shape[1:] or [1])

    gamma = gamma[:, None, None]
    query, root = query_projection(attention), gamma.sqrt()
    if hasattr(attention, "kv_b_proj"):
        nope = attention.qk_nope_head_dim
        by_head(query.weight)[:, :nope].mul_(root)
        by_head(query.weight)[:, nope:].mul_(gamma)
        by_head(attention.kv_b_proj.weight)[:, :nope].mul_(root)
        return
    shared = attention.config.num_key_value_heads < len(gamma)
    for parameter in query.parameters():
        by_head(parameter).mul_(gamma if shared else root)
    for parameter in () if shared else attention.k_proj.parameters():
        by_head(parameter).mul_(root)


@torch.no_grad()
def max_logits(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, causal: bool
) -> torch.Tensor:
    """The largest logit of each head over all pairs of tokens that attend, a chunk of queries at a time.

    Args:
        query, key: [batch, heads, length, head_dim]; the key may have fewer heads, each for several of the query's.
        mask: [batch or 1, heads or 1, queries, keys], True (or 0 if additive) where a query sees a key. A query that does
            not see itself is padding and does not count. None: `causal` decides.

    Returns:
        [heads] float32; minus infinity where no pair attends.
    """
    batch, heads, length, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1) if key.shape[1] < heads else key
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask == 0
        if mask.shape[-2] == mask.shape[-1]:
            mask = mask & mask.diagonal(dim1=-2, dim2=-1)[..., None]
    highest = torch.full((heads,), -torch.inf, device=query.device)
    rows = max(1, CHUNK_LOGITS.get(query.device.type, 2**20) // (batch * heads * key.shape[2]))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        logits = query[:, :, start:stop] @ (key[:, :, :stop] if causal else key).mT  # batch heads rows keys
        # Adding is many times faster on a CPU than filling by a mask that is shared by the heads.
        if causal:
            logits += torch.full(logits.shape[-2:], -torch.inf, device=query.device).triu(start + 1)
        elif mask is not None:
            logits += torch.where(mask[:, :, start:stop], 0.0, -torch.inf)
        highest = torch.maximum(highest, logits.amax(dim=(0, 2, 3)))
    return highest * scaling


def sdpa_max_logits(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs):
    """transformers' sdpa attention, which first adds the maxima of its logits to `module.max_logits` if they are due."""
    if torch.is_grad_enabled() and getattr(module, "record_max_logits", False):
        causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        causal = causal and attention_mask is None and query.shape[2] > 1  # as sdpa_attention_forward has it
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        highest = max_logits(query, key, attention_mask, scaling, causal)
        module.max_logits = torch.maximum(module.max_logits.to(query.device), highest)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, sdpa_max_logits)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

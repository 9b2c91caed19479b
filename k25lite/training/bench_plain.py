"""A decoder in plain PyTorch: what a language model of transformers is measured against, and what both compute.

Not covered: generation; grouped queries, biases, anything that Llama added to this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from k25lite.bench import SUBJECT, Disagreement, refuse_difference, relative_difference
from k25lite.model import K25Lite
from k25lite.training.loop import Batch
from k25lite.vision.bench import count_flops as count_vision_flops

PLAIN = "plain PyTorch decoder"
PARAMETERS = 0.05  # share by which the number of active parameters may differ
LEAK = 1e-3  # relative difference of logits that rounding explains


class PlainDecoder(nn.Module):
    """A decoder as one writes it without a library: RMSNorm, rotary multi-head attention, SwiGLU, tied embeddings.

    It masks as training does: a token sees itself and what precedes it in its document, which begins at position 0.

    Args:
        parameters: how many it should have, the embedding included; the width of the MLP is chosen for that, in eights.
    """

    frequency: torch.Tensor

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, parameters: int):
        super().__init__()
        rest = parameters - vocabulary * width - width - layers * (4 * width**2 + 2 * width)
        mlp = 8 * max(1, round(rest / (3 * width * layers) / 8))
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(PlainLayer(width, heads, mlp) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.02)
        dim = width // heads
        self.register_buffer("frequency", 10000 ** -(torch.arange(0, dim, 2) / dim), persistent=False)
        self.attention_width = layers * 2 * width

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> CausalLMOutput:
        """[rows, length] -> logits [rows, length, vocabulary]."""
        angle = (position_ids[..., None] * self.frequency)[:, None]  # rows 1 length dim/2
        document = (position_ids == 0).cumsum(1)
        mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # rows 1 queries keys
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, angle.cos(), angle.sin(), mask)
        return CausalLMOutput(logits=F.linear(self.norm(hidden), self.embedding.weight))


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * mlp, bias=False), nn.Linear(mlp, width, bias=False)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        def rotate(x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, dim=-1)
            return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)

        qkv = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1))  # b l 3 h d
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # b h l d each
        seen = F.scaled_dot_product_attention(rotate(query), rotate(key), value, attn_mask=mask)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def active_parameters(model: Any, dimensions: int = 1) -> int:
    """Parameters that a token meets, of so many dimensions or more; of stacked experts only its own."""
    count = 0
    for parameter in model.parameters():
        if parameter.ndim >= dimensions:
            stacked = parameter.ndim == 3  # experts rows columns
            count += parameter[: model.config.num_experts_per_tok].numel() if stacked else parameter.numel()
    return count


def count_flops(model: K25Lite | PlainDecoder, batch: Batch) -> float:
    """Floating-point operations of the matrix products of one forward pass, a multiply-add being two.

    Every matrix once per token, the tied embedding as the head; attention over whole rows, which masks do not spare.
    """
    rows, context = batch["input_ids"].shape
    if isinstance(model, PlainDecoder):
        return 2 * rows * context * (active_parameters(model, 2) + context * model.attention_width)
    text = model.config.text_config
    heads = text.num_hidden_layers * text.num_attention_heads
    attention = context * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    flops = 2 * rows * context * (active_parameters(model.language_model, 2) + attention)
    if "grid_thw" in batch:
        grids = [(t, h, w) for t, h, w in batch["grid_thw"].tolist()]
        projector = active_parameters(model.mm_projector, 2)
        flops += count_vision_flops(model.vision_tower.config, grids)
        flops += 2 * projector * sum(h * w // 4 for _, h, w in grids)
    return flops


def refuse_unequal_work(case: str, plain: PlainDecoder, ours: K25Lite, batch: Batch) -> None:
    """Raise Disagreement unless both have as many active parameters, and keep the future and other documents apart."""
    ratio = active_parameters(plain) / active_parameters(ours.language_model)
    refuse_difference(case, PLAIN, "active parameters", abs(ratio - 1), PARAMETERS)
    begin = int((batch["position_ids"][0] == 0).nonzero()[1])  # of the second document of the first row
    part = slice(begin, begin + 4)
    ids, positions = batch["input_ids"][:1], batch["position_ids"][:1]
    models: dict[str, nn.Module] = {SUBJECT: ours, PLAIN: plain}
    for who, model in models.items():
        with torch.no_grad():
            among = model(input_ids=ids, position_ids=positions).logits[:, part]
            alone = model(input_ids=ids[:, part], position_ids=positions[:, part]).logits
        if not relative_difference({"logits": among}, {"logits": alone}) <= LEAK:
            raise Disagreement(f"{case}: {who} lets a token see its future or another document; not timed")

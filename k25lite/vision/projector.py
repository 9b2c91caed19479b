"""The projector: merged vision tokens into the language model's embedding space."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

from k25lite.vision.checkpoint import read_vision


class Projector(nn.Module):
    """LayerNorm -> four neighbours side by side -> Linear -> GELU -> Linear (report, section 4.2).

    Args:
        hidden_size: width of the encoder.
        text_hidden_size: width of the language model.
        merge: side of the block of patches that becomes one token.
    """

    def __init__(self, hidden_size: int, text_hidden_size: int, merge: int = 2, eps: float = 1e-5):
        super().__init__()
        merged = hidden_size * merge**2
        self.pre_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.in_proj = nn.Linear(merged, merged)
        self.out_proj = nn.Linear(merged, text_hidden_size)

    def forward(self, pooler_output: torch.Tensor) -> torch.Tensor:
        """[merged tokens, merge * merge, hidden] -> [merged tokens, text hidden]."""
        merged = self.pre_norm(pooler_output).flatten(1)  # n (p q) c -> n (p q c)
        return self.out_proj(nn.functional.gelu(self.in_proj(merged)))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike, **hub: Any) -> Projector:
        """The projector of a full Kimi K2.5 repository; the language model's shards are neither fetched nor read.

        Args:
            hub: see `read_vision`.

        Raises:
            ValueError: the checkpoint holds no projector.
        """
        checkpoint = read_vision(path_or_hub_id, **hub)
        if not checkpoint.projector:
            raise ValueError(f"{path_or_hub_id} holds a vision tower but no projector (mm_projector.*)")
        hidden = checkpoint.projector["pre_norm.weight"].shape[0]
        text_hidden, merged = checkpoint.projector["out_proj.weight"].shape
        projector = cls(hidden, text_hidden, merge=round((merged // hidden) ** 0.5), eps=checkpoint.projector_eps)
        projector.load_state_dict(checkpoint.projector)
        return projector.to(checkpoint.projector["out_proj.weight"].dtype)

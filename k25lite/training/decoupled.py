"""The Decoupled Encoder Process: the encoder's activations are never in memory together with the backbone's.

Source: Kimi K2.5 report, section 4.5: vision forward, keeping its outputs only; the backbone's training step; then vision
forward again, part by part, and backward. Simplified here: one device, so nothing is balanced over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from k25lite.model import K25Lite

ITEMS = 16  # images or chunks recomputed together: fewer take less memory, and more time


def decoupled_backward(
    model: K25Lite,
    vision: Mapping[str, torch.Tensor],
    loss_of: Callable[..., torch.Tensor],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    items: int = ITEMS,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Add to the gradients of all parameters what the loss gives them; the same as without decoupling, up to rounding.

    Args:
        vision: pixel_values [patches, 3, p, p] and grid_thw [items, 3].
        loss_of: the loss, as a function of the keyword `vision_embeds` [vision tokens, text hidden].
        autocast: the context the encoder runs in, as the backbone does in `loss_of`.

    Returns:
        The loss.
    """
    pixel_values, grid_thw = vision["pixel_values"], vision["grid_thw"]
    with torch.no_grad(), autocast():
        vision_embeds = model.encode_vision(pixel_values, grid_thw)
    loss = loss_of(vision_embeds=vision_embeds.requires_grad_())
    backward(loss)
    gradient = vision_embeds.grad
    if gradient is None:  # a loss that does not look
        return loss
    parts = grid_thw.split(items)
    patches = [int(part.prod(1).sum()) for part in parts]
    tokens = [
        int((part[:, 1] * part[:, 2]).sum()) // model.vision_tower.config.merge_kernel_size[0] ** 2 for part in parts
    ]
    for part, pixels, part_gradient in zip(parts, pixel_values.split(patches), gradient.split(tokens), strict=True):
        with autocast():
            again = model.encode_vision(pixels, part)
        torch.autograd.backward(again, part_gradient)
    return loss

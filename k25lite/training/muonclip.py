"""MuonClip: Muon for the hidden matrices, AdamW for the rest, and QK-Clip, which bounds the attention logits.

Source: Kimi K2 report (arXiv 2507.20534, section 2.1); every stage of K2.5 trains with it. Simplified here: each process
holds whole matrices (one device or data parallel, no sharded parameters). Not covered: the vision encoder's attention is
never clipped, nor is attention that normalises its queries and keys, whose logits are bounded as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from k25lite.training.qk_clip import QKClip
from k25lite.vision.attention import has_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Muon's quintic: steepest at zero, singular values end up within 0.7 to 1.2
UPDATE_RMS = 0.2  # that of AdamW's updates in practice (K2 report): one learning rate then serves both
# Projections that one matrix holds one below the other: each is orthogonalised by itself, as if it were stored apart.
FUSED = {"qkv": 3, "gate_up_proj": 2}


class MuonClip(torch.optim.Optimizer):
    """One optimiser for a whole vision-language model, with torch's interface (schedulers, accelerate, exact resume).

    The largest attention logits are recorded in every forward pass with gradients since the last step, so micro-batches
    that accumulate count together, and so do processes. For that the language model's attention is switched from "sdpa"
    to "sdpa_max_logits", which computes the same; the switch is not saved with the model.

    Args:
        model: its trainable parameters, as they are now; `split_parameters` says who gets which rule.
        lr: for both rules: a matrix is updated by 0.2 * sqrt(max(rows, columns)) of an orthogonal one.
        weight_decay: decoupled, for everything with two or more dimensions.
        momentum, ns_steps: of Muon (Nesterov momentum, Newton-Schulz iterations).
        betas, eps: of AdamW.
        qk_clip_threshold: the largest attention logit left alone (the report's tau); None switches QK-Clip off.
        qk_clip_every: record and clip at every n-th step only, for less overhead.
        ns_dtype: of the Newton-Schulz iterations; by default bfloat16 where the hardware multiplies it, else float32.
        slow: prefixes of names of parameters that learn at `slow_scale` times the rate, because they come trained. The
            groups of AdamW carry it as "lr_scale": who sets their "lr" multiplies by it.

    Raises:
        ValueError: a hyperparameter is out of range; or QK-Clip is on, and the model has no trainable attention it can
            clip, or one whose implementation is not "sdpa".
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        qk_clip_threshold: float | None = 100.0,
        qk_clip_every: int = 1,
        ns_dtype: torch.dtype | None = None,
        slow: tuple[str, ...] = (),
        slow_scale: float = 1.0,
    ):
        if not 0 <= momentum < 1 or ns_steps < 1:
            raise ValueError(f"momentum must be in [0, 1) and ns_steps positive, got {momentum} and {ns_steps}")
        hidden, others = split_parameters(model)
        groups: list[dict[str, Any]] = []
        for is_slow in (False, True):
            mine = [p for name, p in others.items() if name.startswith(slow) == is_slow]
            lr_scale = slow_scale if is_slow else 1.0
            common = {"lr": lr * lr_scale, "lr_scale": lr_scale}
            groups.append({"params": [p for p in mine if p.ndim > 1], **common})
            groups.append({"params": [p for p in mine if p.ndim <= 1], "weight_decay": 0.0, **common})
        self._adamw = torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=True)
        muon = {"params": list(hidden.values()), "pieces": [pieces(name) for name in hidden], "steps": 0}
        muon |= {"momentum": momentum, "ns_steps": ns_steps}
        muon |= {"scales": [slow_scale if name.startswith(slow) else 1.0 for name in hidden]}
        super().__init__([muon, *self._adamw.param_groups], {"lr": lr, "weight_decay": weight_decay})
        self.ns_dtype = ns_dtype
        self.qk_clip = None if qk_clip_threshold is None else QKClip(model, qk_clip_threshold, qk_clip_every)

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have a gradient, then clip the heads whose logits went over the threshold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, *rest = self.param_groups
        self._muon_step(muon)
        # torch's own AdamW on this optimiser's groups and state, which load_state_dict replaces by new objects.
        self._adamw.param_groups, self._adamw.state = rest, self.state
        self._adamw.step()
        if self.qk_clip is not None:
            self.qk_clip.step(muon["steps"])
        muon["steps"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.qk_clip is not None:
            self.qk_clip.record(self.param_groups[0]["steps"])

    def _muon_step(self, group: dict[str, Any]) -> None:
        # Matrices of one size, lying or standing, go through the iterations together: small ones alone waste the hardware.
        stacks: dict[tuple, list[tuple[nn.Parameter, float, bool, torch.Tensor]]] = defaultdict(list)
        for p, n, lr_scale in zip(group["params"], group["pieces"], group["scales"], strict=True):
            if p.grad is None:
                continue
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])
            matrices = update.reshape(-1, p.shape[-2] // n, p.shape[-1])  # (experts pieces) rows columns
            stands = matrices.shape[1] > matrices.shape[2]
            matrices = matrices.mT if stands else matrices
            stacks[p.device, p.dtype, *matrices.shape[1:]].append((p, group["lr"] * lr_scale, stands, matrices))
        for (device, _, _, longest), stack in stacks.items():
            together = torch.cat([matrices for *_, matrices in stack])
            updates = newton_schulz(together, group["ns_steps"], self.ns_dtype or fast_dtype(device))
            scale = UPDATE_RMS * math.sqrt(longest)
            for (p, lr, stands, _), part in zip(stack, updates.split([len(m) for *_, m in stack]), strict=True):
                part = (part.mT if stands else part).reshape(p.shape)
                p.mul_(1 - lr * group["weight_decay"]).add_(part, alpha=-lr * scale)


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(by Muon, by AdamW): name -> trainable parameter, each in exactly one of them, a tied one once.

    Muon gets the weights of linear layers and the stacked experts of transformers, [experts, out, in]. AdamW gets all
    else: embeddings, the output head (tied, or named "lm_head"), norms, biases, the patch convolution, the position grid,
    and the router, whose rows, like a head's, score classes of which a token concerns few (Muon would move all equally
    far); also the projector, which embeds what is seen as the table embeds words, and whose square matrix is the largest:
    it alone would take a third of a lite training step.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = set()
    for name, module in model.named_modules():
        embeds = name.rpartition(".")[2] == "lm_head" or "mm_projector" in name.split(".")
        if isinstance(module, nn.Linear) and not embeds and min(module.weight.shape) > 1:
            hidden.add(id(module.weight))
        experts = getattr(module, "num_experts", None)
        hidden.update(id(p) for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) == experts)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: p for name, p in trainable.items() if id(p) in hidden - tables}
    return muon, {name: p for name, p in trainable.items() if name not in muon}


def pieces(name: str) -> int:
    """How many projections the parameter of this name holds one below the other."""
    return next((n for part, n in FUSED.items() if part in name.split(".")[-2:]), 1)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, which takes about half the time of float32; else float32."""
    if device.type == "cuda":
        fast = has_bf16(device)
    else:
        found = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def newton_schulz(matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrices: the same singular vectors, singular values near one.

    Args:
        matrices: [n, rows, columns]; rows <= columns costs least.

    Returns:
        The same shape, in `dtype`; zero where a matrix is zero.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # n rows rows
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

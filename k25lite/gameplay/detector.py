"""The detector: a small MoonViT-3D that tells from a chunk of four frames, or from one picture, what is going on.

Images and chunks go through one set of weights and are packed together in training. The kinds are no classes, for several
may be there at once: each gets a probability of its own. On the way to it every patch says which monsters it shows, for
that is what the game can teach most exactly. Of a video, a few convolutions over time then judge each chunk by its
neighbours, too: one shot is no fight, and what has been fought for ten seconds was no imp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from scipy.special import expit
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from k25lite.gameplay.encounters import MONSTERS
from k25lite.gameplay.events import KINDS
from k25lite.gameplay.spans import SpanRule
from k25lite.vision import MoonViT3D, MoonViT3DConfig, pack


@strict
class DetectorConfig(PreTrainedConfig):
    """The encoder's configuration, what it is shown, and how its probabilities become events.

    Args:
        vision_config: a `MoonViT3DConfig`, or its fields; by default 0.4M parameters, patches of 16 pixels.
        height, width: of a frame in pixels; multiples of patch * merge.
        context_size: features within the convolutions over time. dilations: of each; together they see 1 + 2 * their sum
            chunks. dropout: in their training.
        rules: for each kind the fields of its `SpanRule`.
    """

    model_type = "k25lite_detector"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"vision_config": MoonViT3DConfig}

    vision_config: Any = None
    height: int = 96
    width: int = 128
    context_size: int = 48
    dilations: Any = (1, 2, 4, 8)
    dropout: float = 0.2
    rules: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = self.vision_config or MoonViT3DConfig.lite(
            patch_size=16,
            pos_emb_height=6,
            pos_emb_width=8,
            num_hidden_layers=3,
            hidden_size=96,
            num_attention_heads=3,
            intermediate_size=384,
        )
        self.rules = self.rules or {kind: asdict(SpanRule()) for kind in KINDS}
        super().__post_init__(**kwargs)
        unit = self.vision_config.patch_size * self.vision_config.merge_kernel_size[0]
        if self.height < 1 or self.width < 1 or self.height % unit or self.width % unit:
            raise ValueError(
                f"height and width must be positive multiples of {unit} pixels, got {self.height}, {self.width}"
            )


class Context(nn.Module):
    """Gated convolutions over time, dilated more and more: features of consecutive chunks -> a logit for each of KINDS.

    Source: van den Oord et al. 2016, WaveNet; here they look ahead as well.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, config: DetectorConfig):
        super().__init__()
        size = config.context_size
        self.register_buffer("mean", torch.zeros(features))  # of the features it learns from: `fit`
        self.register_buffer("scale", torch.ones(features))
        self.dropout = nn.Dropout(config.dropout)
        self.enter = nn.Linear(features, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in config.dilations)
        self.gates = nn.ModuleList(nn.Conv1d(size, 2 * size, 3, padding=d, dilation=d) for d in config.dilations)
        self.mixes = nn.ModuleList(nn.Linear(size, size) for _ in config.dilations)
        self.head = nn.Linear(size, len(KINDS))

    def fit(self, features: torch.Tensor) -> None:
        """Have each of `features` [n, features] come in with mean 0 and deviation 1."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0) + 1e-3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[videos, chunks, features] -> [videos, chunks, KINDS]."""
        x = self.enter(self.dropout((features - self.mean) / self.scale))
        for norm, gate, mix in zip(self.norms, self.gates, self.mixes, strict=True):
            inner = F.glu(gate(norm(x).transpose(1, 2)), dim=1).transpose(1, 2)
            x = x + mix(self.dropout(inner))
        return self.head(x)


class Detector(PreTrainedModel):
    """MoonViT-3D; the mean and the maximum of its tokens, and what its patches show; one linear layer; `Context`.

    Example:
        >>> detector = Detector(DetectorConfig())
        >>> chunks = np.zeros((2, 4, *detector.size, 3), np.uint8)  # two of four frames
        >>> detector.probabilities(chunks).shape  # of each on its own
        (2, 5)
        >>> detector.watch([chunks, chunks]).shape  # of four that follow one another
        (4, 5)
    """

    config_class = DetectorConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    _no_split_modules = ("EncoderLayer",)

    def __init__(self, config: DetectorConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.encoder = MoonViT3D(config.vision_config)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.monsters = nn.Linear(width, len(MONSTERS))
        self.head = nn.Linear(2 * width + len(MONSTERS), len(KINDS))
        self.context = Context(self.head.in_features + len(KINDS), config)
        self.post_init()
        nn.init.constant_(self.monsters.bias, -4.0)  # most patches show none

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the frames it is to be shown."""
        return self.config.height, self.config.width

    @property
    def rules(self) -> dict[str, SpanRule]:
        """For `find_spans`, as they were chosen on validation footage."""
        return {kind: SpanRule(**fields) for kind, fields in self.config.rules.items()}

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[patches, 3, p, p], [items, 3], chunks and images in any order and of any size.

        Returns:
            Features [items, features], the last KINDS of them the logits of the item on its own; and [patches, MONSTERS],
            logits of which monsters each patch shows.
        """
        encoded = self.encoder(pixel_values, grid_thw)
        merged = (grid_thw[:, 1] * grid_thw[:, 2] // self.config.vision_config.merge_kernel_size[0] ** 2).tolist()
        tokens = self.norm(encoded.pooler_output).split(merged)
        monsters = self.monsters(encoded.last_hidden_state)
        parts = [
            torch.stack([each.mean((0, 1)) for each in tokens]),
            torch.stack([each.amax((0, 1)) for each in tokens]),
            torch.stack([each.amax(0) for each in monsters.split(grid_thw.prod(1).tolist())]),
        ]
        pooled = torch.cat(parts, dim=-1)
        return torch.cat([pooled, self.head(pooled)], dim=-1), monsters

    def see(self, items: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, for items of [t, height, width, 3] uint8, of one to four frames each."""
        pixel_values, grid_thw = pack(items, self.config.vision_config)
        return self(pixel_values.to(self.device), grid_thw)

    @torch.inference_mode()
    def features(self, frames: np.ndarray, batch: int = 32) -> np.ndarray:
        """What there is to see in chunks or pictures, each on its own.

        Args:
            frames: [n, t, height, width, 3] uint8 RGB; t = 4 for chunks, 1 for pictures; sides multiples of patch * merge.
            batch: how many at a time.

        Returns:
            [n, features] float32, see `forward`.

        Raises:
            ValueError: frames of another type, shape or size.
        """
        unit = self.config.vision_config.patch_size * self.config.vision_config.merge_kernel_size[0]
        shape = list(frames.shape)
        if len(shape) != 5 or shape[4] != 3 or shape[2] % unit or shape[3] % unit or frames.dtype != np.uint8:
            wanted = f"[n, t, height, width, 3] uint8, sides multiples of {unit}"
            raise ValueError(f"frames must be {wanted}, got {shape} {frames.dtype}")
        found = [np.zeros((0, self.context.mean.numel()), np.float32)]
        for start in range(0, len(frames), batch):
            found.append(self.see(list(frames[start : start + batch]))[0].float().cpu().numpy())
        return np.concatenate(found)

    def probabilities(self, frames: np.ndarray, batch: int = 32) -> np.ndarray:
        """What is going on in chunks or pictures, [n, KINDS] float32, each judged on its own; frames as in `features`."""
        return expit(self.features(frames, batch)[:, -len(KINDS) :])

    @torch.inference_mode()
    def in_context(self, features: np.ndarray) -> np.ndarray:
        """What is going on in chunks that follow one another: their `features` [n, features] -> [n, KINDS] float32."""
        if not len(features):
            return np.zeros((0, len(KINDS)), np.float32)
        return expit(self.context(torch.from_numpy(features).to(self.device)[None])[0].cpu().numpy())

    def watch(self, chunks: Iterable[np.ndarray]) -> np.ndarray:
        """What is going on in a stretch of video: its chunks, some at a time -> [n, KINDS] float32, each in its context."""
        parts = [self.features(frames) for frames in chunks]
        return self.in_context(np.concatenate(parts)) if parts else np.zeros((0, len(KINDS)), np.float32)

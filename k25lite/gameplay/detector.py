"""The detector: a small MoonViT-3D that tells from a chunk of four frames, or from one picture, what is going on.

Images and chunks go through one set of weights and are packed together in training. The kinds are no classes, for several
may be there at once: each gets a probability of its own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, reduce
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from k25lite.gameplay.events import KINDS
from k25lite.gameplay.spans import SpanRule
from k25lite.vision import MoonViT3D, MoonViT3DConfig, pack


@strict
class DetectorConfig(PreTrainedConfig):
    """The encoder's configuration, what it is shown, and how its probabilities become events.

    Args:
        vision_config: a `MoonViT3DConfig`, or its fields; by default 0.4M parameters, patches of 16 pixels.
        height, width: of a frame in pixels; multiples of patch * merge.
        rules: for each kind the fields of its `SpanRule`.
    """

    model_type = "k25lite_detector"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"vision_config": MoonViT3DConfig}

    vision_config: Any = None
    height: int = 96
    width: int = 128
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


class Detector(PreTrainedModel):
    """MoonViT-3D, the mean and the maximum of its tokens, one linear layer: a logit for each of KINDS.

    Example:
        >>> detector = Detector(DetectorConfig())
        >>> detector.probabilities(np.zeros((2, 4, *detector.size, 3), np.uint8)).shape  # two chunks of four frames
        (2, 5)
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
        self.head = nn.Linear(2 * width, len(KINDS))
        self.post_init()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the frames it is to be shown."""
        return self.config.height, self.config.width

    @property
    def rules(self) -> dict[str, SpanRule]:
        """For `find_spans`, as they were chosen on validation footage."""
        return {kind: SpanRule(**fields) for kind, fields in self.config.rules.items()}

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """[patches, 3, p, p], [items, 3] of frames of `size`, chunks and images in any order -> logits [items, KINDS]."""
        tokens = self.norm(self.encoder(pixel_values, grid_thw).pooler_output)
        tokens = rearrange(tokens, "(n k) m d -> n (k m) d", n=len(grid_thw))
        return self.head(torch.cat([reduce(tokens, "n k d -> n d", how) for how in ("mean", "max")], dim=-1))

    def logits(self, items: list[np.ndarray]) -> torch.Tensor:
        """[items, KINDS] for items of [t, height, width, 3] uint8, of one to four frames each."""
        pixel_values, grid_thw = pack(items, self.config.vision_config)
        return self(pixel_values.to(self.device), grid_thw)

    @torch.inference_mode()
    def probabilities(self, frames: np.ndarray, batch: int = 32) -> np.ndarray:
        """What is going on in chunks or pictures.

        Args:
            frames: [n, t, height, width, 3] uint8 RGB of `size`; t = 4 for chunks, 1 for pictures.
            batch: how many at a time.

        Returns:
            [n, KINDS] float32.

        Raises:
            ValueError: frames of another type, shape or size.
        """
        if frames.ndim != 5 or frames.shape[2:] != (*self.size, 3) or frames.dtype != np.uint8:
            wanted = f"[n, t, {self.size[0]}, {self.size[1]}, 3] uint8"
            raise ValueError(f"frames must be {wanted}, got {list(frames.shape)} {frames.dtype}")
        found = [np.zeros((0, len(KINDS)), np.float32)]
        for start in range(0, len(frames), batch):
            logits = self.logits(list(frames[start : start + batch]))
            found.append(logits.float().sigmoid().cpu().numpy())
        return np.concatenate(found)

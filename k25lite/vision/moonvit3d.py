"""MoonViT-3D: one encoder, one set of weights, for images of any size and for chunks of up to four video frames.

Source: Kimi K2.5 report, section 4.2. Simplified here: nothing of the encoder. Not covered: weight quantisation, and the
exotic variants of the published code (other merge or position types) that no published checkpoint uses.
"""

from __future__ import annotations

import math
from functools import lru_cache
from os import PathLike
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.kimi_k25 import Kimi_K25VisionModel
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

from k25lite.vision.attention import dense_attention_map, packed_attention
from k25lite.vision.checkpoint import HUB_OPTIONS, check_fit, read_vision, to_transformers
from k25lite.vision.packing import PackedLayout, Segments, check_grids

# Patches per block on a CPU: at a width of 128 to 256 the activations of one layer then stay in the second-level cache.
CPU_BLOCK_TOKENS = 1024


@strict
class MoonViT3DConfig(Kimi_K25VisionConfig):
    """transformers' `Kimi_K25VisionConfig` and three switches for the ablations of notebook 01.

    Args:
        temporal_embedding: add the fixed sin-cos table to the frames of a multi-frame chunk.
        space_time_attention: let the frames of a chunk attend to each other; without, each frame is encoded alone.
        temporal_pooling: average the frames of a chunk before the merge; without, every frame keeps its tokens.
    """

    temporal_embedding: bool = True
    space_time_attention: bool = True
    temporal_pooling: bool = True
    initializer_range: float = 0.02

    @classmethod
    def lite(cls, **changes: Any) -> MoonViT3DConfig:
        """0.9M parameters, for a laptop: 4 layers of width 128, patches of 8 pixels, weights that start out larger."""
        small = {
            "patch_size": 8,
            "pos_emb_height": 16,
            "pos_emb_width": 16,
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "initializer_range": 0.05,
        }
        return cls(**small | changes)

    @classmethod
    def published(cls, **changes: Any) -> MoonViT3DConfig:
        """The report's 400M parameters: 27 layers of width 1152, patches of 14 pixels."""
        return cls(**changes)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training too
def bicubic_matrix(length: int, new: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[new, length]: what resamples `length` values to `new`, as torch's bicubic interpolation does."""
    impulses = torch.eye(length, dtype=dtype, device=device)[None, :, :, None]  # one picture of `length` channels
    return F.interpolate(impulses, (new, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


class PositionEmbedding(nn.Module):
    """Where in the frame (a learned grid, resampled to the item's size) and when in the chunk (a fixed sin-cos table)."""

    def __init__(self, config: MoonViT3DConfig):
        super().__init__()
        self.frames = config.pos_emb_time
        self.position_embeddings = nn.Parameter(
            torch.empty(config.pos_emb_height, config.pos_emb_width, config.hidden_size)
        )

    def spatial(self, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """The learned grid, resampled (bicubic) to each (h, w) of `sizes`: [sum of h * w, hidden].

        Two matrix products take less time than torch's interpolation, forward and backward; in float32 at least.
        """
        grid, (rows, columns, _) = self.position_embeddings, self.position_embeddings.shape
        wide, tables = grid.to(torch.promote_types(grid.dtype, torch.float32)), []
        with torch.autocast(grid.device.type, enabled=False):
            for h, w in sizes:
                table: torch.Tensor = grid
                if (h, w) != (rows, columns):
                    table = bicubic_matrix(rows, h, wide.dtype, grid.device) @ wide.flatten(1)  # y x c -> h (x c)
                    table = bicubic_matrix(columns, w, wide.dtype, grid.device) @ table.unflatten(1, (columns, -1))
                tables.append(table.to(grid.dtype).flatten(0, 1))
        return torch.cat(tables)

    def temporal(self) -> torch.Tensor:
        """[1 + frames, hidden]: a row of zeros for images, then one row for each frame of a chunk."""
        device, width = self.position_embeddings.device, self.position_embeddings.shape[-1]
        frequency = 10000 ** -(torch.arange(0, width, 2, device=device).float() / width)
        angle = torch.arange(self.frames, device=device)[:, None] * frequency
        return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, 0, 1, 0)).to(self.position_embeddings.dtype)


class PatchEmbedding(nn.Module):
    """Patches to vectors that know their place and time."""

    def __init__(self, config: MoonViT3DConfig):
        super().__init__()
        self.temporal_embedding = config.temporal_embedding
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_emb = PositionEmbedding(config)

    def forward(self, pixel_values: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """[patches, 3, p, p] in raster order -> [patches, hidden] in the encoder's order."""
        # A convolution whose stride is its kernel is one matrix product over flattened patches.
        patches = F.linear(pixel_values.flatten(1), self.proj.weight.flatten(1), self.proj.bias)
        places = self.pos_emb.spatial(layout.sizes)
        # index_select, not brackets: their backward adds up in any order on several CPU threads.
        hidden = patches.index_select(0, layout.order) + places.index_select(0, layout.position)
        if self.temporal_embedding and any(t > 1 for t, _, _ in layout.grids):
            hidden = hidden + self.pos_emb.temporal().index_select(0, layout.frame)
        return hidden


def rotary_table(config: MoonViT3DConfig, sizes: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """[sum of h * w, head_dim / 2] complex rotations, pairs turning by column and by row in alternation.

    The frame never enters: every frame of a chunk is rotated alike (report, section 4.2).
    """
    dim = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    frequency = theta ** -(torch.arange(0, dim, 4, device=device).float() / dim)  # [head_dim / 4]
    rows = torch.cat([torch.arange(h, device=device).repeat_interleave(w) for h, w in sizes])
    columns = torch.cat([torch.arange(w, device=device).repeat(h) for h, w in sizes])
    angle = torch.stack([columns, rows], dim=-1)[:, None] * frequency[:, None]  # n d 2
    return torch.polar(torch.ones_like(angle), angle).flatten(1)


class Attention(nn.Module):
    """Multi-head attention with 2-D rotary embedding, inside the segments of a packed sequence."""

    def __init__(self, config: MoonViT3DConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, hidden: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key (both rotated) and value, each [tokens, heads, head_dim]."""
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))  # n 3 h d
        query_key, value = qkv.split([2, 1], dim=1)
        pairs = torch.view_as_complex(query_key.float().unflatten(-1, (-1, 2)))
        query, key = torch.view_as_real(pairs * rotary[:, None, None]).flatten(-2).to(qkv.dtype).unbind(1)
        return query, key, value.squeeze(1)

    def forward(self, hidden: torch.Tensor, rotary: torch.Tensor, segments: Segments) -> torch.Tensor:
        return self.proj(packed_attention(*self.project(hidden, rotary), segments).flatten(1))


class CPUTanhGELU(torch.autograd.Function):
    """x * sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh(u)) exactly.

    torch's tanh is the slowest step of an encoder layer on a CPU after the matrix products; the sigmoid, in place, takes
    half its time. The backward is torch's.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        slope = 2 * math.sqrt(2 / math.pi)
        return torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(gradient, *ctx.saved_tensors, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config: MoonViT3DConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.tanh_gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(hidden)
        on_cpu = self.tanh_gelu and hidden.device.type == "cpu"
        return self.fc2(CPUTanhGELU.apply(hidden) if on_cpu else self.act(hidden))


class EncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: MoonViT3DConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, hidden: torch.Tensor, rotary: torch.Tensor, segments: Segments) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), rotary, segments)
        return hidden + self.mlp(self.norm2(hidden))


class MoonViT3D(PreTrainedModel):
    """The vision encoder of Kimi K2.5, numerically equal to transformers' `Kimi_K25VisionModel`.

    Example:
        >>> encoder = MoonViT3D(MoonViT3DConfig.lite())
        >>> out = encoder(torch.randn(96, 3, 8, 8), torch.tensor([[1, 4, 8], [4, 4, 4]]))  # an image and a 4-frame chunk
        >>> out.pooler_output.shape  # 8 + 4 tokens: the chunk costs what one of its frames would
        torch.Size([12, 4, 128])
    """

    config_class = MoonViT3DConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ("EncoderLayer",)

    def __init__(self, config: MoonViT3DConfig):
        super().__init__(config)
        self.patch_embed = PatchEmbedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> BaseModelOutputWithPooling:
        """Encode a packed batch of images and video chunks.

        Args:
            pixel_values: [patches, 3, p, p], the items one after another, each frame after frame in raster order.
            grid_thw: [items, 3] integers, (frames, rows, columns) in patches; on the CPU it costs no synchronisation.

        Returns:
            last_hidden_state: [patches, hidden], as the patches were given.
            pooler_output: [merged tokens, 4, hidden], h * w / 4 tokens per item whatever its number of frames.

        Raises:
            ValueError: the grids do not describe these patches.
        """
        layout = self.layout(pixel_values, grid_thw)
        hidden = self.patch_embed(pixel_values.to(self.dtype), layout)
        rotary = rotary_table(self.config, layout.sizes, layout.device)
        blocks = layout.blocks(CPU_BLOCK_TOKENS) if hidden.device.type == "cpu" else [layout]
        encoded = []
        for block, part in zip(blocks, hidden.split([len(block.order) for block in blocks]), strict=True):
            angles, segments = rotary[block.position], block.segments(self.config.space_time_attention)
            for layer in self.layers:
                part = layer(part, angles, segments)
            encoded.append(self.final_layernorm(part))
        hidden = torch.cat(encoded)
        return BaseModelOutputWithPooling(
            last_hidden_state=layout.to_raster(hidden),
            pooler_output=layout.merged(hidden, self.config.temporal_pooling),
        )

    def layout(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> PackedLayout:
        """Check the batch and work out how it stands inside the encoder."""
        size = self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be [patches, 3, {size}, {size}], got {list(pixel_values.shape)}")
        merge = self.config.merge_kernel_size[0]
        grids = check_grids(grid_thw, len(pixel_values), max_frames=self.config.pos_emb_time, merge=merge)
        return PackedLayout.of(grids, merge, pixel_values.device)

    @torch.no_grad()
    def attention_map(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """[heads, patches, patches] attention weights of one layer, patches as given: for looking at small batches.

        Raises:
            IndexError: no such layer; -1 is the last one.
        """
        layer = range(len(self.layers))[layer]
        layout = self.layout(pixel_values, grid_thw)
        hidden = self.patch_embed(pixel_values.to(self.dtype), layout)
        rotary = rotary_table(self.config, layout.sizes, layout.device)[layout.position]
        segments = layout.segments(self.config.space_time_attention)
        *before, last = (cast(EncoderLayer, module) for module in self.layers[: layer + 1])
        for earlier in before:
            hidden = earlier(hidden, rotary, segments)
        query, key, _ = last.attn.project(last.norm1(hidden), rotary)
        raster = layout.order.argsort()
        return dense_attention_map(query, key, segments)[:, raster][:, :, raster]

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike, **kwargs: Any) -> MoonViT3D:
        """Load weights in transformers' layout, or from a full Kimi K2.5 / K2.6 repository (vision files only).

        Args:
            path_or_hub_id: a folder, or a repository of the Hub such as "moonshotai/Kimi-K2.5".
            kwargs: a `config`, or what transformers' `from_pretrained` takes (`dtype`, `device_map`, `revision`, ...).

        Raises:
            FileNotFoundError: no checkpoint there. ValueError: damaged, or without a vision tower.
        """
        checkpoint = read_vision(path_or_hub_id, **{name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs})
        config = kwargs.pop("config", None) or MoonViT3DConfig(**checkpoint.config)
        wants_info = kwargs.pop("output_loading_info", False)
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded = super().from_pretrained(None, config=config, state_dict=checkpoint.tower, **kwargs | options)
        check_fit(path_or_hub_id, loaded[1])
        return loaded if wants_info else loaded[0]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save in transformers' layout: `Kimi_K25VisionModel.from_pretrained` reads the folder as it is."""
        state = to_transformers(kwargs.pop("state_dict", None) or self.state_dict(), self.config.num_attention_heads)
        super().save_pretrained(save_directory, state_dict=state, **kwargs)

    def to_transformers(self) -> Kimi_K25VisionModel:
        """The same encoder as transformers' own class, weights copied; for comparing, or for code written against it.

        Raises:
            ValueError: an ablation switch is off, which that class cannot express.
        """
        switches = ("temporal_embedding", "space_time_attention", "temporal_pooling")
        if off := [name for name in switches if not getattr(self.config, name)]:
            raise ValueError(f"transformers' encoder has no switch for: {', '.join(off)}")
        heads = self.config.num_attention_heads
        fields = {name: value for name, value in self.config.to_dict().items() if name not in switches}
        state = {name: tensor.clone() for name, tensor in to_transformers(self.state_dict(), heads).items()}
        encoder = Kimi_K25VisionModel.from_pretrained(
            None, config=Kimi_K25VisionConfig(**fields), state_dict=state, dtype=self.dtype
        )
        return encoder.to(self.device).train(self.training)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionEmbedding):
            nn.init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)

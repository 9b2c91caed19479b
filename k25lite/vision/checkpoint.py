"""Vision weights between three layouts, both ways and without loss.

- ours: as transformers', but query, key and value are one matrix `attn.qkv` whose rotary pairs are neighbours
  (2i, 2i + 1), so that a rotation is one complex product.
- transformers' `Kimi_K25VisionModel`: `attn.{q,k,v}_proj`, whose rotary pairs are (i, i + head_dim / 2).
- the published Kimi repositories: `vision_tower.encoder.blocks.N.wqkv` and so on; pairs as ours, other names.

A full repository holds hundreds of gigabytes of language model: its index is read first, and only the files that hold
vision or projector tensors are fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

State = dict[str, torch.Tensor]

# What `from_pretrained` takes for the Hub alone.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

# Published name -> ours, inside a block of the tower.
_BLOCK_NAMES = {
    "norm0": "norm1",
    "norm1": "norm2",
    "mlp.fc0": "mlp.fc1",
    "mlp.fc1": "mlp.fc2",
    "wqkv": "attn.qkv",
    "wo": "attn.proj",
}
_PROJECTOR_NAMES = {"proj.0": "in_proj", "proj.2": "out_proj"}


@dataclass
class VisionCheckpoint:
    """The vision part of a checkpoint: `config` in transformers' field names, `tower` and `projector` in our layout."""

    config: dict[str, Any]
    tower: State
    projector: State = field(default_factory=dict)
    projector_eps: float = 1e-5


def read_vision(path_or_hub_id: str | PathLike, **hub: Any) -> VisionCheckpoint:
    """Read the vision tower, and the projector if there is one, from a folder or a Hub repository.

    Accepts a checkpoint of transformers' `Kimi_K25VisionModel`, one of its full model, and the published Kimi K2.5 and
    K2.6 repositories.

    Args:
        hub: of `HUB_OPTIONS`, as `hf_hub_download` takes them.

    Raises:
        FileNotFoundError: no config.json or no safetensors there, no such repository, or the Hub cannot be reached.
        ValueError: a damaged file, or a checkpoint without vision tensors.
    """
    config = json.loads(_locate(path_or_hub_id, "config.json", **hub).read_text())
    vision = _vision_config(config.get("vision_config", config))
    state = _read_tensors(path_or_hub_id, **hub)
    tower = {re.sub(r"^(model\.)?vision_tower\.", "", k): v for k, v in state.items() if "mm_projector." not in k}
    projector = {re.sub(r"^(model\.)?mm_projector\.", "", k): v for k, v in state.items() if "mm_projector." in k}
    for published, ours in _PROJECTOR_NAMES.items():
        projector = {k.replace(published, ours): v for k, v in projector.items()}
    if any(k.startswith("encoder.") for k in tower):
        tower = from_published(tower)
    elif tower:
        tower = from_transformers(tower, vision["num_attention_heads"])
    if "patch_embed.proj.weight" not in tower:
        raise ValueError(f"{path_or_hub_id} holds no MoonViT-3D vision tower (patch_embed.proj.weight is missing)")
    eps = config.get("projection_layer_norm_eps", config.get("vision_config", {}).get("projector_ln_eps", 1e-5))
    return VisionCheckpoint(vision, tower, projector, eps)


def to_transformers(state: Mapping[str, torch.Tensor], heads: int) -> State:
    """Our tower in the layout of transformers' `Kimi_K25VisionModel`."""
    result: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            result[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            if letter != "v":
                part = part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (h d 2) -> (h 2 d)
            result[name.replace(".qkv.", f".{letter}_proj.")] = part.contiguous()
    return result


def from_transformers(state: Mapping[str, torch.Tensor], heads: int) -> State:
    """The inverse of `to_transformers`. Where one of the three projections is missing, the one matrix is."""
    result: State = {}
    for name, tensor in state.items():
        if ".attn.q_proj." in name:
            key, value = (state.get(name.replace("q_proj", other)) for other in ("k_proj", "v_proj"))
            if key is not None and value is not None:
                rotated = (x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) for x in (tensor, key))
                result[name.replace("q_proj", "qkv")] = torch.cat([*rotated, value])
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            result[name] = tensor
    return result


def from_published(state: Mapping[str, torch.Tensor]) -> State:
    """Tower tensors under their published names (without `vision_tower.`) in our layout: new names, same numbers."""
    result: State = {}
    for name, tensor in state.items():
        name = _rename(re.sub(r"^encoder\.", "", name).replace("blocks.", "layers."), _BLOCK_NAMES)
        name = name.replace("pos_emb.weight", "pos_emb.position_embeddings")
        # Published towers also store the fixed temporal table; here it is computed.
        if not name.endswith("time_weight"):
            result[name] = tensor
    return result


def to_published(tower: Mapping[str, torch.Tensor], projector: Mapping[str, torch.Tensor] | None = None) -> State:
    """Our tower and projector under the names of the published Kimi repositories."""
    result: State = {}
    for name, tensor in tower.items():
        name = _rename(name, {ours: published for published, ours in _BLOCK_NAMES.items()})
        name = re.sub(r"^(layers\.|final_layernorm\.)", r"encoder.\1", name).replace(
            "encoder.layers.", "encoder.blocks."
        )
        result["vision_tower." + name.replace("pos_emb.position_embeddings", "pos_emb.weight")] = tensor
    for name, tensor in (projector or {}).items():
        for published, ours in _PROJECTOR_NAMES.items():
            name = name.replace(ours, published)
        result["mm_projector." + name] = tensor
    return result


def check_fit(path_or_hub_id: str | PathLike, info: Mapping[str, Collection[Any]]) -> None:
    """Raise ValueError unless a checkpoint held the tensors of the model, no others, and in their shapes.

    Args:
        info: what transformers' `from_pretrained` tells with `output_loading_info`.
    """
    problems = [
        f"{len(info[kind])} tensors {what}, such as {min(map(_describe, info[kind]))}"
        for kind, what in (
            ("missing_keys", "are missing"),
            ("unexpected_keys", "have no place in the model"),
            ("mismatched_keys", "have another shape"),
        )
        if info[kind]
    ]
    if problems:
        raise ValueError(f"{path_or_hub_id} does not fit the configuration: {'; '.join(problems)}")


def _describe(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A tensor as transformers names it when it is missing or too many, or when its shape is not the model's."""
    return key if isinstance(key, str) else f"{key[0]} {list(key[1])} for {list(key[2])}"


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Replace the part between two dots that `table` names, once: norm0 becomes norm1, and does not go on to norm2."""
    parts = "|".join(map(re.escape, table))
    return re.sub(rf"\.({parts})\.", lambda match: f".{table[match[1]]}.", name)


def _vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Vision settings under transformers' names; the published ones write vt_hidden_size and init_pos_emb_height."""
    renamed = {re.sub(r"^(vt_|init_)", "", key): value for key, value in config.items()}
    names = (
        "patch_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act merge_kernel_size "
        "pos_emb_height pos_emb_width pos_emb_time rope_parameters initializer_range "
        "temporal_embedding space_time_attention temporal_pooling"
    ).split()
    return {name: renamed[name] for name in names if name in renamed}


def _locate(path_or_hub_id: str | PathLike, name: str, **hub: Any) -> Path:
    """The local path of a file of the checkpoint, fetched from the Hub if `path_or_hub_id` is no folder."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        return folder / name
    try:
        return Path(hf_hub_download(str(path_or_hub_id), name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(f"{path_or_hub_id} is neither a folder nor the name of a repository") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the Hub shows no repository {path_or_hub_id}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} of {path_or_hub_id} cannot be fetched (offline?)") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{path_or_hub_id} has no {name}") from error


def _read_tensors(path_or_hub_id: str | PathLike, **hub: Any) -> State:
    """The vision and projector tensors, from the shards that the index names, or from the one file there is."""
    try:
        index = json.loads(_locate(path_or_hub_id, "model.safetensors.index.json", **hub).read_text())["weight_map"]
        files = sorted({file for key, file in index.items() if _is_vision(key)})
    except FileNotFoundError:
        files = ["model.safetensors"]
    state: State = {}
    for file in files:
        path = _locate(path_or_hub_id, file, **hub)
        try:
            with safe_open(path, framework="pt") as tensors:
                state |= {key: tensors.get_tensor(key) for key in tensors.keys() if _is_vision(key)}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return state


def _is_vision(key: str) -> bool:
    """Whether a tensor belongs to a tower (bare or inside a full model) or to the projector."""
    return bool(re.match(r"(model\.)?(vision_tower|mm_projector)\.|patch_embed\.|layers\.|final_layernorm\.", key))

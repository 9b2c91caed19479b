import pytest
import torch
from transformers.models.kimi_k25 import Kimi_K25VisionModel
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

from k25lite.vision import MoonViT3D, MoonViT3DConfig
from k25lite.vision.checkpoint import to_transformers

SHARED_FIELDS = (
    "patch_size pos_emb_height pos_emb_width pos_emb_time num_hidden_layers hidden_size num_attention_heads "
    "intermediate_size hidden_act"
).split()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong position, segment or activation shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            scale = 0.5 if "position" in name else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def upstream_of(model: MoonViT3D) -> Kimi_K25VisionModel:
    """transformers' tower with the same weights: an independent implementation to compare with."""
    config = Kimi_K25VisionConfig(**{name: getattr(model.config, name) for name in SHARED_FIELDS})
    reference = Kimi_K25VisionModel(config)
    reference.load_state_dict(to_transformers(model.state_dict(), model.config.num_attention_heads))
    return reference.eval()


def patches(grids: list[list[int]], size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches for these grids, and the grids as a tensor."""
    grid_thw = torch.tensor(grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid_thw.prod(1).sum()), 3, size, size, generator=generator), grid_thw


@pytest.fixture(scope="session")
def lite() -> MoonViT3D:
    model = MoonViT3D(MoonViT3DConfig.lite()).eval()
    randomise(model)
    return model

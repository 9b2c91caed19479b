"""Random encoders and patches for the tests of this folder."""

import torch


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


def patches(grids: list[list[int]], size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches for these grids, and the grids as a tensor."""
    grid_thw = torch.tensor(grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid_thw.prod(1).sum()), 3, size, size, generator=generator), grid_thw

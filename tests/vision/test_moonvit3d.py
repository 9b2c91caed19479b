"""MoonViT-3D against transformers' own tower, and against itself: packed, permuted, pooled, on a GPU."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from encoders import patches, randomise

from k25lite.vision import MoonViT3D, MoonViT3DConfig
from k25lite.vision import moonvit3d as module

MIXED = [[1, 6, 10], [4, 4, 4], [1, 2, 2], [3, 4, 6], [2, 8, 2], [1, 6, 10], [4, 2, 2], [1, 4, 15 * 2]]
MID = MoonViT3DConfig(hidden_size=288, num_attention_heads=4, intermediate_size=1076, num_hidden_layers=8)


def largest_difference(ours, reference) -> float:
    names = ("last_hidden_state", "pooler_output")
    return max((getattr(ours, name) - getattr(reference, name)).abs().max().item() for name in names)


@pytest.mark.parametrize("config", [MoonViT3DConfig.lite(), MID], ids=["lite", "mid"])
@pytest.mark.parametrize(
    "grids",
    [[[1, 6, 10], [1, 2, 2], [1, 30, 4], [1, 6, 10], [1, 70, 2]], *([[t, 4, 6]] * 2 for t in (1, 2, 3, 4))],
    ids=["odd sizes", "t=1", "t=2", "t=3", "t=4"],
)
@torch.no_grad()
def test_equals_transformers(config, grids):
    model = MoonViT3D(config).eval()
    randomise(model)
    pixel_values, grid_thw = patches(grids, config.patch_size)
    assert largest_difference(model(pixel_values, grid_thw), model.to_transformers()(pixel_values, grid_thw)) <= 1e-4


@pytest.mark.parametrize("grids", [[[1, 6, 10], [1, 2, 4]], [[3, 4, 6]]], ids=["images", "chunk"])
def test_gradients_equal_those_of_transformers(lite, grids):
    reference = lite.to_transformers()
    pixel_values, grid_thw = patches(grids, 8)
    for model in (lite, reference):
        model.zero_grad()
        out = model(pixel_values, grid_thw=grid_thw)
        (out.pooler_output.sin().sum() + out.last_hidden_state.cos().mean()).backward()
    ours = module.to_transformers({n: p.grad for n, p in lite.named_parameters()}, lite.config.num_attention_heads)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("block", [64, 10**9])
@torch.no_grad()
def test_a_batch_of_mixed_lengths_and_sizes_equals_one_by_one(lite, monkeypatch, block):
    monkeypatch.setattr(module, "CPU_BLOCK_TOKENS", block)
    pixel_values, grid_thw = patches(MIXED, 8)
    packed = lite(pixel_values, grid_thw)
    alone = [
        lite(part, grid[None])
        for part, grid in zip(pixel_values.split(grid_thw.prod(1).tolist()), grid_thw, strict=True)
    ]
    for name in ("last_hidden_state", "pooler_output"):
        expected = torch.cat([getattr(out, name) for out in alone])
        torch.testing.assert_close(getattr(packed, name), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_change_in_one_item_changes_no_other(lite):
    pixel_values, grid_thw = patches(MIXED, 8)
    before = lite(pixel_values, grid_thw).last_hidden_state
    changed = pixel_values.clone()
    changed[60 : 60 + 64] += 1.0  # the second item, a 4 x 4 x 4 chunk
    moved = (lite(changed, grid_thw).last_hidden_state - before).abs().amax(1) > 0
    assert moved[60:124].all()
    assert not moved[:60].any()
    assert not moved[124:].any()


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@torch.no_grad()
def test_a_chunk_costs_the_tokens_of_one_image(lite, t):
    pixel_values, grid_thw = patches([[t, 6, 8]], 8)
    assert lite(pixel_values, grid_thw).pooler_output.shape == (6 * 8 // 4, 4, lite.config.hidden_size)


@torch.no_grad()
def test_only_the_temporal_embedding_tells_frames_apart(lite):
    """Reversing the frames must change the pooled tokens, and must not once the temporal embedding is off: rotary angles
    and learned positions are the same in every frame."""
    pixel_values, grid_thw = patches([[4, 4, 4]], 8)
    backwards = pixel_values.view(4, 16, 3, 8, 8).flip(0).flatten(0, 1)
    timeless = MoonViT3D(MoonViT3DConfig.lite(temporal_embedding=False)).eval()
    timeless.load_state_dict(lite.state_dict())
    forth, back = (timeless(x, grid_thw).pooler_output for x in (pixel_values, backwards))
    torch.testing.assert_close(forth, back, atol=1e-5, rtol=1e-4)
    forth, back = (lite(x, grid_thw).pooler_output for x in (pixel_values, backwards))
    assert (forth - back).abs().max() > 0.01


@torch.no_grad()
def test_an_image_gets_no_temporal_term(lite):
    timeless = MoonViT3D(MoonViT3DConfig.lite(temporal_embedding=False)).eval()
    timeless.load_state_dict(lite.state_dict())
    pixel_values, grid_thw = patches([[1, 4, 6]], 8)
    torch.testing.assert_close(
        lite(pixel_values, grid_thw).pooler_output, timeless(pixel_values, grid_thw).pooler_output
    )


@torch.no_grad()
def test_frames_attended_one_by_one_are_encoded_as_if_alone(lite):
    """Without the temporal embedding and space-time attention, a chunk is the mean of its frames taken as images."""
    apart = MoonViT3D(MoonViT3DConfig.lite(temporal_embedding=False, space_time_attention=False)).eval()
    apart.load_state_dict(lite.state_dict())
    pixel_values, grid_thw = patches([[3, 4, 6]], 8)
    frames = apart(pixel_values, torch.tensor([[1, 4, 6]] * 3)).pooler_output
    chunk = apart(pixel_values, grid_thw).pooler_output
    torch.testing.assert_close(chunk, frames.view(3, 6, 4, -1).mean(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_map_is_block_diagonal_in_the_given_order(lite):
    pixel_values, grid_thw = patches([[1, 2, 4], [2, 2, 2], [1, 4, 2]], 8)
    weights = lite.attention_map(pixel_values, grid_thw, layer=2)
    inside = torch.block_diag(*(torch.ones(8, 8) for _ in range(3))).bool()
    assert (weights[:, ~inside] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 24), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_maps_are_there_for_the_layers_there_are(lite):
    batch, layers = patches([[1, 2, 4]], 8), len(lite.layers)
    assert torch.equal(lite.attention_map(*batch, layer=-1), lite.attention_map(*batch, layer=layers - 1))
    for layer in (layers, -layers - 1):
        with pytest.raises(IndexError):
            lite.attention_map(*batch, layer=layer)


def test_the_activation_on_a_cpu_is_the_tanh_gelu():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module.CPUTanhGELU.apply(x), torch.nn.functional.gelu(x, approximate="tanh"))
    torch.autograd.gradcheck(module.CPUTanhGELU.apply, x[::200].detach().requires_grad_())


def test_gradient_checkpointing_changes_no_gradient():
    model = MoonViT3D(MoonViT3DConfig.lite()).train()
    pixel_values, grid_thw = patches(MIXED[:4], 8)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(pixel_values, grid_thw).pooler_output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_an_ablated_encoder_has_no_twin_in_transformers():
    with pytest.raises(ValueError, match="no switch for: temporal_embedding, temporal_pooling"):
        MoonViT3D(MoonViT3DConfig.lite(temporal_embedding=False, temporal_pooling=False)).to_transformers()


@torch.no_grad()
def test_the_published_configuration_equals_transformers():
    """One run of all 27 layers and 400 million parameters, on a picture of odd size and on a chunk."""
    model = MoonViT3D(MoonViT3DConfig.published()).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(400e6, rel=0.05)
    reference = model.to_transformers()
    for grids in ([[1, 4, 10]], [[3, 4, 4]]):
        pixel_values, grid_thw = patches(grids, 14)
        assert largest_difference(model(pixel_values, grid_thw), reference(pixel_values, grid_thw)) <= 1e-4


def test_wrong_patches_are_named(lite):
    with pytest.raises(ValueError, match=r"pixel_values must be \[patches, 3, 8, 8\], got \[16, 3, 14, 14\]"):
        lite(torch.zeros(16, 3, 14, 14), torch.tensor([[1, 4, 4]]))


def test_memory_stays_linear_in_the_number_of_items():
    """10,000 patches in 625 items: an [L, L] mask or score matrix would take 400 MB per head and layer."""
    code = """
import resource, torch
from k25lite.vision import MoonViT3D, MoonViT3DConfig
model = MoonViT3D(MoonViT3DConfig.lite()).eval()
grid = torch.tensor([[1, 4, 4]] * 625)
with torch.no_grad():
    model(torch.randn(16, 3, 8, 8), grid[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(torch.randn(10_000, 3, 8, 8), grid)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 200, f"{grown:.0f} MB"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_the_gpu_gives_what_the_cpu_gives(lite, dtype, tolerance):
    pixel_values, grid_thw = patches(MIXED, 8)
    expected = lite(pixel_values, grid_thw).pooler_output
    there = MoonViT3D(lite.config).eval()
    there.load_state_dict(lite.state_dict())
    out = there.to("cuda", dtype)(pixel_values.to("cuda", dtype), grid_thw).pooler_output.cpu().float()
    assert ((out - expected).norm() / expected.norm()).item() < tolerance


def test_gradients_are_the_same_to_the_bit_on_two_threads(lite):
    """Many items that share positions: their gradients meet in one place, and must be added up in one order."""
    x, grid = patches([[1, 2, 2]] * 24 + [[1, 4, 4]] * 40 + [[4, 4, 4]] * 8, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(5):
            lite.zero_grad()
            lite(x, grid).pooler_output.sin().mean().backward()
            runs.append(torch.cat([p.grad.flatten() for p in lite.parameters()]))
    finally:
        torch.set_num_threads(threads)
        lite.zero_grad()
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("size", [(2, 2), (4, 30), (16, 16), (64, 18)])
def test_the_grid_of_places_is_resampled_as_torchs_bicubic_interpolation_does(size, dtype, tolerance):
    places = MoonViT3D(MoonViT3DConfig.lite()).patch_embed.pos_emb.to(dtype)
    image = places.position_embeddings.movedim(-1, 0)[None]
    expected = F.interpolate(image, size, mode="bicubic")[0].movedim(0, -1).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(places.spatial([size]), expected, atol=tolerance, rtol=0)


def test_a_size_first_met_in_inference_mode_can_be_trained_on():
    encoder, patches = MoonViT3D(MoonViT3DConfig.lite()), torch.randn(28 * 6, 3, 8, 8)
    with torch.inference_mode():
        encoder(patches, torch.tensor([[1, 28, 6]]))
    encoder(patches, torch.tensor([[1, 28, 6]])).pooler_output.sum().backward()
    assert encoder.patch_embed.pos_emb.position_embeddings.grad is not None

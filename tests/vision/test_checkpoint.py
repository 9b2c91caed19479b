"""Weights in and out: transformers' layout, a full Kimi repository, damage."""

import json

import pytest
import torch
from encoders import patches, randomise
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import Kimi_K25ForConditionalGeneration
from transformers.models.kimi_k25 import Kimi_K25VisionModel
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config

from k25lite.vision import MoonViT3D, MoonViT3DConfig, Projector, checkpoint

SMALL_VISION = {
    "patch_size": 8,
    "pos_emb_height": 6,
    "pos_emb_width": 6,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def full_model() -> Kimi_K25ForConditionalGeneration:
    """A complete Kimi K2.5 of transformers, tiny and random."""
    text = {
        "model_type": "deepseek_v3",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    config = Kimi_K25Config(
        text_config=text, vision_config=SMALL_VISION, projection_hidden_size=32, projection_layer_norm_eps=1e-3
    )
    model = Kimi_K25ForConditionalGeneration(config).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def kimi_repository(full_model, tmp_path_factory):
    """The same model as the published repositories store it: their tensor names and configuration fields, in shards.

    transformers writes the published names but for two: those are mended here.
    """
    folder = tmp_path_factory.mktemp("kimi")
    full_model.save_pretrained(folder, max_shard_size="30KB")
    slips = {"vision_tower.encoder.patch_embed": "vision_tower.patch_embed", "model.mm_projector.": "mm_projector."}

    def mended(name: str) -> str:
        for wrong, right in slips.items():
            name = name.replace(wrong, right)
        return name

    for file in folder.glob("*.safetensors"):
        save_file({mended(name): tensor for name, tensor in load_file(file).items()}, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {mended(name): file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    vision = config.pop("vision_config")
    renamed = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    config["vision_config"] = {
        ("vt_" + k if k in renamed else "init_" + k if k.startswith("pos_emb") else k): vision[k] for k in SMALL_VISION
    } | {"_attn_implementation": "flash_attention_2", "merge_type": "sd2_tpool", "projector_ln_eps": 1e-3}
    del config["projection_layer_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_output(model, reference) -> None:
    pixel_values, grid_thw = patches([[1, 4, 6], [1, 8, 2]], 8)
    with torch.no_grad():
        ours, theirs = model(pixel_values, grid_thw), reference(pixel_values, grid_thw)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-4)


def test_transformers_reads_what_we_save_and_we_read_what_it_saves(lite, tmp_path):
    lite.save_pretrained(tmp_path / "ours")
    reference = Kimi_K25VisionModel.from_pretrained(tmp_path / "ours").eval()
    same_output(lite, reference)
    reference.save_pretrained(tmp_path / "theirs")
    again = MoonViT3D.from_pretrained(tmp_path / "theirs")
    for name, tensor in lite.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_ablation_switches_and_precision_survive(tmp_path):
    model = MoonViT3D(MoonViT3DConfig.lite(space_time_attention=False, temporal_pooling=False)).bfloat16()
    model.save_pretrained(tmp_path)
    again = MoonViT3D.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not again.config.space_time_attention
    assert not again.config.temporal_pooling
    assert again.config.temporal_embedding
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_reads_the_vision_part_of_a_full_kimi_repository(full_model, kimi_repository):
    names = json.loads((kimi_repository / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("vision_tower.encoder.blocks.0.wqkv" in name for name in names), "not the published layout"
    encoder = MoonViT3D.from_pretrained(kimi_repository)
    same_output(encoder, full_model.model.vision_tower)
    projector = Projector.from_pretrained(kimi_repository)
    pooled = torch.randn(5, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(projector(pooled), full_model.model.mm_projector(pooled).squeeze(1))


def test_reads_a_full_model_as_transformers_saves_it(full_model, tmp_path):
    full_model.save_pretrained(tmp_path)
    same_output(MoonViT3D.from_pretrained(tmp_path), full_model.model.vision_tower)
    pooled = torch.randn(5, 4, 32)
    with torch.no_grad():
        expected = full_model.model.mm_projector(pooled).squeeze(1)
        torch.testing.assert_close(Projector.from_pretrained(tmp_path)(pooled), expected)


def test_opens_only_the_files_that_hold_vision(kimi_repository, monkeypatch):
    index = json.loads((kimi_repository / "model.safetensors.index.json").read_text())["weight_map"]
    with_vision = {file for name, file in index.items() if "vision_tower" in name or "mm_projector" in name}
    assert with_vision < set(index.values()), "the fixture must have files without vision tensors"
    opened = set()
    located = checkpoint._locate
    monkeypatch.setattr(checkpoint, "_locate", lambda where, name, **hub: opened.add(name) or located(where, name))
    MoonViT3D.from_pretrained(kimi_repository)
    assert opened == with_vision | {"config.json", "model.safetensors.index.json"}


def test_published_names_go_both_ways_without_loss(kimi_repository):
    stored = {}
    for file in kimi_repository.glob("*.safetensors"):
        stored |= {k: v for k, v in load_file(file).items() if "vision_tower" in k or "mm_projector" in k}
    read = checkpoint.read_vision(kimi_repository)
    written = checkpoint.to_published(read.tower, read.projector)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_rotary_layouts_differ_but_hold_the_same_numbers(lite):
    state, heads = lite.state_dict(), lite.config.num_attention_heads
    theirs = checkpoint.to_transformers(state, heads)
    assert not torch.equal(theirs["layers.0.attn.q_proj.weight"], state["layers.0.attn.qkv.weight"][:128])
    back = checkpoint.from_transformers(theirs, heads)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert lite.to_transformers()  # strict load_state_dict: no name is missing or invented


def test_errors_name_the_folder(tmp_path, lite):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        MoonViT3D.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_VISION))
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        MoonViT3D.from_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no MoonViT-3D vision tower"):
        MoonViT3D.from_pretrained(tmp_path)
    lite.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        MoonViT3D.from_pretrained(tmp_path)
    lite.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no projector"):
        Projector.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="/none/at/all is neither a folder nor the name of a repository"):
        MoonViT3D.from_pretrained("/none/at/all")


def test_a_hub_that_cannot_be_reached_is_told_apart_from_a_file_that_is_not_there(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("not in the cache, and offline")

    monkeypatch.setattr(checkpoint, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"config\.json of some/encoder cannot be fetched \(offline\?\)"):
        MoonViT3D.from_pretrained("some/encoder")


def test_options_of_the_hub_reach_it(lite, tmp_path, monkeypatch):
    lite.save_pretrained(tmp_path)
    asked = []

    def download(repository, name, **options):
        asked.append(options)
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return tmp_path / name

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    options = {"revision": "v2", "token": "secret", "cache_dir": "elsewhere"}
    MoonViT3D.from_pretrained("some/encoder", dtype=torch.bfloat16, **options)
    with pytest.raises(ValueError, match="no projector"):
        Projector.from_pretrained("some/encoder", **options)
    assert len(asked) == 6
    assert all(each == options for each in asked)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("layers.1.mlp.fc1.bias", r"1 tensors are missing, such as layers\.1\.mlp\.fc1\.bias"),
        ("layers.1.attn.k_proj.weight", r"1 tensors are missing, such as layers\.1\.attn\.qkv\.weight"),
        ("layers.1.attn.q_proj.weight", r"1 tensors are missing, such as layers\.1\.attn\.qkv\.weight"),
    ],
)
def test_a_tower_with_a_tensor_too_few_is_refused(lite, tmp_path, missing, told):
    lite.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        MoonViT3D.from_pretrained(tmp_path)

import copy
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from k25lite.training import qk_clip
from k25lite.training.muonclip import MuonClip, newton_schulz, split_parameters
from k25lite.training.qk_clip import QKClip, max_logits
from k25lite.vision import MoonViT3D, MoonViT3DConfig, Projector

TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def deepseek(**changes):
    config = TINY | MLA | MOE | IDS | {"q_lora_rank": None, "first_k_dense_replace": 1, "tie_word_embeddings": True}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config | changes))


MODELS = {
    "latent": deepseek,
    "latent, query bottleneck": lambda: deepseek(q_lora_rank=16, rope_interleave=False),
    "one key per query": lambda: LlamaForCausalLM(LlamaConfig(**TINY, **IDS, num_key_value_heads=4)),
    "shared keys": lambda: LlamaForCausalLM(LlamaConfig(**TINY, **IDS, num_key_value_heads=2)),
    "shared keys and biases": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, **IDS, num_key_value_heads=2)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(batch=3, length=12):
    return torch.randint(3, TINY["vocab_size"], (batch, length))


def language_loss(model, ids):
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, optimiser, batches):
    for ids in batches:
        optimiser.zero_grad()
        language_loss(model, ids).backward()
        optimiser.step()


def torch_muon(matrices, gradients, monkeypatch, **settings):
    """torch's own Muon over the steps' gradients, kept from rounding to bfloat16 so that it can be compared exactly."""
    params = [nn.Parameter(matrix.clone()) for matrix in matrices]
    optimiser = torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        for step in gradients:
            for p, gradient in zip(params, step, strict=True):
                p.grad = gradient.clone()
            optimiser.step()
    return [p.detach() for p in params]


def test_matrices_step_as_in_torchs_muon(monkeypatch):
    layers = nn.ModuleList(nn.Linear(*sizes) for sizes in [(8, 8), (8, 20), (20, 8), (8, 8), (20, 8)])
    start = [layer.weight.detach().clone() for layer in layers]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(4)]
    optimiser = MuonClip(layers, lr=0.02, weight_decay=0.3, qk_clip_threshold=None, ns_dtype=torch.float32)
    for step in gradients:
        for layer, gradient in zip(layers, step, strict=True):
            layer.weight.grad = gradient.clone()
        optimiser.step()
    expected = torch_muon(start, gradients, monkeypatch, lr=0.02, weight_decay=0.3)
    torch.testing.assert_close([layer.weight.detach() for layer in layers], expected, atol=1e-6, rtol=1e-5)


def test_stacked_experts_and_fused_projections_step_one_by_one(monkeypatch):
    experts = deepseek().model.layers[1].mlp.experts
    model = nn.ModuleDict({"experts": experts, "qkv": nn.Linear(8, 24, bias=False)})
    whole = [experts.gate_up_proj, experts.down_proj, model["qkv"].weight]
    nn.init.normal_(experts.down_proj)

    def apart(tensors):
        gate_up, down, qkv = (tensor.detach().clone() for tensor in tensors)
        return [*gate_up.view(-1, *gate_up.shape[1:]).reshape(8, 16, 32), *down, *qkv.split(8)]

    start, gradients = apart(whole), []
    optimiser = MuonClip(model, lr=0.02, qk_clip_threshold=None, ns_dtype=torch.float32)
    for _ in range(3):
        for p in whole:
            p.grad = torch.randn_like(p)
        gradients.append(apart([p.grad for p in whole]))
        optimiser.step()
    expected = torch_muon(start, gradients, monkeypatch, lr=0.02, weight_decay=0.1)
    torch.testing.assert_close(apart(whole), expected, atol=1e-6, rtol=1e-5)


def test_half_precision_iterations_are_close_to_full_ones():
    matrices = torch.randn(3, 16, 40)
    full, half = newton_schulz(matrices), newton_schulz(matrices, dtype=torch.bfloat16).float()
    assert (full - half).norm() < 0.05 * full.norm()
    assert torch.linalg.svdvals(full).min() > 0.6
    assert torch.linalg.svdvals(full).max() < 1.3
    assert (newton_schulz(torch.zeros(1, 4, 4)) == 0).all()


def test_everything_else_steps_as_in_torchs_adamw():
    model = deepseek()
    _, others = split_parameters(model)
    reference = {name: nn.Parameter(p.detach().clone()) for name, p in others.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in reference.values() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in reference.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        foreach=False,
    )
    optimiser = MuonClip(model, lr=0.01, weight_decay=0.3)
    for step in range(4):
        for name, p in others.items():
            # A modality that is injected late has no gradient before.
            late = step < 2 and "norm" in name
            p.grad = None if late else torch.randn_like(p)
            reference[name].grad = None if late else p.grad.clone()
        optimiser.step()
        adamw.step()
    for name, p in others.items():
        torch.testing.assert_close(p.detach(), reference[name].detach(), atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_is_in_one_group(tied):
    encoder = MoonViT3D(MoonViT3DConfig.lite(hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    model = nn.ModuleDict({"vision": encoder, "projector": Projector(32, 32), "lm": deepseek(tie_word_embeddings=tied)})
    model["lm"].model.norm.requires_grad_(False)
    optimiser = MuonClip(model, lr=0.1)
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    muon, others = split_parameters(model)
    assert [id(p) for p in muon.values()] == [id(p) for p in optimiser.param_groups[0]["params"]]
    by_adamw = ("embed_tokens", "lm_head", "gate.weight", "patch_embed", "norm", "bias")
    assert all((name in others) == any(part in name for part in by_adamw) for name in muon | others)
    assert ("lm.lm_head.weight" in others) != tied


def test_a_head_tied_to_the_embedding_goes_with_it_whatever_its_name():
    model = nn.ModuleDict({"scores": nn.Linear(4, 9, bias=False), "words": nn.Embedding(9, 4)})
    model["scores"].weight = model["words"].weight
    assert [list(part) for part in split_parameters(model)] == [[], ["scores.weight"]]


@pytest.mark.parametrize("kind", MODELS)
def test_clipped_heads_reach_the_threshold_and_the_rest_stay(kind):
    model, ids = MODELS[kind](), tokens()
    for name, p in model.named_parameters():
        if "q_" in name and "norm" not in name:
            nn.init.normal_(p, std=2.0)
    layers = QKClip(model).layers
    first = next(iter(layers.values()))
    language_loss(model, ids)
    before = first.max_logits.clone()
    threshold = before.sort().values[1:3].mean().item()  # two heads above, two below
    optimiser = MuonClip(model, lr=0.1, qk_clip_threshold=threshold)
    language_loss(model, ids)
    optimiser.step()  # without gradients: it only clips
    language_loss(model, ids)
    # Only the first layer still sees the same inputs.
    torch.testing.assert_close(first.max_logits, before.clamp(max=threshold), rtol=1e-4, atol=1e-5)
    assert torch.equal(first.max_logits[before <= threshold], before[before <= threshold])
    assert torch.equal(optimiser.qk_clip.highest[:4], before)
    assert optimiser.qk_clip.clipped.sum() == 2 + (optimiser.qk_clip.highest[4:] > threshold).sum()


# name -> (what the model is given, document of each token; 0 is padding)
LAYOUTS = {
    "causal": ({}, [[1] * 6, [1] * 6]),
    "padded left": ({"attention_mask": [[0, 0, 1, 1, 1, 1], [1] * 6]}, [[0, 0, 1, 1, 1, 1], [1] * 6]),
    "padded right": ({"attention_mask": [[1, 1, 1, 0, 0, 0], [1] * 6]}, [[1, 1, 1, 0, 0, 0], [1] * 6]),
    "packed": ({"position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]}, [[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["latent", "shared keys"])
@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_the_maxima_are_those_of_the_pairs_that_attend(layout, kind, chunk, monkeypatch):
    model, ids = MODELS[kind](), tokens(2, 6)
    given, documents = LAYOUTS[layout]
    given = {name: torch.tensor(value) for name, value in given.items()}
    expected_output = model(ids, use_cache=False, **given).logits
    seen = {}

    def spy(module, query, key, *args, **kwargs):
        seen[module] = query.detach(), key.detach(), kwargs["scaling"]
        return original(module, query, key, *args, **kwargs)

    original = qk_clip.sdpa_attention_forward
    monkeypatch.setattr(qk_clip, "sdpa_attention_forward", spy)
    monkeypatch.setitem(qk_clip.CHUNK_LOGITS, "cpu", chunk)
    clip = QKClip(model)
    assert torch.equal(model(ids, use_cache=False, **given).logits, expected_output)
    assert len(seen) == 2
    pairs = [
        (b, i, j)
        for b, document in enumerate(documents)
        for i in range(6)
        for j in range(i + 1)
        if document[i] == document[j] != 0
    ]
    for module in clip.layers.values():
        query, key, scaling = seen[module]
        shared = query.shape[1] // key.shape[1]
        for head in range(4):
            highest = max(query[b, head, i] @ key[b, head // shared, j] for b, i, j in pairs) * scaling
            torch.testing.assert_close(module.max_logits[head], highest, rtol=1e-5, atol=1e-6)


def test_maxima_of_an_additive_mask_and_of_attention_both_ways():
    query, key = torch.randn(2, 1, 2, 5, 4)
    logits = query @ key.mT
    torch.testing.assert_close(max_logits(query, key, None, 1.0, causal=False), logits.amax((0, 2, 3)))
    additive = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        max_logits(query, key, additive, 1.0, causal=False), max_logits(query, key, None, 1.0, causal=True)
    )


def test_maxima_gather_over_micro_batches_with_gradients_and_only_at_their_steps():
    model = deepseek()
    clip = QKClip(model, every=2)
    layer = next(iter(clip.layers.values()))
    one, two = tokens(), tokens()
    model(one)
    first = layer.max_logits.clone()
    model(two)
    both = layer.max_logits.clone()
    clip.record(0)
    model(two)
    assert torch.equal(torch.maximum(first, layer.max_logits), both)
    with torch.no_grad():
        clip.record(0)
        model(one)
    assert (layer.max_logits == -torch.inf).all()
    clip.step(0)
    model(one)
    assert (layer.max_logits == -torch.inf).all()
    clip.step(1)
    model(one)
    assert torch.equal(layer.max_logits, first)


def test_a_logit_that_is_not_finite_leaves_its_head_alone():
    model = deepseek()
    clip = QKClip(model, threshold=1.0)
    before = copy.deepcopy(model.state_dict())
    for layer in clip.layers.values():
        layer.max_logits = torch.tensor([torch.inf, torch.nan, 0.5, -torch.inf])
    clip.step(0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_cannot_be_clipped_is_refused():
    with pytest.raises(ValueError, match="no trainable attention"):
        MuonClip(nn.Linear(4, 4), lr=0.1)
    with pytest.raises(ValueError, match="no trainable attention"):
        MuonClip(deepseek().requires_grad_(False), lr=0.1)
    with pytest.raises(ValueError, match="sdpa"):
        MuonClip(deepseek(attn_implementation="eager"), lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        MuonClip(deepseek(), lr=0.1, momentum=1.0)
    model = deepseek()
    assert MuonClip(model, lr=0.1, qk_clip_threshold=None).qk_clip is None
    assert model.config._attn_implementation == "sdpa"


def test_the_switch_of_attention_is_not_saved(tmp_path):
    model = deepseek()
    MuonClip(model, lr=0.1)
    model.save_pretrained(tmp_path)
    assert DeepseekV3ForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_resumed_run_continues_bit_by_bit(tmp_path):
    batches = [tokens() for _ in range(7)]

    def start():
        torch.manual_seed(1)
        model = deepseek()
        optimiser = MuonClip(model, lr=0.02, qk_clip_threshold=0.001, qk_clip_every=2)
        return model, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (step + 1))

    def run(model, optimiser, schedule, batches):
        for ids in batches:
            train(model, optimiser, [ids])
            schedule.step()

    straight = start()
    run(*straight, batches)
    assert straight[1].qk_clip.clipped.any()
    before = start()
    run(*before, batches[:4])
    torch.save([part.state_dict() for part in before], tmp_path / "checkpoint.pt")
    resumed = start()
    run(*resumed, batches[:1])  # a false start, after which the next step is not one that records
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, batches[4:])
    for one, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(straight[1].qk_clip.highest, resumed[1].qk_clip.highest)


def test_accelerate_drives_it_like_a_plain_loop():
    batches = [tokens() for _ in range(3)]
    plain = deepseek()
    prepared = copy.deepcopy(plain)
    train(plain, MuonClip(plain, lr=0.02, qk_clip_threshold=0.001), batches)
    accelerator = Accelerator(cpu=True)
    optimiser = MuonClip(prepared, lr=0.02, qk_clip_threshold=0.001)
    model, wrapped = accelerator.prepare(prepared, optimiser)
    for ids in batches:
        wrapped.zero_grad()
        accelerator.backward(language_loss(model, ids))
        wrapped.step()
    for one, other in zip(plain.parameters(), prepared.parameters(), strict=True):
        assert torch.equal(one, other)


def process(rank, clip, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for layer in clip.layers.values():
        layer.max_logits = torch.tensor([[0.5, 3.0, 0.1, -torch.inf], [2.0, 0.2, 0.4, 0.3]][rank])
    clip.step(0)
    results.put((clip.highest.tolist(), [layer.q_proj.weight.tolist() for layer in clip.layers.values()]))
    dist.destroy_process_group()


def test_processes_clip_by_the_maximum_over_all(tmp_path):
    context, clip = multiprocessing.get_context("fork"), QKClip(deepseek(), threshold=1.0)
    results = context.Queue()
    arguments = [(rank, clip, tmp_path / "store", results) for rank in range(2)]
    workers = [context.Process(target=process, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    (highest, weights), other = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert highest == pytest.approx([2.0, 3.0, 0.4, 0.3] * 2)
    assert (highest, weights) == other


def counting(batch=8, length=12):
    """Sequences that count upwards by a step of their own: the first two tokens decide the rest."""
    start, step = torch.randint(0, 37, (batch, 1)), torch.randint(1, 4, (batch, 1))
    return 3 + (start + step * torch.arange(length)) % 37


def test_it_learns():
    model = deepseek()
    held_out = counting(64)
    with torch.no_grad():
        untrained = language_loss(model, held_out).item()
    train(model, MuonClip(model, lr=0.01), [counting(16) for _ in range(60)])
    with torch.no_grad():
        assert language_loss(model, held_out).item() < untrained / 2


def test_logits_stay_bounded_only_with_the_clip():
    def largest(threshold):
        torch.manual_seed(3)
        model = deepseek()
        optimiser = MuonClip(model, lr=0.3, qk_clip_threshold=threshold)
        history = []
        for _ in range(50):
            train(model, optimiser, [counting()])
            history.append(optimiser.qk_clip.highest.max())
        return torch.stack(history)

    # The clip comes after the step in which a head went over, and this learning rate overshoots in one step.
    assert largest(20.0).max() < 5 * 20
    assert largest(1e9)[-10:].min() > 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_steps_on_a_gpu_as_on_the_cpu():
    model, ids = deepseek(), tokens()
    other = copy.deepcopy(model).cuda()
    train(model, MuonClip(model, lr=0.01, qk_clip_threshold=0.001, ns_dtype=torch.float32), [ids])
    train(other, MuonClip(other, lr=0.01, qk_clip_threshold=0.001), [ids.cuda()])
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.cpu(), model.get_parameter(name), atol=2e-3, rtol=0.0, msg=name)


def test_what_comes_trained_learns_at_its_own_rate():
    """One step from the same gradients: the slow parts move a tenth as far, by either rule, and the others as before."""
    moved = []
    for slow in ((), ("0",)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = MuonClip(model, 0.01, 0.0, qk_clip_threshold=None, slow=slow, slow_scale=0.1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimiser.step()
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    usual, scaled = moved
    for name, movement in usual.items():
        factor = 0.1 if name.startswith("0.") else 1.0
        torch.testing.assert_close(scaled[name], factor * movement, rtol=1e-3, atol=1e-7)

"""`k25lite bench training`: equal work on both sides, counts that can be checked, and no timing of different results."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from k25lite.bench import PRODUCT, SUBJECT, Disagreement, Report, peak_activations
from k25lite.cli import app
from k25lite.training import bench, bench_plain
from k25lite.training.loop import train
from k25lite.vision.bench import count_flops as count_vision_flops

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()  # then the loop trains there


@pytest.fixture
def quick():
    return bench.Bench(Report("a device"), CPU, quick=True)


@pytest.fixture
def untimed(monkeypatch):
    """Fails the test if anything is timed; the yardstick aside."""
    monkeypatch.setattr(bench, "fastest_product", lambda *_: None)
    monkeypatch.setattr(bench, "median_seconds", lambda *_, **__: pytest.fail("timed"))


def decoder_like(model, **changes):
    text = model.config.text_config
    shape = {"vocabulary": text.vocab_size, "width": text.hidden_size, "layers": text.num_hidden_layers}
    shape |= {"heads": text.num_attention_heads, "parameters": bench_plain.active_parameters(model.language_model)}
    return bench_plain.PlainDecoder(**shape | changes)


def test_the_plain_decoder_is_a_llama(quick):
    """Same weights, same packed rows, same logits as transformers' own."""
    ours = decoder_like(quick.model())
    layer, width, heads = ours.layers[0], ours.embedding.embedding_dim, ours.layers[0].heads
    config = LlamaConfig(
        vocab_size=ours.embedding.num_embeddings,
        hidden_size=width,
        intermediate_size=layer.down.in_features,
        num_hidden_layers=len(ours.layers),
        num_attention_heads=heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    state = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.norm.weight}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.2)  # so that attention is far from uniform
    for i, layer in enumerate(ours.layers):
        parts = zip("qkv", layer.qkv.weight.chunk(3), strict=True)
        layer_state = {f"self_attn.{name}_proj": part for name, part in parts} | {"self_attn.o_proj": layer.out.weight}
        layer_state |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), layer.gate_up.weight.chunk(2), strict=True))
        layer_state |= {"mlp.down_proj": layer.down.weight, "input_layernorm": layer.norm1.weight}
        layer_state |= {"post_attention_layernorm": layer.norm2.weight}
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer_state.items()}
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(state | {"lm_head.weight": ours.embedding.weight})
    batch = quick.batch(quick.rows(3))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    assert (inputs["position_ids"] == 0).sum() > 3  # several documents to a row
    torch.testing.assert_close(ours(**inputs).logits, llama(**inputs, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def sees_other_documents(decoder):
    forward = decoder.forward
    decoder.forward = lambda input_ids, position_ids: forward(input_ids, torch.arange(input_ids.shape[1])[None])
    return decoder


def sees_the_future(decoder):
    for layer in decoder.layers:
        forward = layer.forward
        layer.forward = lambda x, cos, sin, mask, f=forward: f(x, cos, sin, mask | mask.mT)
    return decoder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda decoder: decoder.layers.append(nn.Linear(32, 256)) and decoder, "active parameters"),
        (sees_other_documents, "plain PyTorch decoder lets a token see"),
        (sees_the_future, "plain PyTorch decoder lets a token see"),
    ],
    ids=["larger", "across documents", "ahead"],
)
def test_a_wrong_plain_decoder_is_refused_before_anything_is_timed(quick, monkeypatch, untimed, spoil, message):
    decoder = decoder_like(quick.model())
    bench_plain.refuse_unequal_work("case", decoder, quick.model(), quick.batch(quick.rows(2)))
    monkeypatch.setattr(bench, "PlainDecoder", lambda *_: spoil(decoder))
    with pytest.raises(Disagreement, match=message):
        quick.language()


def test_a_language_model_that_ignores_documents_is_refused(quick, monkeypatch, untimed):
    model = quick.model()
    forward = model.forward
    model.forward = lambda input_ids, position_ids: forward(input_ids)
    with pytest.raises(Disagreement, match="k25lite lets a token see"):
        bench_plain.refuse_unequal_work("case", decoder_like(model), model, quick.batch(quick.rows(2)))


@pytest.mark.parametrize("moe", [False, True])
def test_the_plain_decoder_has_as_many_active_parameters_at_the_measured_size(quick, moe):
    model = replace(quick, quick=False).model(moe)
    active = bench_plain.active_parameters(model.language_model)
    assert bench_plain.active_parameters(decoder_like(model)) == pytest.approx(active, rel=0.01)
    total = sum(p.numel() for p in model.language_model.parameters())
    assert (active < 0.6 * total) if moe else (active == total)


def test_experts_add_only_their_router_to_what_a_token_meets(quick):
    dense, experts = (bench_plain.active_parameters(quick.model(moe).language_model) for moe in (False, True))
    assert experts - dense == 8 * 32  # experts x width, in the second of two layers


def test_flops_are_those_torch_counts(quick):
    batch, model = quick.batch(quick.rows(3)), quick.model()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    for contender in (model, decoder_like(model)):
        # Plain matrix products, which torch can count, instead of fused attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            contender(**inputs)
        assert counter.get_total_flops() == bench_plain.count_flops(contender, batch)


def test_flops_of_vision_are_the_encoders_and_the_projectors(quick):
    model, rows = quick.model(), bench.vision_rows(4, 32, 600)
    batch = quick.batch(rows)
    text = {name: tensor for name, tensor in batch.items() if name not in ("pixel_values", "grid_thw")}
    vision = count_vision_flops(model.vision_tower.config, [(4, 4, 4)] * 4)
    projector = 4 * 4 * 2 * (128 * 128 + 128 * 32)  # chunks x tokens; two matrices
    assert bench_plain.count_flops(model, batch) - bench_plain.count_flops(model, text) == vision + projector


def test_saved_activations_by_hand():
    weight, batch = torch.ones(10, requires_grad=True), torch.ones(10)
    size = 10 * 4

    def once():
        hidden = (weight * batch).exp()  # keeps the batch, and its own result
        (hidden.sin() + hidden[:5].cos().sum()).sum().backward()  # keep the same storage again

    def two_phases():
        once()
        (weight * batch).exp().exp().sum().backward()  # keeps two results, when the first phase has let go

    assert peak_activations(once, [weight, batch]) == size
    assert peak_activations(two_phases, [weight, batch]) == 2 * size
    assert peak_activations(once, []) == 2 * size


def test_decoupled_memory_is_that_of_its_largest_phase(quick):
    quick.decoupled()
    rows = {(row.metric, row.subject): row for row in quick.report.rows}
    model, batch = quick.model(), quick.batch(bench.vision_rows(32, 32, len(quick.words)))
    outside = [*model.parameters(), *batch.values()]
    vision = batch.pop("pixel_values"), batch.pop("grid_thw")
    embeds = model.encode_vision(*vision).detach().requires_grad_()
    backbone = peak_activations(lambda: quick.loss(model, batch | {"vision_embeds": embeds}).backward(), outside)
    half = [tensor[: len(tensor) // 2] for tensor in vision]  # 16 of the 32 chunks
    part = peak_activations(lambda: model.encode_vision(*half).sum().backward(), outside)
    ours = rows["activation memory", SUBJECT].value
    assert ours == pytest.approx(max(backbone, part) / 1e6, rel=0.01)
    peer = rows["activation memory", "not decoupled"]
    assert peer.ratio == pytest.approx(peer.value / ours)
    assert peer.ratio > 1.5


@pytest.mark.skipif(GPU, reason="needs a machine without a GPU: on others the loop does not train on the CPU")
def test_another_training_is_refused_before_anything_is_timed(quick, monkeypatch, untimed):
    def careless(model, steps, rows, recipe, **options):
        return train(model, steps, rows, replace(recipe, clip=1e-3), **options)

    monkeypatch.setattr(bench, "RECIPE", replace(bench.RECIPE, optimiser="adamw", clip=1e3))
    monkeypatch.setattr(bench, "train", careless)
    with pytest.raises(Disagreement, match="updates of bare steps"):
        quick.loop()


@pytest.mark.parametrize("share", [0, 2])
def test_other_gradients_of_the_decoupled_encoder_are_refused(quick, monkeypatch, untimed, share):
    def backward(model, vision, loss_of):
        embeds = model.encode_vision(**vision)
        loss_of(
            vision_embeds=embeds.detach() + share * (embeds - embeds.detach()) if share else embeds.detach()
        ).backward()

    monkeypatch.setattr(bench, "decoupled_backward", backward)
    with pytest.raises(Disagreement, match="gradients of not decoupled"):
        quick.decoupled()


def test_rows_of_fractions():
    report = Report("a device")
    report.add_fractions("case", {"k25lite": 600.0, "peer": 500.0}, {"k25lite": 2.0, "peer": 5.0}, 1000.0)
    rows = [(row.metric, row.subject, row.value, row.unit, row.ratio) for row in report.rows]
    assert rows == [
        ("fraction of matrix peak", "k25lite", 0.3, "fraction", None),
        ("fraction of matrix peak", "peer", 0.1, "fraction", None),
        ("matrix peak", PRODUCT, 1000.0, "FLOP/s", None),
    ]


def test_a_quick_run_fills_the_report(tmp_path):
    path = tmp_path / "bench.json"
    ran = CliRunner().invoke(app, ["bench", "training", "--quick", "--device", "cpu", "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(path.read_text())
    assert report["device"].startswith("CPU")
    rows = report["rows"]
    assert all(list(row) == ["case", "subject", "metric", "value", "unit", "ratio"] for row in rows)
    assert all(math.isfinite(row["value"]) and (row["ratio"] is None or row["ratio"] > 0) for row in rows)
    found = {(row["case"], row["metric"], row["subject"]): row for row in rows}
    assert len(found) == len(rows)
    expected = {
        ("language model, dense, 3 x 64 tokens", "forward+backward tokens/s"): {"plain PyTorch decoder"},
        ("language model, experts, 2 x 128 tokens", "forward+backward tokens/s"): {"plain PyTorch decoder", "dense"},
        ("optimiser, 4 x 64 tokens", "optimiser time"): {"AdamW", "MuonClip without QK-Clip"},
        ("optimiser, 4 x 64 tokens", "training step time"): {
            "AdamW",
            "MuonClip without QK-Clip",
            "forward+backward alone",
        },
        ("decoupled encoder, 32 chunks of 4 x 32 x 32 px", "forward+backward time"): {"not decoupled"},
        ("decoupled encoder, 32 chunks of 4 x 32 x 32 px", "activation memory"): {"not decoupled"},
        ("width 64, 256 tokens", "forward+backward time"): set(),
        ("depth 2, 256 tokens", "activation memory"): set(),
        ("context 128, 256 tokens", "activation memory"): set(),
    } | ({} if GPU else {("training loop, 4 x 64 tokens", "tokens/s"): {"bare steps"}})
    for (case, metric), peers in expected.items():
        mine = found[f"cpu: {case}", metric, "k25lite"]
        assert mine["ratio"] is None
        assert {s for c, m, s in found if (c, m) == (f"cpu: {case}", metric)} == peers | {"k25lite"}
        for peer in peers:  # more tokens/s, less of all else
            row = found[f"cpu: {case}", metric, peer]
            ratio = mine["value"] / row["value"] if metric.endswith("/s") else row["value"] / mine["value"]
            assert row["ratio"] == pytest.approx(ratio)
    assert all(row["value"] <= 1e-3 for row in rows if "difference" in row["metric"])
    assert GPU or ("cpu: training loop, 4 x 64 tokens", "loop overhead", "k25lite") in found
    assert all(
        words in ran.output for words in ("fraction of matrix peak", "plain PyTorch decoder", "activation memory")
    )


@pytest.mark.parametrize("room", ["training", "vision"])
def test_a_disagreement_is_one_line_and_exit_code_1(room, monkeypatch, tmp_path):
    def run(device, quick):
        raise Disagreement("the towers differ; not timed")

    monkeypatch.setattr(f"k25lite.{room}.bench.run", run)
    failed = CliRunner().invoke(app, ["bench", room, "--json", str(tmp_path / "bench.json")])
    assert failed.exit_code == 1
    assert failed.stderr == "k25lite: the towers differ; not timed\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_is_exit_code_2():
    failed = CliRunner().invoke(app, ["bench", "training", "--device", "abacus"])
    assert failed.exit_code == 2
    assert "abacus" in failed.stderr


def test_a_crashed_game_is_one_line_and_exit_code_1(monkeypatch, tmp_path):
    def crash(*_, **__):
        raise RuntimeError("the game crashed while gameplay_0001.mp4 was recorded: see game.log")

    monkeypatch.setattr("k25lite.gameplay.record.record", crash)
    failed = CliRunner().invoke(app, ["record", "--out", str(tmp_path / "game")])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("k25lite: the game crashed while gameplay_0001.mp4")
    assert len(failed.stderr.strip().splitlines()) == 1

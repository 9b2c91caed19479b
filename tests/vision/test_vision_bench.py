"""`k25lite bench vision`: fair contenders, counts that can be checked, and no timing of different results."""

import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from k25lite.bench import PRODUCT, Disagreement, Report
from k25lite.vision import MoonViT3D, MoonViT3DConfig, bench

MIXED = [(1, 2, 4), (3, 4, 4), (1, 4, 4), (2, 2, 2), (3, 2, 2)]


def tiny() -> MoonViT3DConfig:
    return MoonViT3DConfig.lite(num_hidden_layers=2, hidden_size=32, intermediate_size=48)


SETUP = bench.Setup("tiny", tiny, torch.device("cpu"), torch.float32)


@pytest.fixture
def pair():
    return bench.towers(SETUP)


@pytest.fixture
def untimed(monkeypatch):
    """Fails the test if anything is timed; the yardstick aside."""
    monkeypatch.setattr(bench, "fastest_product", lambda *_: None)
    monkeypatch.setattr(bench, "median_seconds", lambda *_, **__: pytest.fail("timed"))


def measure(pair, monkeypatch, grids=MIXED) -> Report:
    monkeypatch.setattr(bench, "towers", lambda setup: pair)
    report = Report("a device")
    bench.measure(report, SETUP, {"mixed": grids}, quick=True)
    return report


def test_flops_by_hand():
    """Two items of 4 and 8 patches, width 8, MLP 16, patches of 2 pixels, 3 layers."""
    config = MoonViT3DConfig.lite(
        num_hidden_layers=3, hidden_size=8, num_attention_heads=2, intermediate_size=16, patch_size=2
    )
    embed = 12 * 2 * (3 * 2 * 2) * 8
    projections = 12 * 2 * 4 * 8 * 8
    mlp = 12 * 2 * 2 * 8 * 16
    attention = 2 * 2 * 8 * (4 * 4 + 8 * 8)
    assert bench.count_flops(config, [(1, 2, 2), (2, 2, 2)]) == embed + 3 * (projections + mlp + attention)


def test_flops_are_those_torch_counts_in_transformers_tower(pair):
    grids = [(1, 4, 4), (1, 2, 6)]
    ours, reference = pair
    reference.set_attn_implementation("eager")  # plain matrix products, which torch can count
    contender = bench.contenders_for(ours, reference, grids, SETUP)["transformers"]
    with FlopCounterMode(display=False) as counter:
        contender.forward()
    assert counter.get_total_flops() == bench.count_flops(ours.config, grids)


def test_the_peer_runs_its_default_attention_with_full_precision_tables():
    setup = bench.Setup("tiny", tiny, torch.device("cpu"), torch.bfloat16)
    ours, reference = bench.towers(setup)
    assert reference.config._attn_implementation == "sdpa"
    assert {p.dtype for model in (ours, reference) for p in model.parameters()} == {torch.bfloat16}
    assert reference.rotary_emb.inv_freq.dtype == torch.float32  # as from_pretrained leaves it


def test_both_see_the_same_patches_and_the_peer_one_length_per_call(pair):
    contenders = bench.contenders_for(*pair, MIXED, SETUP)
    assert list(contenders) == ["k25lite", "transformers, one call per t"]
    [(pixels, grid_thw)] = contenders["k25lite"].calls
    assert grid_thw.tolist() == [list(grid) for grid in MIXED]
    ours = dict(zip(MIXED, pixels.split(grid_thw.prod(1).tolist()), strict=True))
    peer = {}
    for pixels, grid_thw in contenders["transformers, one call per t"].calls:
        assert len(set(grid_thw[:, 0].tolist())) == 1
        parts = pixels.split(grid_thw.prod(1).tolist())
        peer |= {tuple(grid): part for grid, part in zip(grid_thw.tolist(), parts, strict=True)}
    assert peer.keys() == ours.keys()
    assert all(torch.equal(peer[grid], ours[grid]) for grid in MIXED)


def test_images_of_any_size_are_one_call_of_transformers(pair):
    contenders = bench.contenders_for(*pair, [(1, 2, 4), (1, 4, 6)], SETUP)
    assert list(contenders) == ["k25lite", "transformers"]
    assert len(contenders["transformers"].calls) == 1


def test_transformers_cannot_take_mixed_lengths_in_one_call(pair):
    """Why it gets one call per length. When this fails, it has learnt to, and should get one call."""
    [(pixels, grid_thw)] = bench.contenders_for(*pair, MIXED, SETUP)["k25lite"].calls
    with pytest.raises(RuntimeError):
        pair[1](pixels, grid_thw)


def test_one_call_per_length_trains_like_one_call(pair):
    """On our tower, which can do both: the loss of the parts is the loss of the whole."""
    ours, _ = pair
    contenders = bench.contenders_for(*pair, MIXED, SETUP)
    whole = bench.gradients(contenders["k25lite"])
    parts = bench.gradients(bench.Contender(ours, contenders["transformers, one call per t"].calls))
    assert whole.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3)


def test_different_outputs_are_refused_before_anything_is_timed(pair, monkeypatch, untimed):
    with torch.no_grad():
        pair[1].layers[1].attn.q_proj.bias += 0.1
    with pytest.raises(Disagreement, match=r"tiny, float32: mixed: outputs of transformers, one call per t"):
        measure(pair, monkeypatch)


def test_a_missing_temporal_embedding_is_refused(pair, monkeypatch, untimed):
    timeless = MoonViT3D(MoonViT3DConfig.lite(**tiny().to_diff_dict() | {"temporal_embedding": False}))
    timeless.load_state_dict(pair[0].state_dict())
    with pytest.raises(Disagreement, match="outputs"):
        measure((timeless, pair[1]), monkeypatch)


def test_different_gradients_are_refused_before_anything_is_timed(pair, monkeypatch, untimed):
    pair[1].layers[0].mlp.fc1.weight.register_hook(lambda gradient: gradient * 1.1)
    with pytest.raises(Disagreement, match="gradients"):
        measure(pair, monkeypatch)


def test_rows_follow_from_the_seconds():
    report = Report("a device")
    # 100 tokens, 600 operations, and a product of 50 operations that took 0.1 s: a peak of 500 per second.
    seconds = {"k25lite": 2.0, "transformers": 5.0, PRODUCT: 0.1}
    bench.add_rows(report, "case", "forward", seconds, tokens=100, work=600.0, flops_of_product=50)
    rows = {(row.metric, row.subject): (row.value, row.unit, row.ratio) for row in report.rows}
    assert rows == {
        ("forward time", "k25lite"): (2.0, "s", None),
        ("forward time", "transformers"): (5.0, "s", 2.5),
        ("forward tokens/s", "k25lite"): (50.0, "tokens/s", None),
        ("forward tokens/s", "transformers"): (20.0, "tokens/s", 2.5),
        ("forward fraction of matrix peak", "k25lite"): (pytest.approx(0.6), "fraction", None),
        ("forward fraction of matrix peak", "transformers"): (pytest.approx(0.24), "fraction", None),
        ("forward matrix peak", PRODUCT): (500.0, "FLOP/s", None),
    }


def test_the_cases_are_what_their_names_say():
    cases = bench.cases()
    assert cases == bench.cases()
    assert [len(grids) for grids in cases.values()] == [int(name.split()[0]) for name in cases]
    for name, grids in cases.items():
        assert 10_000 < sum(t * h * w for t, h, w in grids) < 25_000, name
        assert all(h % 2 == 0 and w % 2 == 0 for _, h, w in grids)
        assert {t for t, _, _ in grids} == ({4} if "video" in name else {1, 2, 3, 4} if "chunks" in name else {1})
        assert (len(set(grids)) > 1) == ("mixed" in name or "many" in name)


def test_a_quick_run_fills_the_report():
    report = bench.run("cpu", quick=True)
    assert report.device.startswith("CPU")
    timed = [row for row in report.rows if row.metric in ("forward time", "training time") and row.unit == "s"]
    cases = [f"cpu, lite, float32: {name}" for name in bench.cases(quick=True)]
    assert {(row.case, row.metric) for row in timed} == {
        (case, f"{mode} time") for case in cases for mode in ("forward", "training")
    }
    ours = {(row.case, row.metric): row.value for row in timed if row.subject == "k25lite"}
    peer = {(row.case, row.metric): row for row in timed if row.subject != "k25lite"}
    assert ours.keys() == peer.keys()
    assert all(row.ratio == row.value / ours[key] for key, row in peer.items())
    assert all(row.value <= 1e-3 for row in report.rows if "difference" in row.metric)

    means = report.rows[-6:]
    assert {row.case for row in means} == {"cpu: geometric mean"}
    forward, training, both = means[::2]
    assert forward.ratio == statistics.geometric_mean(r.ratio for r in peer.values() if r.metric == "forward time")
    assert both.ratio == pytest.approx((forward.ratio * training.ratio) ** 0.5)
    ours = {
        r.case: r.value for r in report.rows if (r.subject, r.metric) == ("k25lite", "forward fraction of matrix peak")
    }
    assert ours.pop("cpu: geometric mean") == statistics.geometric_mean(ours.values()) == means[1].value

import json
import math
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from k25lite import results
from k25lite.results import (
    NO_SPREAD_REASON,
    ONE_SEED_REASON,
    SMOKE_REASON,
    Interval,
    Record,
    load,
    paired_interval,
    verdict,
)

EARLY, LATE = [0.71, 0.74, 0.72, 0.75, 0.70], [0.65, 0.66, 0.69, 0.67, 0.66]
ABOUT = {"report": "65.7 vs 61.5", "source": "Table 1"}


def record(profile: str = "lite", seeds: int = 5) -> Record:
    return Record("02_joint_training", profile, range(seeds), device="CPU", commit=None, versions={})


scores = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=8)


@given(scores, st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_agrees_with_scipys_paired_t_test(pairs, confidence):
    treatment, control = np.array(pairs).T
    ours = paired_interval(treatment, control, confidence)
    if not ours.has_width:
        assert np.ptp(treatment - control) <= 1e-8  # only then may the spread count as unknown
        return
    oracle = stats.ttest_rel(treatment, control).confidence_interval(confidence)
    np.testing.assert_allclose((ours.low, ours.high), (oracle.low, oracle.high), rtol=1e-9, atol=1e-9)
    assert ours.n == len(pairs)


def test_intervals_of_three_seeds_cover_the_truth_as_often_as_they_say_where_a_bootstrap_does_not():
    rng, truth, trials = np.random.default_rng(0), 0.3, 2000
    differences = rng.normal(truth, 1.0, (trials, 3))
    intervals = [paired_interval(d) for d in differences]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    resampled = differences[:, rng.integers(0, 3, (500, 3))].mean(-1)  # [trials, 500]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    bootstrap = np.mean((low <= truth) & (truth <= high))
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)
    assert bootstrap < 0.85


def test_pairing_removes_what_the_seeds_share():
    shared = np.array([0.0, 10.0, -20.0, 5.0])
    interval = paired_interval(shared + np.array([1.0, 1.1, 0.9, 1.0]), shared)
    assert interval.low > 0.8
    assert interval.high < 1.2


@pytest.mark.parametrize(
    ("treatment", "control", "message"),
    [
        ([1.0], [0.5], "at least 2 seeds, got 1"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "3 of treatment, 2 of control"),
        ([1.0, float("nan")], [1.0, 2.0], "treatment has a value that is not finite"),
        ([1.0, 2.0], [1.0, float("inf")], "control has a value that is not finite"),
        ([[1.0, 2.0]], None, "one value per seed"),
        ([], None, "one value per seed"),
    ],
)
def test_interval_refuses_what_it_cannot_use(treatment, control, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(treatment, control)


def test_seeds_without_spread_establish_nothing_even_when_rounding_makes_them_differ():
    interval = paired_interval([0.3, 0.8, 0.7], [0.1, 0.6, 0.5])  # differences 0.2, up to the last bit
    assert (interval.low, interval.high) == (interval.mean, interval.mean)
    assert verdict(interval) is None
    claim = record().compare("saturated", [1.0] * 5, [0.0] * 5, **ABOUT)
    assert (claim.holds, claim.reason) == (None, NO_SPREAD_REASON)


@pytest.mark.parametrize(
    ("low", "high", "direction", "expected"),
    [
        (0.1, 0.2, 1, True),
        (0.1, 0.2, -1, False),
        (-0.2, -0.1, 1, False),
        (-0.2, -0.1, -1, True),
        (-0.1, 0.2, 1, None),
        (-0.1, 0.2, -1, None),
        (0.0, 0.2, 1, None),  # touching zero does not exclude it
        (-0.2, 0.0, -1, None),
    ],
)
def test_verdict(low, high, direction, expected):
    assert verdict(Interval((low + high) / 2, low, high, 5), direction) is expected


def test_verdict_needs_a_direction():
    with pytest.raises(ValueError, match="direction"):
        verdict(Interval(0.1, 0.0, 0.2, 5), 0)


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5), st.sampled_from([1, -1]))
def test_only_the_verdict_of_the_interval_can_be_recorded(differences, direction):
    interval = paired_interval(differences)
    common = {**ABOUT, "ours": interval.mean, "ci95": (interval.low, interval.high), "n": 5, "direction": direction}
    right = verdict(interval, direction)
    for holds in (True, False, None):
        if holds is right:
            assert record().claim("c", holds=holds, **common).holds is right
        else:
            with pytest.raises(ValueError, match=f"holds={holds}, but .* gives {right}"):
                record().claim("c", holds=holds, **common)


@pytest.mark.parametrize("wrong", [{"ours": math.nan}, {"ours": {"a": math.inf}}, {"per_seed": {"a": [0.5, math.nan]}}])
def test_a_number_that_is_not_finite_is_refused_with_the_name_of_its_claim(wrong):
    told = {**ABOUT, "ours": 0.5, "ci95": None, "n": 1, "holds": None, "reason": "one run"} | wrong
    with pytest.raises(ValueError, match="claim 'c' has a value that is not finite"):
        record().claim("c", **told)


def test_a_limit_is_finite():
    with pytest.raises(ValueError, match="check 'c': a limit is a finite number, got inf"):
        record().check("c", 0.5, math.inf, source="ours")


def test_compare_computes_interval_means_and_verdict_from_the_seeds():
    claim = record().compare("table1.ocr.early>late", EARLY, LATE, arms=("early", "late"), unit="accuracy", **ABOUT)
    interval = paired_interval(EARLY, LATE)
    assert claim.ci95 == (interval.low, interval.high)
    assert (claim.n, claim.holds) == (5, True)
    assert claim.ours == pytest.approx({"early": 0.724, "late": 0.666, "difference": 0.058})
    assert claim.per_seed == {"early": EARLY, "late": LATE}
    assert record().compare("c", EARLY, LATE, direction=-1, **ABOUT).holds is False


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=14), st.sampled_from([1, -1]))
def test_counts_are_judged_as_mcnemars_exact_test_judges_them(pairs, direction):
    first, second = zip(*pairs, strict=True)
    only = sum(a and not b for a, b in pairs)
    other = sum(b and not a for a, b in pairs)
    chance = sum(math.comb(only + other, k) for k in range(min(only, other) + 1)) / 2 ** max(only + other - 1, 0)
    claim = record(seeds=len(pairs)).count("c", first, second, report="more", source="ours", direction=direction)
    rejects = only + other > 0 and chance < 0.05
    assert claim.holds is (((only > other) == (direction > 0)) if rejects else None)
    assert claim.ours["difference"] == pytest.approx((only - other) / len(pairs))
    assert (claim.ci95 is None) == (only == other == 0 or len(pairs) == 1)


def test_counts_by_hand():
    six = record(seeds=6).count("c", [True] * 6, [False] * 6, report="all", source="ours")
    assert six.holds is True
    assert six.ci95 == pytest.approx((2 * 0.025 ** (1 / 6) - 1, 1.0))
    assert record(seeds=5).count("c", [True] * 5, [False] * 5, report="all", source="ours").holds is None
    with pytest.raises(ValueError, match="one per seed"):
        record().count("c", [True, False, True], [True], report="", source="")


def test_one_seed_establishes_nothing():
    claim = record(seeds=1).compare("c", [0.9], [0.1], **ABOUT)
    assert (claim.holds, claim.ci95, claim.n, claim.reason) == (None, None, 1, ONE_SEED_REASON)


def test_values_are_counted_by_seed_not_by_example():
    with pytest.raises(ValueError, match="n=100, but n counts seeds, of 5"):
        record().compare("c", np.random.default_rng(0).normal(1, 1, 100), **ABOUT)


def test_smoke_claims_nothing_but_still_refuses_a_wrong_verdict():
    smoke = record("smoke", seeds=3)
    claim = smoke.compare("c", [1.0, 2.0, 1.5], [0.0, 0.9, 0.6], **ABOUT)
    assert (claim.holds, claim.reason) == (None, SMOKE_REASON)
    assert claim.ci95[0] > 0
    with pytest.raises(ValueError, match="gives False"):
        smoke.claim("d", ours=-1.0, ci95=(-2.0, -0.5), n=3, holds=True, **ABOUT)


def test_a_claim_that_could_not_be_measured_says_why():
    common = {**ABOUT, "ours": "not measured", "ci95": None, "n": 1}
    with pytest.raises(ValueError, match="say why"):
        record().claim("c", holds=None, **common)
    with pytest.raises(ValueError, match="holds=True"):
        record().claim("c", holds=True, reason="trust me", **common)
    assert record().claim("c", holds=None, reason="needs the open web", **common).holds is None


@pytest.mark.parametrize(
    ("value", "relation", "holds"),
    [(1e-6, "<=", True), (1e-5, "<=", True), (1e-4, "<=", False), (1e-4, ">=", True), (float("nan"), "<=", False)],
)
def test_check_compares_with_its_limit(value, relation, holds):
    assert record().check("parity", value, 1e-5, relation=relation, source="section 4.2").holds is holds


def test_names_are_recorded_once():
    r = record()
    r.metric("loss", 1.0)
    with pytest.raises(ValueError, match="'loss' is recorded already"):
        r.metric("loss", 2.0)
    with pytest.raises(ValueError, match="not a finite number"):
        r.metric("speed", float("inf"))


@pytest.mark.parametrize(
    ("profile", "seeds", "message"), [("huge", [0], "profile"), ("lite", [], "seeds"), ("lite", [1, 1], "seeds")]
)
def test_record_refuses_unknown_profiles_and_repeated_seeds(profile, seeds, message):
    with pytest.raises(ValueError, match=message):
        Record(notebook="x", profile=profile, seeds=seeds)


def saved(tmp_path):
    r = Record(notebook="02_joint_training", profile="lite", seeds=range(5))
    r.compare("holds", EARLY, LATE, arms=("early", "late"), **ABOUT)
    r.claim("numpy", ours=np.float32(0.5), ci95=np.array([0.25, 0.75]), n=np.int64(3), holds=np.True_, **ABOUT)
    r.check("parity", 1e-6, 1e-5, source="section 4.2")
    r.check("diverged", float("nan"), 1e-5, source="section 4.2")
    r.metric("tokens_per_second", 12000.0, unit="tokens/s")
    return r, r.save(tmp_path / "deep" / "02.json")


def test_saved_record_loads_back_equal_and_names_where_it_was_measured(tmp_path):
    r, path = saved(tmp_path)
    assert load(path) == r
    assert list(path.parent.iterdir()) == [path]  # nothing half-written stays behind
    content = json.loads(path.read_text())
    assert {"notebook", "profile", "seeds", "device", "commit", "versions", "date"} <= set(content)
    assert content["versions"]["torch"].startswith(__import__("torch").__version__.split("+")[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["claims"][0].update(holds=False), "'holds' says holds=False"),
        (lambda c: c["claims"][0].update(ci95=[-0.1, 0.2]), "gives None"),
        (lambda c: c["claims"][0].update(holds=None, reason=SMOKE_REASON), "at profile 'lite'"),
        (lambda c: c["checks"][1].update(holds=True), "'diverged' says holds=True"),
        (lambda c: c["claims"][0].pop("source"), "source"),
        (lambda c: c.pop("device"), "'device' is missing"),
        (lambda c: c.pop("claims"), "'claims' is missing"),
        (lambda c: c.update(claims=[7]), "not a results file"),
    ],
)
def test_load_names_the_file_and_refuses_what_does_not_follow(tmp_path, edit, message):
    _, path = saved(tmp_path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"claims": NaN}'])
def test_load_names_a_file_that_is_not_a_record(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is not a results file"):
        load(path)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    _, path = saved(tmp_path)
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        record().save(path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_commit_is_of_the_librarys_own_checkout_and_marks_local_changes(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "k25lite" / "results.py"
    module.parent.mkdir()
    module.write_text("one")
    monkeypatch.setattr(results, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.current_commit() is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    head = git("rev-parse", "HEAD")
    assert results.current_commit() == head
    module.write_text("two")
    assert results.current_commit() == f"{head}-dirty"
    monkeypatch.setattr(results, "__file__", str(tmp_path / ".venv" / "k25lite" / "results.py"))
    assert results.current_commit() is None

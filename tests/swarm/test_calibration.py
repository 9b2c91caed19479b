"""What is measured of the sub-agent, and what is drawn from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.swarm import Limits, Reply, ScriptedPolicy
from k25lite.swarm.calibration import Calibration, measure, measure_alone
from k25lite.swarm.subagent import Subagent
from k25lite.swarm.subagent_training import demonstrate
from k25lite.world.library import Library, Shares

MEASURED = Calibration(
    (2, 4, 10),
    (
        np.array([[1, 3, 1.0], [1, 3, 0.9]]),
        np.array([[1, 5, 0.8], [0, 7, 0.0]]),
        np.array([[1, 20, 0.5], [0, 24, 0.0]]),
    ),
    limit=24,
)
PLAIN = Shares(0, 0, 0, 0, 0, 0, 0, 0)  # all that is known of people stands in their articles


def test_a_draw_is_a_trial_of_a_measured_size_scaled_to_the_names():
    random = np.random.default_rng(0)
    assert {MEASURED.draw(2, random) for _ in range(200)} == {(True, 3, 1.0), (True, 3, 0.9)}
    assert {MEASURED.draw(4, random) for _ in range(200)} == {(True, 5, 0.8), (False, 7, 0.0)}
    assert {MEASURED.draw(1, random) for _ in range(200)} == {(True, 2, 1.0), (True, 2, 0.9)}
    # Between them one of both: for 3 names 3 steps of 2 are 4.5, rounded to even, 5 of 4 are 3.75; who failed, failed.
    between = {MEASURED.draw(3, random) for _ in range(400)}
    assert between == {(True, 4, 1.0), (True, 4, 0.9), (True, 4, 0.8), (False, 7, 0.0)}


def test_beyond_what_was_measured_the_limit_is_reached():
    random = np.random.default_rng(0)
    assert {MEASURED.draw(12, random) for _ in range(200)} == {(True, 24, 0.5), (False, 24, 0.0)}
    assert {MEASURED.draw(100, random) for _ in range(200)} == {(False, 24, 0.0)}
    unlimited = Calibration((1,), (np.array([[1, 2, 1.0]]),))
    assert unlimited.draw(1000, random) == (True, 2000, 1.0)


def test_the_nearer_size_is_the_likelier():
    random = np.random.default_rng(0)
    shares = [MEASURED.draw(5, random)[2] for _ in range(3000)]
    # 5 of 4 to 10: five in six draws are of the trials of 4.
    assert abs(np.mean([share == 0.8 for share in shares]) - 5 / 12) < 0.04
    assert abs(np.mean([share == 0.5 for share in shares]) - 1 / 12) < 0.03


trials = st.lists(
    st.tuples(st.sampled_from((0.0, 1.0)), st.integers(1, 24).map(float), st.floats(0, 1)), min_size=1, max_size=4
).map(np.array)


@given(
    st.dictionaries(st.integers(1, 64), trials, min_size=1, max_size=4),
    st.sampled_from((None, 24)),
    st.integers(1, 200),
    st.integers(0, 9),
)
def test_every_draw_keeps_the_limit_and_fails_with_nothing(tmp_path_factory, found, limit, names, seed):
    sizes = tuple(sorted(found))
    calibration = Calibration(sizes, tuple(found[size] for size in sizes), limit)
    finished, steps, share = calibration.draw(names, np.random.default_rng(seed))
    assert 1 <= steps <= (limit or steps)
    assert 0 <= share <= 1
    assert finished or share == 0
    path = tmp_path_factory.mktemp("calibration") / "one.json"
    calibration.save(path, "team")
    again = Calibration.load(path)
    assert (again.sizes, again.limit) == (sizes, limit)
    for mine, theirs in zip(again.trials, calibration.trials, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_file_holds_several(tmp_path):
    other = Calibration((1,), (np.array([[1, 2, 1.0]]),))
    MEASURED.save(tmp_path / "c.json")
    other.save(tmp_path / "c.json", "alone")
    assert Calibration.load(tmp_path / "c.json").sizes == (2, 4, 10)
    assert Calibration.load(tmp_path / "c.json", "alone").sizes == (1,)
    with pytest.raises(ValueError, match="no calibration called 'nobody'"):
        Calibration.load(tmp_path / "c.json", "nobody")


@pytest.mark.parametrize(
    ("sizes", "trials"),
    [
        ((), ()),
        ((0,), ([[1, 1, 1]],)),
        ((2, 2), ([[1, 1, 1]], [[1, 1, 1]])),
        ((1,), ([],)),
        ((1,), ([[1, 1]],)),
        ((1,), ([[2, 1, 1]],)),
        ((1,), ([[1, 0, 1]],)),
        ((1,), ([[1, 1, 1.1]],)),
        ((1,), ([[1, 1, float("nan")]],)),
        ((1, 2), ([[1, 1, 1]],)),
    ],
)
def test_what_is_no_calibration_is_refused(sizes, trials):
    with pytest.raises(ValueError, match="sizes ascend from 1"):
        Calibration(sizes, tuple(np.array(part, float) for part in trials))


def test_nobody_is_no_assignment():
    with pytest.raises(ValueError, match="a name or more, got 0"):
        MEASURED.draw(0, np.random.default_rng(0))


def test_who_makes_no_mistakes_is_measured_to_make_none():
    """The script, where articles tell all: one step for each name and one for the answer, until the limit is reached."""
    libraries = [Library(seed, people=30, shares=PLAIN) for seed in (1, 2)]
    measured = measure(Subagent(ScriptedPolicy(demonstrate)), libraries, (1, 3, 9), trials=4, limits=Limits(steps=8))
    assert measured.limit == 8
    for size, part in zip(measured.sizes, measured.trials, strict=True):
        expected = [1, size + 1, 1.0] if size + 1 <= 8 else [0, 8, 0.0]
        np.testing.assert_array_equal(part, [expected] * 4)


def test_wrong_and_missing_rows_count_as_wrong():
    libraries = [Library(1, people=30, shares=PLAIN)]

    def half(messages):
        reply = demonstrate(messages)
        return reply if reply.calls else reply.content.splitlines()[0]

    measured = measure(ScriptedPolicy(half), libraries, (2, 4), trials=3)
    assert [part[:, 2].tolist() for part in measured.trials] == [[1 / 2] * 3, [1 / 4] * 3]


def test_libraries_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="libraries of 32 people or more"):
        measure(ScriptedPolicy(demonstrate), [Library(1, people=20)], trials=1)
    with pytest.raises(ValueError, match="people or more are needed"):
        measure(ScriptedPolicy(demonstrate), [], trials=1)


def test_who_reads_alone_and_makes_no_mistakes_takes_a_step_for_each_and_one_for_the_answer():
    libraries = [Library(seed, people=60, idle=0, shares=PLAIN) for seed in (1, 2)]
    measured = measure_alone(Subagent(ScriptedPolicy(demonstrate)), libraries, (1, 4, 11), trials=4, steps=30)
    assert measured.limit == 30
    for size, part in zip(measured.sizes, measured.trials, strict=True):
        np.testing.assert_array_equal(part, [[1, size + 1, 1.0]] * 4)


def test_who_errs_alone_is_measured_to_err():
    """A reader whose notes of the second person on are about somebody else."""

    def forgetful(messages):
        reply = demonstrate(messages)
        return reply if len(messages) < 4 else Reply(reply.content.replace(" : ", " ii : "), reply.calls)

    libraries = [Library(1, people=60, idle=0, shares=PLAIN)]
    measured = measure_alone(Subagent(ScriptedPolicy(forgetful)), libraries, (1, 4), trials=3)
    assert measured.trials[0][:, 2].tolist() == [1.0] * 3
    assert measured.trials[1][:, 2].tolist() == [1 / 4] * 3


def test_people_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match="32 people have a fact in common"):
        measure_alone(ScriptedPolicy(demonstrate), [Library(1, people=20)], (1, 32), trials=1)
    with pytest.raises(ValueError, match="a fact in common"):
        measure_alone(ScriptedPolicy(demonstrate), [], trials=1)

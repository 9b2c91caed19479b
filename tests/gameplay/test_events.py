"""Events from hand-written sequences of frames at 10 frames per second, with the events worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.gameplay.events import KINDS, NOTED, STATE, Step, find_events, states

FPS = 10
CHANGES = {
    "monster": {"monster": True},
    "hit": {"hit": True},
    "boss": {"bosses": ("Cyberdemon",)},
    "pickup": {"pickups": ("Clip",)},
    "dead": {"alive": False, "health": 0},
    "weak": {"health": 25},
}


def film(length, **frames):
    """`length` frames of quiet life on map A; `hit=[3, 4]` makes of frames 3 and 4 what CHANGES says of `hit`."""
    steps = [Step(map="A") for _ in range(length)]
    for name, indices in frames.items():
        for i in indices:
            steps[i] = replace(steps[i], **CHANGES[name])
    return steps


def found(steps, *kinds):
    events = find_events("v.mp4", steps, FPS)
    assert all(event.video == "v.mp4" for event in events)
    return [(event.kind, event.start, event.end) for event in events if not kinds or event.kind in kinds]


def test_nothing_happens():
    assert found(film(100)) == []
    assert find_events("v.mp4", [], FPS) == []


def test_hits_up_to_three_seconds_apart_are_one_fight():
    assert found(film(200, monster=range(200), hit=[10, 20, 50])) == [("fight", 1.0, 5.1)]
    assert found(film(200, monster=range(200), hit=[10, 20, 51, 62])) == [("fight", 1.0, 2.1), ("fight", 5.1, 6.3)]


def test_fights_under_a_second_are_dropped():
    assert found(film(100, monster=range(100), hit=[10, 18])) == []
    assert found(film(100, monster=range(100), hit=[10, 19])) == [("fight", 1.0, 2.0)]


def test_damage_counts_only_within_a_second_of_seeing_a_monster():
    # slime hurts on every frame from 5 to 60; the monster is in view until frame 10
    assert found(film(100, monster=range(11), hit=range(5, 61))) == [("fight", 0.5, 2.1)]
    assert found(film(100, hit=range(5, 61))) == []


def test_a_monster_of_the_map_before_does_not_make_a_fight():
    steps = film(40, monster=range(15), hit=range(15, 40))
    steps[15:] = [replace(step, map="B") for step in steps[15:]]
    assert found(steps, "fight") == []


def test_boss_fight_takes_its_time_out_of_the_fights_around_it():
    steps = film(300, monster=range(300), boss=[*range(30, 41), *range(140, 146)], hit=[*range(10, 200, 10), 205])
    # from the first sight to the last, 9.9 s unseen in between; hits from 1.0 to 20.6 s would be one fight
    assert found(steps, *KINDS) == [("fight", 1.0, 3.0), ("boss", 3.0, 14.6), ("fight", 14.6, 20.6)]
    assert found(steps, "sight") == [("sight", 3.0, 4.1), ("sight", 14.0, 14.6)]


def test_boss_unseen_for_more_than_ten_seconds_is_a_new_event():
    steps = film(300, boss=[*range(30, 41), *range(141, 152)])
    assert found(steps, "boss") == [("boss", 3.0, 4.1), ("boss", 14.1, 15.2)]
    assert found(film(100, boss=range(30, 39))) == [("sight", 3.0, 3.9)]


def test_death_and_a_new_map_end_a_fight():
    seen = {"monster": range(100), "hit": range(10, 90)}
    assert found(film(100, dead=range(40, 60), **seen)) == [
        ("fight", 1.0, 4.0),
        ("death", 4.0, 6.0),
        ("fight", 6.0, 9.0),
    ]
    steps = film(100, **seen)
    steps[50:] = [replace(step, map="B") for step in steps[50:]]
    assert found(steps) == [("fight", 1.0, 5.0), ("level", 5.0, 7.0), ("fight", 5.0, 9.0)]
    assert found(film(100, dead=range(40, 60), boss=range(20, 80)), "boss") == [("boss", 2.0, 4.0), ("boss", 6.0, 8.0)]


def test_two_deaths_around_a_change_of_map_are_two_events():
    steps = film(100, dead=range(40, 60))
    steps[50:] = [replace(step, map="B") for step in steps[50:]]
    assert found(steps, "death") == [("death", 4.0, 5.0), ("death", 5.0, 6.0)]


def test_a_shorter_stay_shortens_its_level_event():
    steps = [Step(map="A")] * 20 + [Step(map="B")] * 15 + [Step(map="C")] * 30
    assert found(steps) == [("level", 2.0, 3.5), ("level", 3.5, 5.5)]


def test_pickups_that_touch_are_one_event():
    assert found(film(100, pickup=[5, 15, 30])) == [("pickup", 0.5, 2.5), ("pickup", 3.0, 4.0)]


def test_events_end_with_the_video():
    steps = film(100, pickup=[95], dead=range(90, 100))
    steps[92:] = [replace(step, map="B") for step in steps[92:]]
    assert {end for _, _, end in found(steps, "pickup", "level")} == {10.0}
    assert found(steps, "death")[-1] == ("death", 9.2, 10.0)


def test_times_are_seconds_at_the_frame_rate_of_the_video():
    [event] = find_events("v.mp4", film(100, pickup=[35]), 8.75)
    assert (event.start, event.end) == (4.0, 5.0)
    assert event.as_dict() == {"video": "v.mp4", "start": 4.0, "end": 5.0, "kind": "pickup", "detail": "Clip"}


def details(steps):
    return {(event.kind, event.start): event.as_dict().get("detail") for event in find_events("v.mp4", steps, FPS)}


def test_details_name_bosses_once_items_in_order_and_maps():
    steps = film(100, monster=range(20), hit=range(20), dead=range(60, 70))
    for i in range(30, 50):
        steps[i] = replace(steps[i], bosses=("BaronOfHell", "Cyberdemon") if i > 40 else ("Cyberdemon",))
    # each within a second of the one before, hence one event; the item of 6.5 s is another
    for i, items in {5: ("Medikit",), 10: ("Clip", "Clip"), 20: ("Shell",), 65: ("RedCard",)}.items():
        steps[i] = replace(steps[i], pickups=items)
    steps[80:] = [replace(step, map="B") for step in steps[80:]]
    assert details(steps) == {
        ("fight", 0.0): None,
        ("pickup", 0.5): "Medikit, Clip, Clip, Shell",
        ("boss", 3.0): "Cyberdemon, BaronOfHell",
        ("sight", 3.0): "Cyberdemon, BaronOfHell",
        ("death", 6.0): "A",
        ("pickup", 6.5): "RedCard",
        ("level", 8.0): "B",
    }


def test_a_kill_is_one_frame_with_the_monsters_that_died_in_view():
    kills = {10: (1, ("Zombieman",)), 11: (3, ("DoomImp", "Demon")), 50: (4, ())}
    steps = film(100)
    for i, (count, names) in kills.items():
        steps[i:] = [replace(step, kills=count) for step in steps[i:]]
        steps[i] = replace(steps[i], killed=names)
    steps[70] = replace(steps[70], killed=("Cacodemon",))  # another monster killed it
    assert found(steps) == [("kill", 1.0, 1.1), ("kill", 1.1, 1.2), ("kill", 5.0, 5.1)]
    assert list(details(steps).values()) == ["Zombieman", "DoomImp, Demon", None]


def test_low_health_lasts_until_help_death_or_another_map():
    steps = film(100, weak=[*range(10, 20), *range(30, 40), *range(60, 90)], dead=range(40, 50))
    steps[70:] = [replace(step, map="B") for step in steps[70:]]
    assert found(steps, "low_health") == [
        ("low_health", 1.0, 2.0),
        ("low_health", 3.0, 4.0),
        ("low_health", 6.0, 7.0),
        ("low_health", 7.0, 9.0),
    ]
    assert found([replace(step, health=26) for step in film(50)]) == []


def test_states_are_those_of_the_frames_shown_at_each_second():
    steps = [Step(map="A", health=100 - i, armor=i, ammo=2 * i, kills=i // 5) for i in range(20)]
    # at 8.75 frames per second frame 8 is shown from 0.914 to 1.029 s, frame 17 from 1.943 to 2.057 s
    assert states(steps, 8.75) == [(0, "A", 100, 0, 0, 0), (1, "A", 92, 8, 16, 1), (2, "A", 83, 17, 34, 3)]
    assert [len(states(steps[:n], 8.75)) for n in (0, 1, 8, 9, 17, 18)] == [0, 1, 1, 2, 2, 3]


flags = st.booleans()
names = st.lists(st.sampled_from(["BaronOfHell", "Clip"]), max_size=2).map(tuple)
numbers = st.integers(0, 100)
films = st.lists(
    st.builds(
        Step,
        st.sampled_from("AB"),
        flags,
        flags,
        flags,
        names,
        names,
        names,
        st.integers(0, 2),
        numbers,
        numbers,
        numbers,
    ),
    max_size=300,
)
# long stretches of one state, as in a game; independent frames would hardly ever make a fight
stretched = st.lists(st.tuples(films.filter(bool).map(lambda s: s[0]), st.integers(1, 60)), max_size=12)


@given(films | stretched.map(lambda runs: [step for step, count in runs for _ in range(count)]))
def test_any_film_gives_sound_events(steps):
    events = find_events("v.mp4", steps, FPS)
    assert events == sorted(events)
    frames = {
        kind: [range(round(e.start * FPS), round(e.end * FPS)) for e in events if e.kind == kind]
        for kind in KINDS + NOTED
    }
    covered = {kind: [i for span in spans for i in span] for kind, spans in frames.items()}
    for event in events:
        assert 0 <= event.start < event.end <= len(steps) / FPS
        assert json.loads(json.dumps(event.as_dict()))["kind"] == event.kind
    for kind, indices in covered.items():
        assert len(indices) == len(set(indices)), f"two {kind} events overlap"
    assert not set(covered["fight"]) & set(covered["boss"])
    assert sorted(covered["death"]) == [i for i, step in enumerate(steps) if not step.alive]
    assert {i for i, step in enumerate(steps) if step.pickups} <= set(covered["pickup"])
    assert {span.start for span in frames["level"]} == {
        i for i in range(1, len(steps)) if steps[i].map != steps[i - 1].map
    }
    picked = [name for step in steps for name in step.pickups]
    assert ", ".join(e.detail for e in events if e.kind == "pickup") == ", ".join(picked)
    assert all(event.detail for event in events if event.kind in ("boss", "sight", "pickup", "death", "level"))
    assert covered["low_health"] == [i for i, step in enumerate(steps) if step.alive and step.health <= 25]
    assert covered["kill"] == [i for i in range(1, len(steps)) if steps[i].kills > steps[i - 1].kills]
    assert covered["sight"] == [i for i, step in enumerate(steps) if step.alive and step.bosses]
    for kind in ("fight", "boss", "low_health", "sight"):
        for span in frames[kind]:
            assert all(steps[i].alive and steps[i].map == steps[span.start].map for i in span)
    assert all(len(span) >= FPS for span in frames["boss"])


@given(films, st.sampled_from([8.75, 10, 35]))
def test_states_cover_every_second_that_begins_in_the_video(steps, fps):
    rows = states(steps, fps)
    assert [row[0] for row in rows] == list(range(ceil(len(steps) / fps)))
    assert all(len(row) == len(STATE) for row in rows)
    for second, *state in rows:
        step = next(step for i, step in enumerate(steps) if (i + 1) / fps > second)
        assert state == [getattr(step, name) for name in STATE[1:]]


@pytest.mark.parametrize("kind", KINDS + NOTED)
def test_every_kind_can_be_found(kind):
    steps = film(
        100, monster=range(100), hit=range(20), boss=range(30, 50), pickup=[5], dead=range(60, 70), weak=range(25, 30)
    )
    steps[50:] = [replace(step, kills=1) for step in steps[50:]]
    steps[80:] = [replace(step, map="B") for step in steps[80:]]
    assert found(steps, kind)

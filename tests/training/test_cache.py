"""The stage cache: built once, never half, never stale."""

import multiprocessing
import time
from contextlib import nullcontext

import pytest
import torch

from k25lite.training import cache
from k25lite.training.cache import cached, imported, key


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path / "stages"))
    return tmp_path / "stages"


def write(text):
    return lambda folder: (folder / "weights").write_text(text)


def test_built_once_for_a_configuration():
    first = cached("vit", {"seed": 0}, write("a"))
    again = cached("vit", {"seed": 0}, write("b"))
    other = cached("vit", {"seed": 1}, write("c"))
    assert first == again != other
    assert (again / "weights").read_text() == "a"


@pytest.mark.parametrize("failing", [False, True])
def test_a_stage_is_built_with_one_thread_wherever_it_is_and_others_keep_theirs(failing):
    def build(folder):
        used.append(torch.get_num_threads())
        if failing:
            raise OSError("the disk is full")

    before, used = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        with pytest.raises(OSError, match="full") if failing else nullcontext():
            cached("vit", {}, build)
        assert (used, torch.get_num_threads()) == ([1], 3)
        if not failing:
            cached("detector", {}, build, threads=None)
            assert used == [1, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from k25lite import near", "from k25lite.world.far import x"),
        ("from . import near", "from .world.far import x"),
        ("from ..k25lite import near", "from .world import far"),
    ],
)
def test_a_change_of_imported_code_makes_a_new_key_and_of_other_code_does_not(tmp_path, monkeypatch, first, second):
    package = tmp_path / "k25lite"
    (package / "world").mkdir(parents=True)
    names = ("stage.py", "near.py", "world/far.py", "farther.py", "other.py")
    stage, near, far, farther, other = (package / name for name in names)
    stage.write_text(f"{first}\n")
    near.write_text(f"def f():\n    {second}\n")
    far.write_text("from ..farther import x\n")
    monkeypatch.setattr(cache, "PACKAGE", package)

    def key_with(**texts):
        farther.write_text(texts.get("farther", "x = 1\n"))
        other.write_text(texts.get("other", "x = 1\n"))
        cache.code_hash.cache_clear()
        return key({}, stage)

    before = key_with()
    assert key_with(farther="x = 2\n") != before
    assert key_with(other="x = 2\n") == before


def test_a_stage_depends_on_the_world_the_models_and_its_training_and_on_no_benchmark():
    files = {file.relative_to(cache.PACKAGE).as_posix() for file in imported(cache.PACKAGE / "training" / "joint.py")}
    assert {"model.py", "vision/moonvit3d.py", "world/families.py", "training/loop.py", "training/muonclip.py"} <= files
    assert not {file for file in files if "bench" in file}


def test_a_build_that_fails_leaves_nothing(folder):
    def fail(partial):
        (partial / "weights").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        cached("vit", {}, fail)
    assert list(folder.iterdir()) == []
    assert (cached("vit", {}, write("whole")) / "weights").read_text() == "whole"


def test_a_build_finds_the_checkpoints_of_one_that_was_stopped(folder):
    def stopped(partial, checkpoints):
        (checkpoints / "last").write_text("step 7")
        raise KeyboardInterrupt

    def resumed(partial, checkpoints):
        (partial / "weights").write_text((checkpoints / "last").read_text())

    with pytest.raises(KeyboardInterrupt):
        cached("vit", {}, stopped, resumes=True)
    stage = cached("vit", {}, resumed, resumes=True)
    assert (stage / "weights").read_text() == "step 7"
    assert list(folder.iterdir()) == [stage]


def test_checkpoints_belong_to_one_process_at_a_time(folder):
    given = []

    def outer(partial, checkpoints):
        given.append(checkpoints)
        if len(given) == 1:
            cached("vit", {}, outer, resumes=True)  # as another process would, meanwhile

    stage = cached("vit", {}, outer, resumes=True)
    assert given == [stage.with_name(f".{stage.name}-checkpoints"), None]
    assert list(folder.iterdir()) == [stage]


def slow(text):
    def build(folder):
        time.sleep(0.5)
        (folder / "weights").write_text(text)

    return cached("vit", {}, build)


def test_two_processes_that_build_at_once_agree():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, two = pool.map(slow, ["a", "b"])
    assert one == two
    assert (one / "weights").read_text() in ("a", "b")
    assert len(list(one.parent.iterdir())) == 1

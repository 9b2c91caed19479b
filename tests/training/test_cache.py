"""The stage cache: built once, never half, never stale."""

import multiprocessing
import time

import pytest

from k25lite.training import cache
from k25lite.training.cache import cached, key


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


def test_a_change_of_the_code_makes_a_new_key(tmp_path, monkeypatch):
    package = tmp_path / "package"
    for name in cache.CODE:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".py"):
            (package / name).write_text("x = 1\n")
        else:
            (package / name).mkdir()
            (package / name / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(cache, "PACKAGE", package)
    keys = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        (package / "world" / "module.py").write_text(text)
        cache.code_hash.cache_clear()
        keys.append(key({}))
    cache.code_hash.cache_clear()
    assert keys[0] == keys[2] != keys[1]


def test_a_build_that_fails_leaves_nothing(folder):
    def fail(partial):
        (partial / "weights").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        cached("vit", {}, fail)
    assert list(folder.iterdir()) == []
    assert (cached("vit", {}, write("whole")) / "weights").read_text() == "whole"


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

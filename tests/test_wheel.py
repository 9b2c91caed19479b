"""Installed from a wheel: every module, template and model is there, nothing else is, and the library finds them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = ("answerer", "detector", "subagent")
STAGES = """
import json
from k25lite.gameplay.detector_stage import RUNS, detector_stage
from k25lite.gameplay.questions_stage import QUESTIONS_RUNS, questions_stage
from k25lite.swarm.subagent_training import SubagentRun, subagent_stage
from k25lite.training.cache import stages_folder
models = questions_stage(QUESTIONS_RUNS["full"]), detector_stage(RUNS["full"]), subagent_stage(SubagentRun())
print(json.dumps([str(path) for path in (*models, stages_folder())]))
"""


def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel holds; it is built in a copy, because building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("k25lite", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "generated"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "data" / "generated").mkdir()
    (source / "data" / "generated" / "day.mp4").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_holds_the_package_and_the_models_it_needs(installed):
    expected = files(ROOT / "k25lite") | {"data/README.md"}
    expected |= {f"data/{name}/{file}" for name in MODELS for file in files(ROOT / "data" / name)}
    assert files(installed / "k25lite") == expected


def test_it_finds_its_models_and_keeps_stages_in_the_working_directory(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "K25LITE_STAGES"}
    command = [sys.executable, "-c", STAGES]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    models = [str(installed / "k25lite" / "data" / name) for name in MODELS]
    assert json.loads(ran.stdout) == [*models, str(tmp_path / "runs" / "stages")]

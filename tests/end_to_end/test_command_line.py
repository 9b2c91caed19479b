"""The commands as a user types them, each in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k25lite.cli import app
from k25lite.vision import MoonViT3D, MoonViT3DConfig, pack, read_video

ROOT = Path(__file__).parents[2]
K25LITE = Path(sys.executable).with_name("k25lite")


def k25lite(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([K25LITE, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


GROUPS = ("", "bench", "widesearch")
COMMANDS = ("reproduce", "record", "analyze", "ask", "swarm", "widesearch score")
BENCHES = tuple(f"bench {room}" for room in ("vision", "training", "swarm", "video"))


@pytest.mark.parametrize("command", [*GROUPS, *COMMANDS, *BENCHES])
def test_help_of_every_command_gives_examples(command):
    shown = k25lite(*command.split(), "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
    assert ("Example" in shown.stdout) == (command not in GROUPS)


def test_these_are_all_commands():
    groups = {"": app, **{group.name: group.typer_instance for group in app.registered_groups}}
    assert set(groups) == set(GROUPS)
    named = {
        f"{group} {command.name or command.callback.__name__}".strip()
        for group, commands in groups.items()
        for command in commands.registered_commands
    }
    assert named == {*COMMANDS, *BENCHES}


def test_help_needs_no_torch():
    code = (
        "import sys, k25lite.cli as cli; cli.app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, "Usage" in ran.stdout) == (0, True), ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "99"], "99"),
        (["record", "--out", "{tmp}/x", "--videos", "0"], "videos"),
        (["record", "--out", "{tmp}/x", "--minutes", "-1"], "minutes"),
        (["ask", "{tmp}/none.mp4"], "none.mp4: no such file"),
        (["swarm", "--task", "{tmp}"], "Is a directory"),
        (["swarm", "--task", "/dev/null/x"], "Not a directory"),
        (["bench", "vision", "--json", "{tmp}"], "a folder"),
        (["bench", "vision", "--json", "/dev/null/x/bench.json"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(arguments, message, tmp_path):
    failed = k25lite(*(a.format(tmp=tmp_path) for a in arguments), cwd=ROOT)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_tools_of_the_working_folder_are_found(tmp_path):
    (tmp_path / "my_tools.py").write_text('def population(country: str) -> int:\n    """Look it up."""\n    return 1\n')
    arguments = ["swarm", "q", "--tool", "my_tools:population", "--base-url", "no-url"]
    failed = k25lite(*arguments, cwd=tmp_path)
    assert failed.returncode == 2
    assert "base_url" in failed.stderr, "which is looked at once the tool is there"
    assert "my_tools" in k25lite(*arguments, cwd=tmp_path.parent).stderr


def test_a_failing_notebook_is_exit_code_1_and_named(tmp_path):
    (tmp_path / "notebooks").mkdir()
    broken = json.loads((ROOT / "notebooks" / "01_moonvit3d.ipynb").read_text())
    broken["cells"] = broken["cells"][:3]
    broken["cells"].append(broken["cells"][1] | {"source": "1 / 0", "id": "broken"})
    (tmp_path / "notebooks" / "01_broken.ipynb").write_text(json.dumps(broken))
    failed = k25lite("reproduce", "--profile", "smoke", cwd=tmp_path)
    assert failed.returncode == 1
    assert "01_broken" in failed.stdout + failed.stderr
    assert "ZeroDivisionError" in failed.stdout + failed.stderr
    assert (tmp_path / "runs" / "reproduce" / "smoke" / "scorecard.html").is_file()


def test_recorded_footage_is_read_packed_and_encoded(tmp_path):
    pytest.importorskip("vizdoom", reason="needs the extra `game`: pip install 'k25lite[game]'")
    made = k25lite("record", "--videos", 1, "--minutes", 0.1, "--seed", 5, "--out", tmp_path / "game")
    assert made.returncode == 0, made.stderr
    (video,) = (tmp_path / "game").glob("*.mp4")
    chunks = read_video(video, fps=2, unit=16)
    encoder = MoonViT3D(MoonViT3DConfig.lite()).eval()
    out = encoder(*pack(chunks, encoder.config))
    height, width = chunks[0].frames.shape[1:3]
    assert len(out.pooler_output) == len(chunks) * (height // 16) * (width // 16)
    for line in (tmp_path / "game" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        assert 0 <= event["start"] <= event["end"] <= 6.1


@pytest.mark.parametrize(("number", "printed"), [(1, "torch.Size"), (2, "shows")])
def test_the_readme_lines_for_your_own_pictures_and_videos_run(number, printed, tmp_path):
    """The first two code blocks of the README, on a picture and a clip of those names; the third needs an endpoint."""
    readme = (ROOT / "README.md").read_text()
    block = readme.split("```python\n")[number].split("```")[0]
    assert len(block.strip().splitlines()) <= 6
    shutil.copy(ROOT / "data" / "gameplay" / "gameplay_0000.mp4", tmp_path / "holiday.mp4")
    import skimage.data
    from PIL import Image

    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.jpg")
    ran = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert printed in ran.stdout

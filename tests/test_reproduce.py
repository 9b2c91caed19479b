import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from k25lite.reproduce import reproduce, select

# What stands in for `Record` in these notebooks: importing the library would cost each kernel seconds.
SAVE = """
import json, os, sys
about = {"notebook": NAME, "profile": PROFILE, "seeds": SEEDS, "device": sys.executable, "commit": None}
entries = {"claims": [], "checks": [], "metrics": [{"name": "pid", "value": os.getpid(), "unit": ""}]}
with open(OUT, "w") as file:
    json.dump(about | {"versions": {}, "date": "2026-02-01T00:00:00+00:00"} | entries, file)
"""


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Jupyter's and IPython's own files go to tmp_path; a registered "python3" that cannot start stands in the way."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/such/python"], "display_name": "other", "language": "python"}))


def write_notebook(root, name, *sources):
    """A notebook: a heading, the tagged parameters, then one code cell per source."""
    v4 = nbformat.v4
    parameters = v4.new_code_cell('PROFILE = "lite"\nSEEDS = [7]\nOUT = None', metadata={"tags": ["parameters"]})
    cells = [v4.new_markdown_cell("# Title"), parameters, *[v4.new_code_cell(source) for source in sources]]
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def good(name):
    return f"NAME = {name!r}" + SAVE


def test_a_failing_notebook_is_named_and_kept_and_the_rest_still_run(tmp_path):
    write_notebook(tmp_path, "01_first", "assert (PROFILE, SEEDS) == ('smoke', [0, 1, 2])", good("01_first"))
    write_notebook(tmp_path, "02_broken", "print('so far')", "x = {}\nx['missing\\nkey']", "print('never')")
    write_notebook(tmp_path, "03_last", good("03_last"))
    stale = tmp_path / "out" / "results" / "02_broken.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    stream = io.StringIO()
    assert reproduce(profile="smoke", seeds=3, root=tmp_path, out=tmp_path / "out", stream=stream) is False

    said = stream.getvalue()
    copy = tmp_path / "out" / "notebooks" / "02_broken.ipynb"
    assert "02_broken  FAILED" in said
    assert r"cell 4/5: KeyError: 'missing\nkey'" in said
    assert f"executed copy: {copy}" in said
    assert re.search(r"^01_first  cell 4/4  \d\d:\d\d$", said, re.MULTILINE)
    assert "03_last  done" in said
    assert "2 of 3 notebooks ran to the end" in said
    outputs = [cell.get("outputs") for cell in nbformat.read(copy, as_version=4).cells]
    assert any("so far" in str(o) for o in outputs)
    assert any("KeyError" in str(o) for o in outputs)

    first = json.loads((tmp_path / "out" / "results" / "01_first.json").read_text())
    assert first["device"] == sys.executable  # not the "python3" that happens to be registered
    assert not stale.exists()
    data = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert [n["notebook"] for n in data["notebooks"]] == ["01_first", "02_broken", "03_last"]
    assert [n["failure"] and n["failure"][:8] for n in data["notebooks"]] == [None, "cell 4/5", None]
    assert str(tmp_path / "out" / "scorecard.html") in said


def test_results_must_be_saved_and_be_those_of_this_run(tmp_path):
    write_notebook(tmp_path, "01_forgets", "1 + 1")
    write_notebook(tmp_path, "02_copied", good("01_forgets"))
    write_notebook(tmp_path, "03_dies", "import os; os._exit(1)")
    (tmp_path / "notebooks" / "04_garbage.ipynb").write_text("no notebook")
    stream = io.StringIO()
    assert reproduce(profile="smoke", root=tmp_path, stream=stream) is False
    data = json.loads((tmp_path / "runs" / "reproduce" / "smoke" / "scorecard.json").read_text())
    forgets, copied, dies, garbage = [n["failure"] for n in data["notebooks"]]
    assert "saved no results" in forgets
    assert "results are of '01_forgets'" in copied
    assert dies == "cell 3/3: DeadKernelError: Kernel died"
    assert "NotJSONError" in garbage


def test_a_part_that_runs_again_leaves_the_rest_on_the_scorecard(tmp_path, monkeypatch):
    monkeypatch.delenv("K25LITE_STATIC", raising=False)
    for name in ("01_first", "02_second"):
        write_notebook(tmp_path, name, good(name))
    (tmp_path / "notebooks" / "03_never.ipynb").write_text("not run")
    for wanted in (["01", "02"], ["02"]):
        assert reproduce(wanted, root=tmp_path, out=tmp_path / "out", stream=io.StringIO()) is True
    data = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert [n["notebook"] for n in data["notebooks"]] == ["01_first", "02_second"]
    assert "K25LITE_STATIC" not in os.environ


def test_seeds_are_left_to_the_notebook_unless_given_and_the_copy_runs_again(tmp_path):
    path = write_notebook(tmp_path, "05_own_seeds", "open('here', 'w').close()", good("05_own_seeds"))
    out = tmp_path / "{out}"
    assert reproduce(["5"], root=tmp_path, out=out, stream=io.StringIO()) is True
    assert json.loads((out / "results" / "05_own_seeds.json").read_text())["seeds"] == [7]
    assert (path.parent / "here").exists()  # it ran where Jupyter would have run it
    executed = out / "notebooks" / path.name
    stream = io.StringIO()
    assert reproduce([str(executed)], seeds=2, root=tmp_path, out=tmp_path / "again", stream=stream) is True
    assert "cell 4/4" in stream.getvalue()  # the injected cell is not one of the author's
    assert json.loads((tmp_path / "again" / "results" / "05_own_seeds.json").read_text())["seeds"] == [0, 1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_one_line_whose_clock_goes_on(tmp_path):
    write_notebook(tmp_path, "01_slow", "import time; time.sleep(2.5)", good("01_slow"))
    terminal = Terminal()
    assert reproduce(root=tmp_path, stream=terminal) is True
    drawn = terminal.getvalue().split("01_slow  done")[0]
    assert "\n" not in drawn
    assert len(set(re.findall(r"01_slow  cell 3/4  (\d\d:\d\d)", drawn))) >= 2


def test_selection_by_number_name_and_path(tmp_path):
    one, two = write_notebook(tmp_path, "01_one"), write_notebook(tmp_path, "02_two")
    folder = tmp_path / "notebooks"
    write_notebook(tmp_path, "draft")
    assert select(None, folder) == [one, two]
    assert select(["02_two", "1", "01", "02_two.ipynb", str(one)], folder) == [one, two]
    elsewhere = write_notebook(tmp_path / "notebooks", "01_one")
    assert select([str(elsewhere)], folder) == [elsewhere]
    with pytest.raises(ValueError, match=r"no notebook '7'; in .* there are: 01_one, 02_two"):
        select(["01", "7"], folder)
    with pytest.raises(ValueError, match="overwrite"):
        select(["01", str(elsewhere)], folder)
    with pytest.raises(ValueError, match="no notebooks in"):
        select(None, tmp_path / "empty")


@pytest.mark.parametrize("wrong", [{"profile": "huge"}, {"seeds": 0}, {"notebooks": ["99"]}, {"out": "."}])
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path, monkeypatch, wrong):
    path = write_notebook(tmp_path, "01_one", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"huge|seed|99|overwrite"):
        reproduce(**{"out": tmp_path / "out"} | wrong)
    assert path.exists()
    assert not (tmp_path / "out").exists()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_leaves_no_kernel_running(tmp_path):
    busy = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nos.rename('pid', 'ready')\ntime.sleep(600)"
    write_notebook(tmp_path, "01_busy", busy)
    code = "import sys, pathlib; from k25lite.reproduce import reproduce; reproduce(root=pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    ready = tmp_path / "notebooks" / "ready"
    deadline = time.monotonic() + 120
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # as a terminal does; the kernel has a session of its own and sees nothing
    _, stderr = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    kernel = int(ready.read_text())
    while is_running(kernel) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(kernel)

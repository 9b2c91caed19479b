"""Runs side by side: order, errors, processes that are kept, killed, or left without a parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
import torch

from k25lite.training import pool
from k25lite.training.pool import side_by_side


def late(job):
    time.sleep(job)
    return job


def where(_):
    time.sleep(0.1)  # so that the other process gets its share
    return os.getpid(), Path.cwd(), os.environ.get("K25LITE_STAGES"), torch.get_num_threads()


def fail(job):
    if job == 3:
        raise ValueError("three")
    return job


def vanish(job):
    os.kill(os.getpid(), signal.SIGKILL)


def run(function, jobs):
    return side_by_side(function, jobs, workers=2, progress=False)


def test_outcomes_have_the_order_of_the_jobs():
    assert run(late, [0.3, 0.0, 0.1]) == [0.3, 0.0, 0.1]
    assert run(late, []) == []


def test_processes_are_kept_and_work_where_the_caller_is(tmp_path, monkeypatch):
    before = run(where, range(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("K25LITE_STAGES", "elsewhere")
    after = run(where, range(4))
    assert {pid for pid, *_ in after} <= {pid for pid, *_ in before}
    assert os.getpid() not in {pid for pid, *_ in after}
    assert {tuple(rest) for _, *rest in after} == {(tmp_path, "elsewhere", 1)}
    monkeypatch.delenv("K25LITE_STAGES")
    assert {stages for _, _, stages, _ in run(where, range(4))} == {None}


def test_another_number_of_processes_lets_the_former_ones_go():
    before = {pid for pid, *_ in run(where, range(4))}
    side_by_side(where, [1], workers=1, progress=False)
    assert not psutil.wait_procs([p for p in psutil.Process().children() if p.pid in before], timeout=10)[1]


def test_an_error_is_raised_and_the_next_call_is_none_the_worse():
    with pytest.raises(ValueError, match="three"):
        run(fail, [1, 2, 3, 4])
    assert run(fail, [1, 2]) == [1, 2]


def test_a_killed_process_is_an_error_and_the_next_call_has_new_ones():
    with pytest.raises(BrokenProcessPool):
        run(vanish, [1])
    assert run(fail, [1, 2]) == [1, 2]


def test_a_process_killed_between_two_calls_is_no_matter():
    ((pid, *_),) = run(where, [1])
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([p for p in psutil.Process().children() if p.pid == pid], timeout=10)
    while not pool._pool(2)._broken:  # until the executor has noticed
        time.sleep(0.01)
    assert run(fail, [1, 2]) == [1, 2]


def test_no_process_outlives_a_killed_parent(tmp_path):
    program = "from k25lite.training.pool import side_by_side\nimport time\nif __name__ == '__main__':\n"
    program += (
        "    side_by_side(abs, [1, 2], workers=2, progress=False)\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_an_interrupt_ends_the_runs_and_only_the_caller_tells_of_it(tmp_path):
    program = "from k25lite.training.pool import side_by_side\nimport time\n"
    program += "def run(job):\n    open(f'begun_{job}', 'w').close()\n    time.sleep(600)\n"
    program += "if __name__ == '__main__':\n    side_by_side(run, [1, 2, 3], workers=2, progress=False)"
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py"]
    parent = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(tmp_path.glob("begun_*"))) < 2 and parent.poll() is None:
        time.sleep(0.01)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal or Jupyter does it: to all processes at once
    _, told = parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert told.count("Traceback") == 1, told
    assert told.rstrip().endswith("KeyboardInterrupt"), told

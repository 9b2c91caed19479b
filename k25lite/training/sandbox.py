"""A sandbox for the programs that a model writes: processes whose limits fire.

The host talks to *keepers*: fresh interpreters with an empty environment, which import the tools once and run no program.
A keeper forks a *worker*, which runs programs under limits of wall time, CPU time and memory and can open no file. One that
does not answer, as when a call into C ignores signals, is killed, and only the program that it was running is lost.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np

from k25lite.training.programs import LONGEST_PROGRAM, Image, evaluate, words
from k25lite.training.vision_tools import read, thing
from k25lite.world.pictures import draw_string

GRACE = 0.5  # seconds beyond a program's own, after which its worker is killed


@dataclass(frozen=True)
class Observation:
    """What a program gave: its value as words, or `error:` and one clause."""

    text: str
    ok: bool


class Sandbox:
    """Runs programs in processes that end with the context.

    Args:
        workers: how many programs run side by side, for 180 MB of memory each.
        seconds: wall time of a program; if no signal can stop it, it is killed half a second later.
        memory: MiB that programs may take beyond what their worker began with; on Linux only.
        max_output: characters of an observation.

    Raises:
        OSError: neither Linux nor macOS.
        ValueError: a limit is not positive.
    """

    def __init__(self, workers: int = 1, *, seconds: float = 1.0, memory: int = 512, max_output: int = 200):
        if sys.platform not in ("linux", "darwin"):
            raise OSError("the sandbox needs Linux or macOS: its limits are those of POSIX processes")
        if min(workers, seconds, memory, max_output) <= 0:
            raise ValueError("workers, seconds, memory and max_output must be positive")
        self._keepers = [_Keeper((float(seconds), int(memory) * 2**20, int(max_output))) for _ in range(workers)]

    def run(self, programs: Sequence[tuple[str, Image]]) -> list[Observation]:
        """The observation of each (program, image), in their order; no program makes this raise.

        The first call starts the processes. Not for several threads at once.

        Raises:
            TypeError: a program is no string, or an image neither an array nor told.
            RuntimeError: the processes do not start.
        """
        for program, image in programs:
            if not isinstance(program, str) or not isinstance(image, np.ndarray | list | tuple | str | None):
                raise TypeError(f"a program is a string with an image, not {type(program)} with {type(image)}")
        count = len(self._keepers)
        try:
            for index, keeper in enumerate(self._keepers):
                keeper.ask([(program[: LONGEST_PROGRAM + 1], image) for program, image in programs[index::count]])
            answers = [keeper.answer(len(programs[index::count])) for index, keeper in enumerate(self._keepers)]
        except BaseException:  # such as an interrupt: late answers must not meet the next call
            self.close()
            raise
        return [answers[index % count][index // count] for index in range(len(programs))]

    def close(self) -> None:
        """End all processes; another `run` would start new ones."""
        for keeper in self._keepers:
            keeper.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Keeper:
    """The host's end of a keeper, which starts when first asked, and anew after something has killed it."""

    def __init__(self, limits: tuple[float, int, int]):
        self.limits = limits
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self.folder = tempfile.TemporaryDirectory()
        paths = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "MPLCONFIGDIR": self.folder.name}
        life = f"from k25lite.training.sandbox import _keep; _keep({theirs.fileno()}, *{self.limits})"
        # Not by multiprocessing, which would import the host's main module, and with it torch.
        self.process = subprocess.Popen(
            [sys.executable, "-c", life],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=paths | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd=self.folder.name,
            start_new_session=True,
        )
        theirs.close()

    def ask(self, programs: list[tuple[str, Image]]) -> None:
        if self.process is None:
            self.start()
        with suppress(OSError):  # if it has died, `answer` will tell
            self.connection.send(programs)

    def answer(self, count: int) -> list[Observation]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            if self.close() > 0:  # no signal, but an exception
                raise RuntimeError("the sandbox does not start; stderr says why") from None
            return [Observation("error: worker died", False)] * count

    def close(self) -> int:
        """The exit status, negative if a signal ended it."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        self.connection.close()
        with suppress(ProcessLookupError, PermissionError):  # it may be a zombie
            os.killpg(process.pid, signal.SIGKILL)  # and with it a worker
        self.folder.cleanup()
        return process.wait()


def _keep(descriptor: int, *limits: Any) -> NoReturn:
    """A keeper's life: answer the host until it hangs up."""
    host = Connection(descriptor)
    read(drawn := draw_string("A", Random(0)))
    thing(drawn)  # as `read`, it builds a table, which the workers then share
    with suppress(EOFError, ConnectionError):
        while True:
            host.send(_supervise(host, host.recv(), *limits))
    os._exit(0)


def _supervise(host: Connection, programs: list[tuple[str, Image]], seconds: float, *limits: int) -> list[Observation]:
    """The observations, by as many workers as it takes: one that dies or hangs loses the program that it ran."""
    observations: list[Observation] = []
    while len(observations) < len(programs) and not host.poll():  # the host only hangs up now
        answers, ours = Pipe(duplex=False)
        if (worker := os.fork()) == 0:
            host.close()
            _work(ours, programs[len(observations) :], seconds, *limits)
        ours.close()
        late = False
        with answers, suppress(EOFError, OSError):
            while answers in wait([host, answers], seconds + GRACE):
                text = answers.recv_bytes().decode()
                observations.append(Observation(text[1:], text[0] == "+"))
            os.kill(worker, signal.SIGKILL)
            late = True
        death = os.WTERMSIG(os.waitpid(worker, 0)[1])
        if len(observations) < len(programs):
            killed = death == signal.SIGKILL  # by the kernel, for want of memory
            clause = "time limit" if late or death == signal.SIGXCPU else "memory limit" if killed else "worker died"
            observations.append(Observation(f"error: {clause}", False))
    return observations


def _work(
    keeper: Connection, programs: list[tuple[str, Image]], seconds: float, memory: int, max_output: int
) -> NoReturn:
    import resource  # Windows has none

    try:
        signal.signal(signal.SIGALRM, _alarm)
        warnings.simplefilter("ignore")
        if sys.platform == "linux":
            most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
            resource.setrlimit(limit, (0, 0))
        for program, image in programs:
            most = math.ceil(time.process_time() + seconds + 2 * GRACE)  # the keeper acts sooner, if it is there
            resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            observation = _observe(program, image, seconds, max_output)
            keeper.send_bytes(f"{'+' if observation.ok else '-'}{observation.text}".encode())
    finally:
        os._exit(0)


class _TimeLimit(BaseException):
    """No Exception, so that no tool can swallow it."""


def _alarm(*_: object) -> NoReturn:
    raise _TimeLimit


def _observe(program: str, image: Image, seconds: float, max_output: int) -> Observation:
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            text = " ".join(islice(words(evaluate(program, image)), max_output))
            return Observation(_printable(text, max_output), True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, _TimeLimit) as error:
        clause = next((clause for kind, clause in CLAUSES.items() if isinstance(error, kind)), None)
        clause = clause or getattr(error, "msg", "") or str(error).partition(". ")[0] or type(error).__name__
        return Observation(_printable(f"error: {clause}", max_output), False)


def _printable(text: str, longest: int) -> str:
    return re.sub(r"[^!-~]+", " ", text[:longest]).strip() or "none"


CLAUSES = {
    _TimeLimit: "time limit",
    MemoryError: "memory limit",
    RecursionError: "nested too deeply",
    KeyError: "no such key",
}

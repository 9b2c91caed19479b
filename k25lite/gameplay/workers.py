"""Sub-agents in worker processes of this machine: as on a Ray cluster (`swarm.cluster`), without Ray."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from typing import Any

from k25lite.swarm.agent import Result, Work
from k25lite.swarm.cluster import Lost, Told, elsewhere, work_apart


class _Worker:
    """A process of its own pool: where it dies, nobody else's work is lost."""

    def __init__(self) -> None:
        # Importing torch takes seconds: on Linux a server does it once, and every worker is a copy of the server.
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(["__main__", "k25lite.gameplay.viewer"])
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
        self.process = self.pool.submit(os.getpid)

    def end(self, is_alive: bool = True) -> None:
        """At once, whatever it does."""
        if is_alive:
            with suppress(BrokenExecutor, ProcessLookupError):
                os.kill(self.process.result(), signal.SIGKILL)
        self.pool.shutdown(wait=True, cancel_futures=True)


class ProcessExecutor:
    """Where an `Orchestrator` has its assignments worked on: `Orchestrator(..., executor=ProcessExecutor())`.

    Each assignment has a process to itself; processes are kept for the next one, so there are as many as the team's
    `max_parallel`. One that dies fails its assignment, with a reason; `team={"retries": ...}` begins it again in a new one.
    """

    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.workers: set[_Worker] = set()

    async def __call__(self, work: Work, prompt: str) -> Result:
        return await elsewhere(work, prompt, self._send)

    async def _send(self, *assignment: Any) -> Told:
        worker = self.idle.pop() if self.idle else _Worker()
        self.workers.add(worker)
        try:
            told = await asyncio.wrap_future(worker.pool.submit(work_apart, *assignment))
        except BaseException as error:
            self.workers.discard(worker)
            has_died = isinstance(error, BrokenExecutor)
            await asyncio.to_thread(worker.end, not has_died)
            if has_died:
                raise Lost("the process died") from error
            raise
        self.idle.append(worker)
        return told

    def close(self) -> None:
        """End all processes."""
        for worker in self.idle:
            worker.pool.shutdown()
        for worker in self.workers.difference(self.idle):
            worker.end()
        self.idle.clear()
        self.workers.clear()


def _begin() -> None:
    # However the parent ends. The server that made this process lives as long as one of its processes does.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    import torch

    torch.set_num_threads(1)  # the workers are what runs in parallel


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)

"""Independent runs, side by side in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
GPU_WORKERS = 8  # a single small run leaves most of a GPU idle


def side_by_side(
    run: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    title: str = "runs",
    progress=True,
) -> list[Outcome]:
    """`run(job)` for each job, in the order of the jobs; each in a process with one thread, which wastes least on a CPU.

    Args:
        run: a function of a module, because the processes are started afresh and import it. They are kept for the next
            call: importing torch and transformers takes longer than many a run.
        workers: processes; by default as many as cores, on a GPU eight.

    Raises:
        Whatever a run raised first, once the runs that have not begun are cancelled.
    """
    cores = os.cpu_count() or 1
    count = workers or (min(GPU_WORKERS, cores) if torch.cuda.is_available() else cores)

    def submit() -> list[Future[Outcome]]:
        return [_pool(count).submit(_run, run, job, dict(os.environ), os.getcwd()) for job in jobs]

    try:
        futures = submit()
    except BrokenProcessPool:  # a process was killed since the last call
        _pool.cache_clear()
        futures = submit()
    try:
        for done in tqdm(as_completed(futures), total=len(futures), desc=title, disable=not progress):
            done.result()
    except BrokenProcessPool:
        _pool.cache_clear()  # a process was killed; the next call begins with new ones
        raise
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    return [future.result() for future in futures]


@lru_cache(maxsize=1)  # another count lets go of the pool before, which then ends once its runs are done
def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    # An interrupt goes to all processes of a notebook: this one then ends at once and without a word of its own.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    torch.set_num_threads(1)
    disable_progress_bar()  # of weights being read and written: several at once are noise
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(run: Callable[[Job], Outcome], job: Job, environment: Mapping[str, str], folder: str) -> Outcome:
    """Where and as the caller would run it now, who may have moved since the process began."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return run(job)

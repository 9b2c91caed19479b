"""Independent runs, side by side in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
        run: a function of a module, because the processes are started afresh and import it.
        workers: processes; by default as many as cores, on a GPU eight.

    Raises:
        Whatever a run raised first, once the runs that have not begun are cancelled.
    """
    cores = os.cpu_count() or 1
    workers = min(workers or (min(GPU_WORKERS, cores) if torch.cuda.is_available() else cores), len(jobs)) or 1
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        futures = [pool.submit(run, job) for job in jobs]
        for done in tqdm(as_completed(futures), total=len(futures), desc=title, disable=not progress):
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def _begin() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # of weights being read and written: several at once are noise

"""`k25lite swarm`: a swarm from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from k25lite.swarm.agent import Result
from k25lite.swarm.limits import Limits
from k25lite.swarm.live import ProgressLine
from k25lite.swarm.orchestrator import Orchestrator, in_this_loop
from k25lite.swarm.policy import Policy
from k25lite.swarm.timeline import timeline
from k25lite.swarm.tools import plugin
from k25lite.swarm.trace import Trace, read_trace


def run(
    task: str,
    backend: str,
    model: str,
    base_url: str | None,
    tools: Sequence[str],
    max_parallel: int,
    budget: int | None,
    path: Path | None,
    ray: str | None,
) -> Result:
    """Work on a task, show progress on stderr, and leave a trace and its timeline.

    Raises:
        ValueError: no such tool, or what `Orchestrator` and its policy refuse.
    """
    if ray is not None and backend == "local":
        raise ValueError("a local model serves the agents of this process: --backend local goes without --ray")
    functions = [plugin(name) for name in tools]
    executor: Any = in_this_loop
    if ray is not None:
        from k25lite.swarm.cluster import RayExecutor

        executor = RayExecutor(None if ray == "local" else ray)
    orchestrator = Orchestrator(
        _policy(backend, model, base_url),
        functions,
        limits=Limits(critical_steps=budget),
        team={"max_parallel": max_parallel},
        executor=executor,
    )
    path = path or Path("runs", "swarm", f"{datetime.now():%Y%m%d-%H%M%S}.jsonl")
    progress = ProgressLine()
    trace = Trace(path, listeners=(progress,))
    if trace.task is not None and not trace.ended:
        for event in read_trace(path):  # what is told of the rest counts from there
            progress(event)
    try:
        return orchestrator.run_sync(task, trace)
    finally:
        trace.close()
        progress.stop()
        print(f"trace: {path}, timeline: {timeline(path, path.with_suffix('.html'))}", file=sys.stderr)


def _policy(backend: str, model: str, base_url: str | None) -> Policy:
    if backend == "openai":
        from k25lite.swarm.endpoint import OpenAIPolicy

        return OpenAIPolicy(model, base_url)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from k25lite.swarm.local import LocalPolicy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return LocalPolicy(AutoModelForCausalLM.from_pretrained(model), tokenizer, device=device)
    except OSError as error:
        raise ValueError(f"no model {model}: {str(error).splitlines()[0]}") from error

"""Made-up traces of runs with many agents."""

import json
import random


def many(count, each=250, said="", ask="Find number {}".format):
    """The events of a run in which stages of `each` agents take two steps and a tool, and answer with `said` and more."""
    rng, found, t = random.Random(0), [], 0.0
    tell = {"content": "", "calls": [], "refusal": "", "prompt_tokens": 9, "completion_tokens": 1, "cost": 0.0}
    ended = {"status": "done", "reason": "", "attempt": 1, "steps": 2, "critical_steps": 2, "tokens": 20, "cost": 0.0}

    def write(event, t, **fields):
        found.append({"t": t, "event": event, **fields})

    write("run", t, version=1, task="Find them all.", limits={}, started="2026-01-01T00:00:00+00:00")
    for stage in range(1, count // each + 1):
        prompts = [ask((stage - 1) * each + index) for index in range(each)]
        calls = [("id", "assign_task", json.dumps({"agent": "searcher", "prompt": prompt})) for prompt in prompts]
        write("step", t + 1, path="0", step=stage, began=t, **tell | {"calls": calls})
        for index, prompt in enumerate(prompts):
            path, begun = f"0.{stage}.{index}", t + 1
            one, two = (begun + rng.random(), begun + 1 + rng.random())
            write("assign", begun, path=path, parent="0", agent="searcher", prompt=prompt, attempt=1)
            write("step", one, path=path, step=1, began=begun, **tell | {"calls": [("id", "search", "{}")]})
            write("observation", two, path=path, step=1, index=0, tool="search", began=one, content="found " * 30)
            write(
                "step", two + 1, path=path, step=2, began=two, **tell | {"content": f"{prompt}: found. {said}".strip()}
            )
            write("result", two + 1, path=path, answer=f"{prompt}: found. {said}".strip(), **ended)
        t += 4
    write("end", t, answer="All of them.", **ended)
    return found

"""What the orchestrator of wide search reads and writes: acts that stand for its tool calls, and observations, as tokens.

    task  more left:0 steps:64  search  left:8  create assign:4 create assign:4 end  left:0 team:2 done:2 steps:48  answer

A step is a few acts, the last of which closes it. An observation tells by number tokens, whose scale ends at 64: a longer
task than those of training is read in tokens that are known from them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SEARCH, READ, ANSWER, END, CREATE = "search", "read", "answer", "end", "create"
ASSIGN = {f"assign:{names}": names for names in (1, 2, 4, 8, 16)}
CLOSING = (SEARCH, READ, ANSWER, END)
ACTS = (*CLOSING, CREATE, *ASSIGN)
STEP_ACTS = 64  # of one step; the last of so many closes it, whatever it is

TASK, MORE = "task", "more"
PASSING = ("done", "failed")  # what is told of a single step
FIELDS = ("left", "team", *PASSING, "steps")
SCALE = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # a number is told as the first that is not below it
BEYOND = "more than 64"
# Acts first, so that what may be written is the beginning of the vocabulary.
TOKENS = (*ACTS, TASK, MORE, *(f"{name}:{number}" for name in FIELDS for number in (*SCALE, BEYOND)))
IDS = {token: number for number, token in enumerate(TOKENS)}

Acts = Sequence[str]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the orchestrator is told before a step.

    Attributes:
        more: whether there is a page of hits that it has not seen. left: names found that nobody works on.
        team: sub-agents there are. done, failed: assignments of the last step that came back with rows, and others.
        steps: left of its budget, this one included.
    """

    more: bool
    left: int
    team: int
    steps: int
    done: int = 0
    failed: int = 0

    def tokens(self, before: Observation | None = None) -> list[str]:
        """`left` always, what came back if anything did, the rest where it reads otherwise than `before`."""
        told = [MORE] if self.more else []
        for name in FIELDS:
            token = number(name, value := getattr(self, name))
            if name == "left" or (
                value and (before is None or name in PASSING or token != number(name, getattr(before, name)))
            ):
                told.append(token)
        return told

    def ids(self, before: Observation | None = None) -> list[int]:
        return [IDS[token] for token in self.tokens(before)]


def number(name: str, value: int) -> str:
    """The token that tells a number, 0 or more."""
    place = bisect_left(SCALE, value)
    return f"{name}:{SCALE[place] if place < len(SCALE) else BEYOND}"


# What to do after an observation. It sees no more than the language model is told.
Script = Callable[[Observation], Acts]


@dataclass
class Dialogue:
    """Observations and the acts that followed each but perhaps the last.

    Attributes:
        observations: one more than steps, unless the task has ended.
    """

    observations: list[Observation] = field(default_factory=list)
    steps: list[Acts] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [IDS[token] for token, _ in self._tokens()]

    @property
    def written(self) -> list[bool]:
        """Which of the tokens are acts."""
        return [is_act for _, is_act in self._tokens()]

    def _tokens(self) -> list[tuple[str, bool]]:
        found = [(TASK, False)]
        for place, (observation, before) in enumerate(zip(self.observations, [None, *self.observations], strict=False)):
            found += [(token, False) for token in observation.tokens(before)]
            found += [(act, True) for acts in self.steps[place : place + 1] for act in acts]
        return found


def closes(acts: Acts) -> bool:
    """Whether a step is complete."""
    return len(acts) >= STEP_ACTS or bool(acts and acts[-1] in CLOSING)


def serial(observation: Observation) -> Acts:
    """The single agent: reads everybody itself, as long as there is a step for the answer."""
    if observation.steps > STEPS_OF_A_NAME:
        if observation.more:
            return (SEARCH,)
        if observation.left:
            return (READ,)
    return (ANSWER,)


STEPS_OF_A_NAME = 5  # that reading about one may take, and one for the answer


def swarm(names: int = 4, width: int | None = None) -> Script:
    """The scripted swarm: searches, then assigns everybody at once, `names` to a sub-agent, until no name is left.

    Args:
        width: assignments at a time; by default as many as a step has room for.

    Raises:
        ValueError: nobody can be assigned so many names, or a step has no room for so many assignments.
    """
    room = (STEP_ACTS - 1) // 2
    width = room if width is None else width
    if (assign := f"assign:{names}") not in ASSIGN or not 1 <= width <= room:
        raise ValueError(f"names are one of {[*ASSIGN.values()]}, width is 1 to {room}; got {names} and {width}")

    def script(observation: Observation) -> Acts:
        # The slowest sub-agent is waited for; what is left after that is enough for an answer.
        if observation.steps > 2:
            if observation.more:
                return (SEARCH,)
            if count := min(-(-observation.left // names), width):
                missing = max(0, count - observation.team)
                return (*([CREATE, assign] * missing), *([assign] * (count - missing)), END)
        return (ANSWER,)

    return script

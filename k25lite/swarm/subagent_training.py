"""Training of the sub-agent of wide search: by demonstrations of a script, in libraries that nobody is tested in.

Source: Kimi K2.5 report, section 3: sub-agents are frozen while the orchestrator learns, so this comes first. Conversations
are few and the script's own; in each row that is trained on, who is who and what is what is drawn anew, so that nothing can
be learnt by heart, and only what stands in the context tells. They begin with one name and grow.

Simplified: the script looks nowhere but in the article; so in the libraries of wide search, which are the same for all who
search them, articles say nothing idle, and what only a register tells is 5 % of the facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from k25lite.model import K25Lite, K25LiteConfig
from k25lite.shipped import shipped
from k25lite.swarm.calibration import measure, measure_alone
from k25lite.swarm.policy import Message, Reply, call
from k25lite.swarm.search import Found, SearchEngine, tools
from k25lite.swarm.subagent import (
    ANSWER,
    LETTERS,
    SUB_LIMITS,
    WINDOW,
    assignment,
    row_of,
    search_engine,
    subagent_policy,
    subagent_tokenizer,
    turns,
    work_prompt,
)
from k25lite.swarm.tools import run_apart
from k25lite.training.cache import cached
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import LearningRate, Step
from k25lite.vision import MoonViT3DConfig
from k25lite.world.entities import entity_names
from k25lite.world.families import PICTURED, UNPICTURED, Document
from k25lite.world.library import ATTRIBUTES, UNKNOWN, Library, Shares, state
from k25lite.world.streams import Row, make_rows

CALIBRATION = "calibration.json"  # in the folder of the stage
SHIPPED = shipped("subagent")  # as `anew` with seed 0 left it
# Seeds of libraries: to learn from, and to be measured with; tasks have theirs below both.
FIRST_SEED, MEASURED_SEED = 100_000, 200_000
SHARES = Shares(elsewhere=0.03, updated=0.02)
STAGES = ((256, 1), (512, 3), (768, 6), (1536, 12))  # tokens of a row, and names in a conversation at most
TOKENS_PER_STEP = 1536
NOBODY = 0.05  # of the assignments name somebody whom nothing tells of


@dataclass(frozen=True)
class Size:
    """How much a profile does.

    Attributes:
        steps: of training, at each stage of the curriculum.
        conversations: to learn from, at each.
        trials, alone_trials: at each size of assignment that is measured, of `names` and of `alone_names`.
    """

    steps: tuple[int, ...]
    conversations: int
    trials: int
    alone_trials: int
    names: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    alone_names: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


# Profiles that are not here take the sub-agent that is shipped, with its record.
SIZES = {"anew": Size((300, 400, 500, 1400), 2000, trials=48, alone_trials=12)}
PROFILES = ("smoke", "lite", "full", *SIZES)


@dataclass(frozen=True)
class SubagentRun:
    """One sub-agent: all that its training depends on, beside the code."""

    seed: int = 0
    profile: str = "lite"
    recipe: Recipe = Recipe(LearningRate(5e-3), qk_clip=None, trained_scale=0.2)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"a profile is one of {', '.join(PROFILES)}, got {self.profile!r}")


def subagent_stage(run: SubagentRun, progress: bool = True) -> Path:
    """The folder of a trained sub-agent and its calibration ("team" and "alone"); if it is trained anew, with its history.

    Raises:
        FileNotFoundError: a profile that takes the shipped sub-agent, and it is missing.
    """

    def build(folder: Path) -> None:
        torch.manual_seed(FIRST_SEED + run.seed)
        model = K25Lite(subagent_config())
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)  # words are told apart sooner
        rows, steps = curriculum(run.seed, size)
        train(model, steps, rows, run.recipe, progress=progress).save(folder)
        model.save_pretrained(folder)
        calibrate(folder, run.seed, size)

    if run.profile in SIZES:
        size = SIZES[run.profile]
        return cached("subagent", asdict(run) | {"size": asdict(size)}, build, threads=None)
    if not SHIPPED.is_dir():
        raise FileNotFoundError(f"no sub-agent in {SHIPPED}: install k25lite again; or train one, profile='anew'")
    return SHIPPED


def calibrate(folder: Path, seed: int, size: Size) -> None:
    """Measure the sub-agent in this folder, in libraries that it was not trained in."""
    policy = subagent_policy(folder)
    small, large = ([wide_library(MEASURED_SEED + 10 * seed + n, people) for n in range(4)] for people in (200, 800))
    measure(policy, small, size.names, size.trials, SUB_LIMITS).save(folder / CALIBRATION, "team")
    measure_alone(policy, large, size.alone_names, size.alone_trials).save(folder / CALIBRATION, "alone")


def wide_library(seed: int, people: int = 200) -> Library:
    """As the sub-agent knows libraries."""
    return Library(seed, people=people, idle=0, shares=SHARES)


def subagent_config() -> K25LiteConfig:
    """Three layers for reading, and eyes as small as they may be, which are never used.

    Attention is Llama's: it learns to copy names in fewer steps than attention through a latent vector.
    """
    text = LlamaConfig(
        vocab_size=len(subagent_tokenizer()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        rope_theta=100_000.0,
        initializer_range=0.05,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    eyes = MoonViT3DConfig.lite(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=1,
        intermediate_size=32,
        pos_emb_height=4,
        pos_emb_width=4,
    )
    return K25LiteConfig(text_config=text, vision_config=eyes)


def curriculum(seed: int, size: Size) -> tuple[dict[str, list[Row]], list[Step]]:
    """Rows to learn from, a stream for each stage, and the steps in order."""
    rows, plan = dict[str, list[Row]](), list[list[tuple[Any, int]]]()
    for stage, ((context, names), steps) in enumerate(zip(STAGES, size.steps, strict=True)):
        per_step, stream = TOKENS_PER_STEP // context, f"up to {names}"
        told = demonstrations(FIRST_SEED + 10 * seed + stage, size.conversations, names)
        short = [one for one in told if len(subagent_tokenizer()(one.text)["input_ids"]) < context]
        packed = make_rows(cycle(short), steps * per_step, context, subagent_tokenizer())
        renaming = np.random.default_rng([seed, stage])
        rows[stream] = [renamed(row, renaming) for row in packed]
        plan += [[(stream, step * per_step + i) for i in range(per_step)] for step in range(steps)]
    return rows, plan


def renamed(row: Row, random: np.random.Generator) -> Row:
    """The same row with other names, and other values of each relation."""
    table = np.arange(len(subagent_tokenizer()))
    for alike in words_alike():
        table[alike] = random.permutation(alike)
    input_ids = table[row.input_ids]
    return replace(row, input_ids=input_ids, labels=np.where(row.labels == -100, -100, input_ids))


@cache
def words_alike() -> list[list[int]]:
    """Ids of words that may take each other's places: names, and the values of each relation."""
    groups = [entity_names(PICTURED + UNPICTURED), *(values for _, _, values in ATTRIBUTES.values())]
    return [subagent_tokenizer().convert_tokens_to_ids(list(group)) for group in groups]


def demonstrate(messages: Sequence[Message]) -> Reply:
    """What a sub-agent should do next, whatever it did so far as this function would have done."""
    columns, letters = assignment(messages[0]["content"])
    names, read = [what for what in letters if what != ANSWER], len(messages) // 2
    note = ""
    if read:
        name, article = names[read - 1], messages[-1]["content"]
        note = row_of(name, {column: told(article, name, column) for column in columns})
    return Reply(note, (call("read", title=names[read]),) if read < len(names) else ())


def told(text: str, who: str, relation: str) -> str:
    """What a text says of somebody: not of what is theirs, and not of what was formerly."""
    found = re.findall(rf"\b(formerly |of )?{re.escape(state(who, relation, ''))}([a-z]+)", text)
    return next((value for before, value in found if not before), UNKNOWN)


def demonstrations(seed: int, count: int, names: int) -> list[Document]:
    """What the script does with assignments of 1 to `names` names, twenty in each library."""

    async def demonstrate_all() -> list[Document]:
        found: list[Document] = []
        while len(found) < count:
            library = wide_library(1000 * seed + len(found))
            by_name = {tool.__name__: tool for tool in tools(_Here(search_engine(library.documents)))}
            for _ in range(min(20, count - len(found))):
                listed = [random.choice(library.people).name for _ in range(random.randint(1, names))]
                if random.random() < NOBODY:
                    listed[-1] = " ".join(random.sample(entity_names(PICTURED), 2))
                columns = random.sample(list(ATTRIBUTES), random.randint(1, len(ATTRIBUTES)))
                prompt = work_prompt(listed, columns, random.randrange(len(LETTERS)))
                messages: list[Message] = [{"role": "user", "content": prompt}]
                while (reply := demonstrate(messages)).calls:
                    (asked,) = reply.calls
                    observation = await by_name[asked.name](**json.loads(asked.arguments))
                    messages += [reply.message, {"role": "tool", "content": observation}]
                found.append(Document("subagent", "demonstration", tuple(turns([*messages, reply.message]))))
        return found

    random = Random(f"k25lite subagent {seed}")
    return run_apart(demonstrate_all())


class _Here:
    """An engine that is asked in the event loop itself, which thousands of demonstrations are quicker by."""

    def __init__(self, engine: SearchEngine):
        self.engine = engine

    async def search(self, query: str, page: int = 1) -> Found:
        return self.engine.search(query, page)

    async def read(self, title: str) -> str | None:
        return self.engine.read(title)

"""Rollouts: a model works on tasks with programs, many at a time, over a key-value cache.

At each step every rollout takes one token, which it writes, or reads from what its program gave: none waits for another,
and those that are done leave the cache. Prompts are read once for all samples. Old log-probabilities are recorded as tokens
are sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.evaluation import END
from k25lite.training.sandbox import Observation, Sandbox
from k25lite.training.tasks import LONGEST_OBSERVATION, RUN, SEES, TOOLS, Content, as_code
from k25lite.vision import pack
from k25lite.world.streams import expand

MAX_TURNS, MAX_WRITTEN = 3, 40  # acts of one rollout; tokens of one act


@dataclass
class Prompt:
    """A question about a content, in words; with a `picture`, the model sees it and programs run on its pixels.

    Attributes:
        picture: [height, width, 3] uint8. content: what is told, and what programs run on, where there is no picture.
        tools: whether the model is told that it may run programs.
    """

    question: str
    content: Content
    picture: np.ndarray | None = None
    tools: bool = True

    @property
    def text(self) -> str:
        content = " ".join(self.content) if self.picture is None else "<image>"
        return f"{TOOLS} {content} {self.question}" if self.tools else f"{content} {self.question}"


@dataclass
class Rollout:
    """What was read and written for one prompt.

    Attributes:
        ids: prompt, acts and observations. written: which of them the model wrote. log_probs: of those, in nats, when they
            were sampled; 0 elsewhere.
        acts: what the model wrote in each turn, its full stop left out. observations: what its programs gave.
    """

    ids: list[int]
    written: list[bool]
    log_probs: list[float]
    acts: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    is_whole: bool = True
    written_now: int = 0  # tokens of the act that is being written

    def write(self, token: int, log_prob: float) -> None:
        self.ids.append(token)
        self.written.append(True)
        self.log_probs.append(log_prob)
        self.written_now += 1

    def close(self, tokenizer: PreTrainedTokenizerBase, is_whole: bool) -> str | None:
        """End the act; its program, if it is one that can be run."""
        self.is_whole = is_whole
        self.acts.append(tokenizer.decode(self.ids[-self.written_now : -1 if is_whole else None]))
        self.written_now = 0
        return program_of(self.acts[-1]) if is_whole else None

    def read(self, observation: Observation, ids: Sequence[int]) -> None:
        self.observations.append(observation)
        self.ids += ids
        self.written += [False] * len(ids)
        self.log_probs += [0.0] * len(ids)

    @property
    def answer(self) -> str:
        """The last act, if it is no program and has a full stop; else nothing."""
        last = self.acts[-1] if self.acts and self.is_whole else ""
        return "" if program_of(last) is not None else last

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.written)


def program_of(act: str) -> str | None:
    """The program of an act, thoughts before it left out; None if it is an answer."""
    _, run, program = f" {act} ".partition(f" {RUN} ")
    return program.strip() if run else None


@torch.no_grad()
def roll_out(
    model: K25Lite,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sandbox: Sandbox,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    turns: int = MAX_TURNS,
) -> list[Rollout]:
    """`samples` rollouts of each prompt, one after another.

    Args:
        turns: acts of a rollout, at most.
        temperature: 0 takes the likeliest token; log-probabilities are those of the distribution sampled from.
    """
    training = model.training
    model.eval()
    rollouts, logits, cache, mask = _read_prompts(model, tokenizer, prompts, samples)
    contents = [_told(prompt.content) if prompt.picture is None else prompt.picture for prompt in prompts]
    end = tokenizer.convert_tokens_to_ids(END)
    to_read: list[list[int]] = [[] for _ in rollouts]  # what is left of the observation that a rollout is reading
    rows = list(range(len(rollouts)))  # the rollouts in the cache
    working = set(rows)
    while True:
        scaled = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            drawn = torch.multinomial(scaled.exp(), 1, generator=generator)
        else:
            drawn = scaled.argmax(-1, keepdim=True)
        log_probs = scaled.gather(1, drawn).squeeze(1).tolist()
        tokens = drawn.squeeze(1).tolist()
        programs = {}
        for place, row in enumerate(rows):
            if to_read[row]:
                tokens[place] = to_read[row].pop(0)
            elif row in working:
                rollout = rollouts[row]
                rollout.write(tokens[place], log_probs[place])
                if tokens[place] == end or rollout.written_now == MAX_WRITTEN:
                    program = rollout.close(tokenizer, tokens[place] == end)
                    if program is None or len(rollout.acts) == turns:
                        working.discard(row)
                    else:
                        programs[row] = as_code(program)
        if not working:
            break
        for row, observation in _run(programs, contents, samples, sandbox).items():
            text = " ".join([SEES, *observation.text.split()[:LONGEST_OBSERVATION]])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            # What a program prints is never the place of a picture.
            to_read[row] = [token for token in ids if token != model.config.media_token_id]
            rollouts[row].read(observation, to_read[row])
        if len(working) <= 0.75 * len(rows):
            left = [place for place, row in enumerate(rows) if row in working]
            rows, tokens = [rows[place] for place in left], [tokens[place] for place in left]
            mask = mask[left]
            cache.batch_select_indices(torch.tensor(left, device=model.device))
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        logits = _next(model, torch.tensor(tokens)[:, None], mask, cache)
    model.train(training)
    return rollouts


def _read_prompts(
    model: K25Lite, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], samples: int
) -> tuple[list[Rollout], torch.Tensor, DynamicCache, torch.Tensor]:
    """Each prompt read once, for all of its samples: rollouts, next-token logits, cache, and mask [rollouts, length]."""
    media = [prompt.picture[None] for prompt in prompts if prompt.picture is not None]
    items = iter(media)
    texts = [expand(prompt.text, items) for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, ids))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    vision = None
    if media:
        pixel_values, grid_thw = pack(media, model.vision_tower.config)
        vision = model.encode_vision(pixel_values.to(model.device), grid_thw)
    cache = DynamicCache(config=model.config.text_config)
    logits = _next(model, input_ids, mask, cache, vision)
    cache.batch_repeat_interleave(samples)
    rollouts = [Rollout(list(row), [False] * len(row), [0.0] * len(row)) for row in ids for _ in range(samples)]
    return rollouts, logits.repeat_interleave(samples, 0), cache, mask.repeat_interleave(samples, 0)


def _next(
    model: K25Lite,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache,
    vision: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [rows, words] after the last of these tokens; positions count what is not padding.

    The place of a picture may be read and not written, as in `generate`.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    output = model(
        input_ids.to(model.device),
        vision_embeds=vision,
        attention_mask=mask.to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        logits_to_keep=1,
    )
    logits = output.logits[:, -1].float().cpu()
    logits[:, model.config.media_token_id] = -torch.inf
    return logits


def _run(
    programs: Mapping[int, str], contents: Sequence[np.ndarray | list[str] | str], samples: int, sandbox: Sandbox
) -> dict[int, Observation]:
    """What each rollout's program gives; rollouts of one prompt often write the same, which runs once."""
    if not programs:
        return {}
    runs = list(dict.fromkeys((row // samples, program) for row, program in programs.items()))
    gave = dict(zip(runs, sandbox.run([(program, contents[index]) for index, program in runs]), strict=True))
    return {row: gave[row // samples, program] for row, program in programs.items()}


def _told(content: Content) -> list[str] | str:
    return list(content) if isinstance(content, tuple) else content

"""Rollouts: a model works on tasks with programs, many at a time, over a key-value cache.

In each turn every row writes until its full stop; then all programs run together, and what they gave is read in. Rows that
are done with a turn wait for the others, so the cache holds places at which some rows read nothing: these are masked, and
positions count what a row really read. Old log-probabilities are recorded as tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.evaluation import END
from k25lite.training.sandbox import Observation, Sandbox
from k25lite.training.tasks import LONGEST_OBSERVATION, RUN, SEES, Content, as_code
from k25lite.vision import pack
from k25lite.world.streams import expand

MAX_TURNS, MAX_WRITTEN = 3, 40  # acts of one rollout; tokens of one act


@dataclass
class Prompt:
    """A question about a content, in words; with a `picture`, the model sees it and programs run on its pixels.

    Attributes:
        picture: [height, width, 3] uint8. content: what is told, and what programs run on, where there is no picture.
    """

    question: str
    content: Content
    picture: np.ndarray | None = None


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
) -> list[Rollout]:
    """`samples` rollouts of each prompt, one after another.

    Args:
        temperature: 0 takes the likeliest token; log-probabilities are those of the distribution sampled from.
    """
    training = model.training
    model.eval()
    batch = _Batch(model, tokenizer, prompts, samples, temperature, generator)
    contents = [prompt.content if prompt.picture is None else prompt.picture for prompt in prompts]
    for turn in range(MAX_TURNS):
        batch.write()
        programs = {
            row: program
            for row, rollout in enumerate(batch.rollouts)
            if batch.active[row] and (program := program_of(rollout.acts[-1])) is not None
        }
        batch.active &= torch.tensor([row in programs for row in range(len(batch.rollouts))])
        if not programs or turn == MAX_TURNS - 1:
            break
        # Rollouts of one prompt often write the same program.
        runs = dict.fromkeys((row // samples, as_code(program)) for row, program in programs.items())
        results = dict(zip(runs, sandbox.run([(code, _told(contents[index])) for index, code in runs]), strict=True))
        batch.read({row: results[row // samples, as_code(program)] for row, program in programs.items()})
    model.train(training)
    return batch.rollouts


class _Batch:
    """Rows that write and read at the same time."""

    def __init__(
        self,
        model: K25Lite,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        samples: int,
        temperature: float,
        generator: torch.Generator | None,
    ):
        self.model, self.tokenizer, self.temperature, self.generator = model, tokenizer, temperature, generator
        self.end, self.pad = tokenizer.convert_tokens_to_ids(END), tokenizer.pad_token_id
        media = [[] if prompt.picture is None else [prompt.picture[None]] for prompt in prompts]
        texts = [
            expand(f"{'<image>' if items else ' '.join(prompt.content)} {prompt.question}", iter(items))
            for prompt, items in zip(prompts, media, strict=True)
        ]
        rows = [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for _ in range(samples)]
        self.rollouts = [Rollout(list(ids), [False] * len(ids), [0.0] * len(ids)) for ids in rows]
        self.active = torch.ones(len(rows), dtype=torch.bool)
        self.cache = DynamicCache(config=model.config.text_config)
        self.mask = torch.zeros(len(rows), 0, dtype=torch.long)
        vision = None
        if items := [item for part in media for item in part]:
            pixel_values, grid_thw = pack(items, model.vision_tower.config)
            tokens = model.encode_vision(pixel_values.to(model.device), grid_thw)
            parts = iter(tokens.split([text.count("<media>") for text in texts if "<media>" in text]))
            vision = torch.cat([next(parts).repeat(samples, 1) for part in media if part])
        self.logits = self._feed(rows, vision)

    def _feed(self, rows: Sequence[Sequence[int]], vision: torch.Tensor | None = None) -> torch.Tensor:
        """Let each row read so many tokens, perhaps none; logits [rows, words] after the last token it has read."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        new = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.mask = torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        device = self.model.device
        output = self.model(
            ids.to(device),
            vision_embeds=vision,
            attention_mask=self.mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float().cpu()
        if hasattr(self, "logits"):
            logits = torch.where(torch.tensor([bool(row) for row in rows])[:, None], logits, self.logits)
        return logits

    def write(self) -> None:
        """Every active row writes one act: up to its full stop, or as much as it may."""
        begun = [len(rollout.ids) for rollout in self.rollouts]
        writing = self.active.clone()
        for _ in range(MAX_WRITTEN):
            scaled = (self.logits / (self.temperature or 1.0)).log_softmax(-1)
            if self.temperature:
                tokens = torch.multinomial(scaled.exp(), 1, generator=self.generator).squeeze(1)
            else:
                tokens = scaled.argmax(-1)
            log_probs = scaled.gather(1, tokens[:, None]).squeeze(1)
            for row in writing.nonzero().flatten().tolist():
                rollout = self.rollouts[row]
                rollout.ids.append(int(tokens[row]))
                rollout.written.append(True)
                rollout.log_probs.append(float(log_probs[row]))
            # The full stop is read as well: an observation may follow it.
            self.logits = self._feed([[int(tokens[row])] if writing[row] else [] for row in range(len(tokens))])
            writing &= tokens != self.end
            if not writing.any():
                break
        for row in self.active.nonzero().flatten().tolist():
            rollout = self.rollouts[row]
            rollout.is_whole = not bool(writing[row])
            act = rollout.ids[begun[row] : -1 if rollout.is_whole else None]
            rollout.acts.append(self.tokenizer.decode(act))
        self.active &= ~writing

    def read(self, observations: dict[int, Observation]) -> None:
        """The given rows read what their programs gave."""
        rows: list[list[int]] = [[] for _ in self.rollouts]
        for row, observation in observations.items():
            rollout = self.rollouts[row]
            text = " ".join([SEES, *observation.text.split()[:LONGEST_OBSERVATION]])
            rows[row] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            rollout.ids += rows[row]
            rollout.written += [False] * len(rows[row])
            rollout.log_probs += [0.0] * len(rows[row])
            rollout.observations.append(observation)
        self.logits = self._feed(rows)


def _told(content: Content | np.ndarray) -> np.ndarray | list[str] | str:
    return list(content) if isinstance(content, tuple) else content

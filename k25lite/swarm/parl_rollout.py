"""Rollouts of the orchestrator: many episodes at a time, a token for each of them per pass, over a key-value cache.

In a pass every episode takes one token, which it writes, or reads from its observation: all are equally long, none is
padded, and those that have ended leave the cache. Old log-probabilities are recorded as acts are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from k25lite.swarm.parl_language import ACTS, IDS, TASK, TOKENS, closes
from k25lite.swarm.simulator import Environment, WideSearch

WINDOW = 512  # tokens that an orchestrator can have before it


def make_orchestrator(seed: int) -> PreTrainedModel:
    """An untrained language model of acts and observations, about 0.1 million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def only_acts(logits: Tensor) -> Tensor:
    """Logits [..., tokens] in which nothing but acts can be written: what is told is told by others."""
    told = torch.arange(logits.shape[-1], device=logits.device) >= len(ACTS)
    return logits.float().masked_fill(told, -torch.inf)


@dataclass
class Rollouts:
    """What was read and written in each episode.

    Attributes:
        input_ids: [episodes, length], padded at the end. written: [episodes, length] bool, the acts.
        log_probs: [episodes, length], of the acts, in nats, when they were sampled; 0 elsewhere.
        entropy: of what acts were drawn from, in nats, on average.
    """

    input_ids: Tensor
    written: Tensor
    log_probs: Tensor
    entropy: float = 0.0

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        written: Sequence[Sequence[bool]],
        log_probs: Sequence[Sequence[float]] | None = None,
        entropy: float = 0.0,
    ) -> Rollouts:
        log_probs = [[0.0] * len(row) for row in ids] if log_probs is None else log_probs
        input_ids, mask, old = (pad_sequence([*map(torch.tensor, rows)], True) for rows in (ids, written, log_probs))
        return cls(input_ids, mask, old, entropy)

    def __getitem__(self, rows: Tensor) -> Rollouts:
        """Some of the episodes, without the padding that none of them needs."""
        end = int(self.lengths[rows].max())
        parts = self.input_ids[rows, :end], self.written[rows, :end], self.log_probs[rows, :end]
        return Rollouts(*parts, self.entropy)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each episode up to its last act, [episodes]."""
        return (self.written * torch.arange(1, self.written.shape[1] + 1)).amax(1)


def roll_out(
    model: PreTrainedModel,
    environment: Environment,
    tasks: Sequence[WideSearch],
    *,
    temperature: float = 1.0,
    window: int = WINDOW,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """An episode for each task; the environment tells how they went.

    Args:
        temperature: 0 takes the likeliest act; log-probabilities are those of the distribution sampled from.
        window: tokens of an episode, at most; one that is longer ends without an answer.
    """
    training = model.training
    model.eval()
    before = dict(enumerate(environment.begin(tasks)))  # the last observation of each
    to_read = [observation.ids()[::-1] for observation in before.values()]  # the next token last
    ids, written, log_probs = [[IDS[TASK]] for _ in tasks], [[False] for _ in tasks], [[0.0] for _ in tasks]
    acts: list[list[str]] = [[] for _ in tasks]  # of the step that is being written
    entropies: list[float] = []
    rows = list(range(len(tasks)))  # the episodes in the cache
    working = set(rows)
    tokens, cache = [IDS[TASK]] * len(rows), DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(window - 1):
            output = model(torch.tensor(tokens)[:, None], past_key_values=cache, use_cache=True)
            scaled = (only_acts(output.logits[:, -1]) / (temperature or 1.0)).log_softmax(-1)
            likely = scaled.exp()
            drawn = (
                torch.multinomial(likely, 1, generator=generator) if temperature else scaled.argmax(-1, keepdim=True)
            )
            surprise = scaled.gather(1, drawn).squeeze(1).tolist()
            spread = torch.where(likely > 0, -likely * scaled, 0.0).sum(1).tolist()
            tokens = drawn.squeeze(1).tolist()
            steps: dict[int, Sequence[str]] = {}
            for place, row in enumerate(rows):
                if row not in working:
                    continue
                is_act = not to_read[row]
                if is_act:
                    acts[row].append(ACTS[tokens[place]])
                    entropies.append(spread[place])
                    if closes(acts[row]):
                        steps[row], acts[row] = acts[row], []
                else:
                    tokens[place] = to_read[row].pop()
                ids[row].append(tokens[place])
                written[row].append(is_act)
                log_probs[row].append(surprise[place] if is_act else 0.0)
            for row, observation in environment.step(steps).items() if steps else ():
                if observation is None:
                    working.discard(row)
                else:
                    to_read[row] = observation.ids(before[row])[::-1]
                    before[row] = observation
            if not working:
                break
            if len(working) <= 0.8 * len(rows):
                left = [place for place, row in enumerate(rows) if row in working]
                rows, tokens = [rows[place] for place in left], [tokens[place] for place in left]
                cache.batch_select_indices(torch.tensor(left))
    model.train(training)
    return Rollouts.of(ids, written, log_probs, sum(entropies) / max(len(entropies), 1))

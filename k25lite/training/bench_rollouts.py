"""What rollouts cost: all at once, one by one, and against plain `generate`; and where the time of an RL step goes.

The model is that of the notebooks after seconds of demonstrations, so that it writes programs, which run; every prompt has
a picture, and the temperature is 1. `generate` knows no turns: it is held against rollouts that end with their first act.

Not covered: several processes, rollouts without pictures, several updates on the same rollouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from k25lite.bench import SUBJECT, devices, refuse_difference
from k25lite.model import K25Lite
from k25lite.processing import K25LiteProcessor
from k25lite.training.evaluation import END
from k25lite.training.joint import CONTEXT, ROWS_PER_STEP, model_config
from k25lite.training.loop import Recipe, train
from k25lite.training.rl import RLRecipe, make_pool, reinforce
from k25lite.training.rollout import MAX_WRITTEN, Prompt, Rollout, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import LearningRate, plan
from k25lite.training.sft import MANY, Arm, tool_tokenizer
from k25lite.training.tasks import ABILITIES
from k25lite.world.streams import make_rows

if TYPE_CHECKING:
    from k25lite.training.bench import Bench

GENERATE, ALONE = "plain generate", "one by one, of every third prompt"
DIFFERING = 0.1  # the share of rollouts in which rounding may have tipped the choice between two words
TINY = {"hidden_size": 64, "intermediate_size": 128}  # of the model in quick mode


def rollouts(bench: Bench) -> None:
    """Generated tokens/s and, on the device that `reinforce` would choose, the shares of an RL step.

    Raises:
        Disagreement: with the likeliest words, one by one or `generate` writes something else than `roll_out`.
    """
    prompts, samples, steps = (6, 2, 2) if bench.quick else (36, 8, 5)
    recipe = RLRecipe(steps, prompts, samples, pool=prompts // len(ABILITIES))
    words, model = tool_tokenizer(), trained(bench)
    with Sandbox(seconds=10.0) as sandbox:  # on a busy machine, too, programs must give what they give
        asked = [question.prompt for pool in make_pool(recipe, 0).values() for question in pool]
        speed(bench, Contenders(model, words, sandbox, asked, samples))
    if bench.device == devices()[-1]:
        step(bench, model, words, recipe)


def trained(bench: Bench) -> K25Lite:
    """A model that writes programs, most of which run; on the benchmark's device."""
    words, count = tool_tokenizer(), 60 if bench.quick else 400
    torch.manual_seed(0)
    learner = K25Lite(model_config(**TINY if bench.quick else {}))
    learner.resize_token_embeddings(len(words), mean_resizing=False)
    demonstrations = Arm(told=MANY, shown=MANY, share=0.5).demonstrations(Random(0))
    rows = {"text": make_rows(demonstrations, count, CONTEXT, words)}
    train(learner, plan(None, count, 0, ROWS_PER_STEP), rows, Recipe(LearningRate(5e-3)), progress=False)
    model = K25Lite(learner.config)  # one that accelerate has not wrapped
    model.load_state_dict(learner.state_dict())
    return model.to(bench.device).eval()


@dataclass
class Contenders:
    """Ways to have rollouts of the same prompts, the same ones at each call. Temperature 0 is for one sample each."""

    model: K25Lite
    words: PreTrainedTokenizerFast
    sandbox: Sandbox
    prompts: Sequence[Prompt]
    samples: int

    def together(self, temperature: float = 1.0) -> list[Rollout]:
        return self.roll_out(self.prompts, temperature, self.samples if temperature else 1)

    def alone(self, temperature: float = 1.0) -> list[Rollout]:
        return [one for prompt in self.prompts[::3] for one in self.roll_out([prompt], temperature, 1)]

    def first_acts(self, temperature: float = 1.0) -> list[Rollout]:
        return self.roll_out(self.prompts, temperature, self.samples if temperature else 1, turns=1)

    def generate(self, temperature: float = 1.0) -> list[Rollout]:
        """First acts, by the processor and transformers' `generate`; with log-probabilities, as RL needs them."""
        texts, pictures = [prompt.text for prompt in self.prompts], [prompt.picture for prompt in self.prompts]
        inputs = dict(K25LiteProcessor(self.words)(text=texts, images=pictures))
        ids, mask = inputs["input_ids"], inputs["attention_mask"] == 1
        end = self.words.convert_tokens_to_ids(END)
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "top_k": 0, "temperature": temperature, "num_return_sequences": self.samples}
        torch.manual_seed(0)
        output = self.model.generate(
            **{name: tensor if name == "grid_thw" else tensor.to(self.model.device) for name, tensor in inputs.items()},
            **how,
            max_new_tokens=MAX_WRITTEN,
            eos_token_id=end,
            pad_token_id=self.words.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        new = output.sequences[:, ids.shape[1] :]
        scores = torch.stack(output.scores, 1).log_softmax(-1)  # rollouts words vocabulary
        log_probs = scores.gather(2, new[..., None]).squeeze(2).tolist()
        lengths = ((new == end).cumsum(1) - (new == end).long() == 0).sum(1).tolist()  # what follows it is padding
        found = []
        for row, (words, length) in enumerate(zip(new.tolist(), lengths, strict=True)):
            prompt = row * len(ids) // len(new)
            read = ids[prompt][mask[prompt]].tolist()
            written = [False] * len(read) + [True] * length
            found.append(Rollout(read + words[:length], written, [0.0] * len(read) + log_probs[row][:length]))
        return found

    def roll_out(self, prompts: Sequence[Prompt], temperature: float, samples: int, **options: Any) -> list[Rollout]:
        options |= {"samples": samples, "temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        return roll_out(self.model, self.words, prompts, self.sandbox, **options)


def speed(bench: Bench, contenders: Contenders) -> None:
    """Tokens that the model writes in a second: of whole rollouts, and of first acts."""
    size = f"{len(contenders.prompts)} prompts x {contenders.samples}"
    whole, first = bench.case(f"rollouts, {size}"), bench.case(f"first acts, {size}")
    differing = {
        ALONE: refuse_others(whole, ALONE, contenders.together(0)[::3], contenders.alone(0)),
        GENERATE: refuse_others(first, GENERATE, contenders.first_acts(0), contenders.generate(0)),
    }
    tokens: dict[str, int] = {}

    def counted(who: str, call: Callable[[], list[Rollout]]) -> None:
        tokens[who] = sum(each.length for each in call())

    ways = {whole: contenders.together, ALONE: contenders.alone}
    ways |= {first: contenders.first_acts, GENERATE: contenders.generate}
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.half):  # as in training
        times = bench.timed({who: partial(counted, who, call) for who, call in ways.items()}, 25)
    seconds = {who: each / tokens[who] for who, each in times.items()}  # of a token
    for case, peer in ((whole, ALONE), (first, GENERATE)):
        bench.report.add(case, "rollouts that differ", "fraction", {peer: differing[peer]})
        mine = {SUBJECT: seconds[case], peer: seconds[peer]}
        bench.report.add(case, "tokens/s", "tokens/s", {who: 1 / each for who, each in mine.items()}, mine)


def refuse_others(case: str, peer: str, ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> float:
    """The share of rollouts that differ in a word or in its log-probability; raise Disagreement if it is large."""
    differ = [
        a.ids != b.ids or a.written != b.written or not np.allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    ]
    refuse_difference(case, peer, "rollouts", share := sum(differ) / len(differ), DIFFERING)
    return share


def step(bench: Bench, model: K25Lite, words: PreTrainedTokenizerFast, recipe: RLRecipe) -> None:
    """The median step of `reinforce` after the first, which starts processes and warms up; and what its parts take."""
    log = reinforce(copy.deepcopy(model), words, recipe, 0, progress=False).log.iloc[1:]
    seconds = {part: float(log[f"{part}_s"].median()) for part in ("rollout", "reward", "update")}
    case = bench.case(f"RL step, {recipe.prompts} prompts x {recipe.samples}")
    bench.report.add(case, "RL step time", "s", {SUBJECT: sum(seconds.values())})
    for part, each in seconds.items():
        bench.report.add(case, f"{part} share of the step", "fraction", {SUBJECT: each / sum(seconds.values())})

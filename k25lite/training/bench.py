"""`k25lite bench training`: what training costs, each part against the barest PyTorch that does the same work.

Measured: the loop against bare steps, the language model against a plain decoder and as a mixture of experts against the
dense one, the fraction of the matrix peak, the decoupled encoder, MuonClip, rollouts against `generate`, the parts of an RL
step, and how time and memory grow with the model.

Inputs are rows of the Lite World, packed as in training. Precision is the loop's: bfloat16 autocast on a GPU that has it.
Not covered: several processes, evaluation, checkpoints, the making of rows; the kernels' own workspace as memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from k25lite.bench import (
    PRODUCT,
    SUBJECT,
    Report,
    allocated,
    device_name,
    devices,
    fastest_product,
    median_seconds,
    peak_activations,
    refuse_difference,
    relative_difference,
)
from k25lite.model import K25Lite, K25LiteConfig
from k25lite.training.bench_plain import PLAIN, PlainDecoder, active_parameters, count_flops, refuse_unequal_work
from k25lite.training.bench_rollouts import rollouts
from k25lite.training.decoupled import decoupled_backward
from k25lite.training.joint import tokenizer
from k25lite.training.loop import Batch, Recipe, collate, make_optimiser, next_token_loss, train
from k25lite.training.muonclip import MuonClip
from k25lite.training.schedules import EARLY, LearningRate, plan, rows_in
from k25lite.vision import MoonViT3DConfig
from k25lite.vision.attention import has_bf16
from k25lite.world.families import LiteWorld
from k25lite.world.streams import PIXELS_PER_TOKEN, TEXT_MIX, VISION_MIX, Row, documents, make_rows

DENSE, EXPERTS = "dense", "experts"
BARE, UNCLIPPED, ADAMW, WHOLE = "bare steps", "MuonClip without QK-Clip", "AdamW", "not decoupled"
BACKWARD = "forward+backward alone"  # what a training step cannot do without
RECIPE = Recipe(LearningRate(2e-3))
# Of the model in quick mode, and of its encoder.
TINY = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "kv_lora_rank": 16}
TINY_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
Calls = Mapping[str, Callable[[], object]]


def run(device: str | None = None, quick: bool = False) -> Report:
    """Measure everything: about 4 minutes on 2 CPU cores.

    Args:
        device: "cpu" or "cuda"; both by default where there is a GPU. The loop and RL choose their device themselves, the
            GPU if there is one, and are measured there only.
        quick: tiny shapes in a few seconds, to see that everything works. Its numbers mean nothing.

    Raises:
        Disagreement: two contenders do not do the same work; they were not timed then.
        ValueError: no such device.
    """
    measured = devices(device)
    report = Report("; ".join(device_name(each) for each in measured))
    for each in measured:
        bench = Bench(report, each, quick)
        parts = [bench.language, bench.optimisers, bench.decoupled, bench.growth, partial(rollouts, bench)]
        if each == devices()[-1]:
            parts.insert(0, bench.loop)
        for part in tqdm(parts, desc=f"training, {each.type}", disable=None):
            part()
    return report


@dataclass
class Bench:
    """The parts of the benchmark on one device; each adds its rows to the report."""

    report: Report
    device: torch.device
    quick: bool
    words: PreTrainedTokenizerFast = field(default_factory=tokenizer)
    world: LiteWorld = field(default_factory=lambda: LiteWorld(0))

    def __post_init__(self) -> None:
        gpu = self.device.type == "cuda"
        self.half = has_bf16(self.device)
        sizes = (128,) if self.quick else (4096, 8192, 16384) if gpu else (512, 1024, 2048)
        dtype = torch.bfloat16 if self.half else torch.float32
        self.product = fastest_product(self.device, dtype, sizes)

    def loop(self) -> None:
        """The training loop on packed rows, which it collates, against bare steps on batches that lie ready."""
        text, vision, size = (18, 2, 4) if self.quick else (180, 20, 10)
        rows = {"text": self.rows(text), "vision": self.rows(vision, mix=VISION_MIX)}
        steps, start = plan(EARLY, text, vision, size), self.model()
        batches = [self.batch([rows[stream][index] for stream, index in step]) for step in steps]
        rates = [RECIPE.learning_rate(consumed / (text + vision)) for consumed in rows_in(steps)[1:]]

        # Each call begins with a copy, so that all do the same work, and accelerate wraps no model twice.
        def looped() -> K25Lite:
            model = copy.deepcopy(start)
            train(model, steps, rows, RECIPE, progress=False)
            return model

        def bare() -> K25Lite:
            model = copy.deepcopy(start)
            optimiser = make_optimiser(model, RECIPE)
            for batch, rate in zip(batches, rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = rate
                self.step(model, batch, optimiser)
            return model

        case = self.case(f"training loop, {size} x 64 tokens")
        before, moved = start.state_dict(), {}
        for who, call in {SUBJECT: looped, BARE: bare}.items():
            moved[who] = {name: weight - before[name] for name, weight in call().state_dict().items()}
        self.compare(case, BARE, "updates", moved[SUBJECT], moved[BARE])
        seconds = self.timed({SUBJECT: looped, BARE: bare}, 25)
        tokens = sum(row.tokens for stream in rows.values() for row in stream)
        self.report.add(case, "step time", "s", {who: each / len(steps) for who, each in seconds.items()}, seconds)
        self.report.add(case, "tokens/s", "tokens/s", {who: tokens / each for who, each in seconds.items()}, seconds)
        self.report.add(case, "loop overhead", "fraction", {SUBJECT: seconds[SUBJECT] / seconds[BARE] - 1})

    def language(self) -> None:
        """Forward and backward of the language models, dense and with experts, and of the plain decoder."""
        models: dict[str, Any] = {DENSE: self.model(), EXPERTS: self.model(moe=True)}
        text = models[DENSE].config.text_config
        shape = (text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads)
        models[PLAIN] = PlainDecoder(*shape, active_parameters(models[DENSE].language_model)).to(self.device)
        for rows, context in ((3, 64), (2, 128)) if self.quick else ((10, 64), (5, 128)):
            batch = self.batch(self.rows(rows, context))
            cases = {ours: self.case(f"language model, {ours}, {rows} x {context} tokens") for ours in (DENSE, EXPERTS)}
            for ours, case in cases.items():
                refuse_unequal_work(case, models[PLAIN], models[ours], batch)
            calls = {who: self.backward(model, batch) for who, model in models.items()}
            seconds = self.timed(calls | {PRODUCT: self.product}, 10)
            for ours, case in cases.items():
                who = {SUBJECT: ours, PLAIN: PLAIN} | ({DENSE: DENSE} if ours == EXPERTS else {})
                times = {name: seconds[key] for name, key in who.items()}
                speed = {name: rows * context / each for name, each in times.items()}
                self.report.add(case, "forward+backward tokens/s", "tokens/s", speed, times)
                flops = {name: 3 * count_flops(models[key], batch) for name, key in who.items()}
                self.report.add_fractions(case, flops, times, self.product.flops / seconds[PRODUCT])

    def optimisers(self) -> None:
        """MuonClip against AdamW and against itself without QK-Clip, most of which is done in the forward pass.

        The fractions of the matrix peak count what forward and backward need: an optimiser's own products lower them.
        """
        start = self.model()
        batch = self.batch(self.rows(3 if self.quick else 9) + self.rows(1, mix=VISION_MIX))
        rate = LearningRate(1e-6)  # hundreds of steps along one gradient must not lead anywhere
        models = {who: copy.deepcopy(start) for who in (SUBJECT, UNCLIPPED, ADAMW)}
        optimisers = {
            SUBJECT: make_optimiser(models[SUBJECT], Recipe(rate)),
            UNCLIPPED: MuonClip(models[UNCLIPPED], rate.peak, qk_clip_threshold=None),
            ADAMW: make_optimiser(models[ADAMW], Recipe(rate, "adamw")),
        }
        case = self.case(f"optimiser, {len(batch['input_ids'])} x 64 tokens")
        gradients = {who: gradients_of(model, self.backward(model, batch)) for who, model in models.items()}
        for who in (UNCLIPPED, ADAMW):
            self.compare(case, who, "gradients", gradients[SUBJECT], gradients[who])
        alone = self.timed({who: each.step for who, each in optimisers.items()}, 5)
        steps: dict[str, Callable[[], object]] = {
            who: partial(self.step, models[who], batch, optimisers[who]) for who in models
        }
        seconds = self.timed({**steps, BACKWARD: self.backward(start, batch), PRODUCT: self.product}, 15)
        peak = self.product.flops / seconds.pop(PRODUCT)
        self.report.add(case, "optimiser time", "s", alone, alone)
        share = {who: alone[who] / seconds[who] for who in alone}
        self.report.add(case, "optimiser share of the step", "fraction", share)
        self.report.add(case, "training step time", "s", seconds, seconds)
        self.report.add_fractions(case, dict.fromkeys(seconds, 3 * count_flops(start, batch)), seconds, peak)

    def decoupled(self) -> None:
        """The Decoupled Encoder Process against one backward pass through everything, on a batch of mostly vision."""
        chunks, side = (32, 32) if self.quick else (64, 64)
        model, batch = self.model(), self.batch(vision_rows(chunks, side, len(self.words)))
        vision = {name: batch[name] for name in ("pixel_values", "grid_thw")}
        text = {name: tensor for name, tensor in batch.items() if name not in vision}

        def decoupled() -> None:
            model.zero_grad()
            decoupled_backward(model, vision, lambda **embeds: self.loss(model, text | embeds))

        contenders: Calls = {SUBJECT: decoupled, WHOLE: self.backward(model, batch)}
        case = self.case(f"decoupled encoder, {chunks} chunks of 4 x {side} x {side} px")
        self.compare(case, WHOLE, "gradients", *(gradients_of(model, call) for call in contenders.values()))
        self.add_memory(case, contenders, [*model.parameters(), *batch.values()])
        seconds = self.timed(contenders, 25)
        self.report.add(case, "forward+backward time", "s", seconds, seconds)

    def growth(self) -> None:
        """How time and memory of forward and backward grow with width, depth and context, at the same number of tokens.

        The rest as in the lite model, which is of width 128, depth 4 and context 64; documents stay as short as they are.
        """
        tokens = 256 if self.quick else 2048
        cases: dict[str, tuple[dict[str, Any], int]] = {}  # changes of the model, context
        for width in (32, 64) if self.quick else (64, 128, 256):
            shape = {"hidden_size": width, "intermediate_size": 3 * width, "kv_lora_rank": width // 2}
            cases[f"width {width}"] = shape | {"num_attention_heads": width // 32}, 64
        for depth in (1, 2) if self.quick else (2, 4, 8):
            cases[f"depth {depth}"] = {"num_hidden_layers": depth}, 64
        for context in (64, 128) if self.quick else (64, 256, 1024):
            cases[f"context {context}"] = {}, context
        calls, outside = {}, {}
        for name, (changes, context) in cases.items():
            model, batch = self.model(**changes), self.batch(self.rows(tokens // context, context))
            calls[name], outside[name] = self.backward(model, batch), [*model.parameters(), *batch.values()]
        for name, each in self.timed(calls, 25).items():
            case = self.case(f"{name}, {tokens} tokens")
            self.report.add(case, "forward+backward time", "s", {SUBJECT: each})
            self.add_memory(case, {SUBJECT: calls[name]}, outside[name])

    def case(self, name: str) -> str:
        return f"{self.device.type}: {name}"

    def model(self, moe: bool = False, **changes: Any) -> K25Lite:
        """The lite model, its weights always the same."""
        torch.manual_seed(0)
        encoder = MoonViT3DConfig.lite(**(TINY_ENCODER if self.quick else {}))
        changes = (TINY if self.quick else {}) | changes
        return K25Lite(K25LiteConfig.lite(len(self.words), moe=moe, vision_config=encoder, **changes)).to(self.device)

    def rows(self, count: int, context: int = 64, mix: Mapping[str, float] = TEXT_MIX) -> list[Row]:
        return make_rows(documents(self.world, mix, seed=0), count, context, self.words)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """On the device, the grids excepted, as in the loop."""
        batch = collate(rows, MoonViT3DConfig.lite())
        return {name: tensor if name == "grid_thw" else tensor.to(self.device) for name, tensor in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean over the tokens that the labels ask for."""
        inputs, labels = {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return next_token_loss(model(**inputs).logits, labels) / (labels[:, 1:] != -100).sum()

    def backward(self, model: nn.Module, batch: Batch) -> Callable[[], None]:
        """A call that computes the gradients of `model` anew."""

        def call() -> None:
            model.zero_grad()
            self.loss(model, batch).backward()

        return call

    def step(self, model: nn.Module, batch: Batch, optimiser: torch.optim.Optimizer) -> None:
        """A bare training step."""
        self.backward(model, batch)()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        optimiser.step()

    def timed(self, contenders: Calls, seconds: float) -> dict[str, float]:
        rounds = (1, 1) if self.quick else (3, 50)
        return median_seconds(contenders, self.device, seconds=0 if self.quick else seconds, rounds=rounds)

    def compare(self, case: str, peer: str, what: str, ours: Batch, theirs: Batch) -> None:
        """Record the relative difference; raise Disagreement where rounding cannot be it, or where one lacks a tensor."""
        difference = relative_difference(ours, theirs) if ours.keys() == theirs.keys() else math.inf
        refuse_difference(case, peer, what, difference, 0.2 if self.half else 1e-3)
        self.report.add(case, f"difference of {what}", "of their norm", {peer: difference})

    def add_memory(self, case: str, contenders: Calls, outside: Sequence[torch.Tensor]) -> None:
        """What autograd keeps, counted; and on a GPU what was allocated beyond weights, gradients and batch."""
        peaks = {"activation memory": {who: peak_activations(call, outside) for who, call in contenders.items()}}
        if self.device.type == "cuda":
            peaks["allocated memory"] = {who: allocated(call) for who, call in contenders.items()}
        for metric, values in peaks.items():
            self.report.add(case, metric, "MB", {who: each / 1e6 for who, each in values.items()}, values)


def gradients_of(model: nn.Module, call: Callable[[], object]) -> dict[str, torch.Tensor]:
    """By parameter, after `call`."""
    call()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def vision_rows(chunks: int, side: int, vocabulary: int) -> list[Row]:
    """Random chunks of 4 square frames of `side` pixels, four to a row, followed by as many random tokens of text."""
    random = np.random.default_rng(0)
    media = 4 * (side // PIXELS_PER_TOKEN) ** 2
    rows = []
    for _ in range(chunks // 4):
        ids = np.concatenate([np.full(media, 3), random.integers(4, vocabulary, media)])
        labels = np.where(ids == 3, -100, ids)
        frames = tuple(random.integers(0, 256, (4, 4, side, side, 3), np.uint8))
        rows.append(Row(ids, np.arange(2 * media), labels, frames, 2 * media))
    return rows

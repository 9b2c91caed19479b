"""The ViT stage: the encoder learns from text alone, by the cross-entropy of a small language model that reads its tokens.

Source: report, Table 3 (ViT training: a caption loss only, no contrastive loss). Simplified here: the text is questions
and answers about the cells of Lite World scenes instead of captions from the web, asked of one cell's tokens at a time (as
with grounding boxes), and the language model is a two-layer Llama.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaModel

from k25lite.vision import MoonViT3D, MoonViT3DConfig, Projector, pack
from k25lite.vision.attention import has_bf16
from k25lite.world.scenes import CELLS, DIRECTIONS, TOKEN, WORDS, Question, SceneSpec, draw, sample_scenes

PAD, START = TOKEN["<pad>"], TOKEN["<start>"]
# Motion is one question in three and by far the slowest to learn: unweighted, it is still at chance after 12,000 clips.
MOTION_WEIGHT = 8.0


class VisionReader(nn.Module):
    """MoonViT-3D -> projector -> a small causal language model that answers questions about the cells it is shown.

    Args:
        config: the encoder's.
        width, layers: of the language model.
    """

    def __init__(self, config: MoonViT3DConfig, width: int = 128, layers: int = 2):
        super().__init__()
        self.encoder = MoonViT3D(config)
        self.projector = Projector(config.hidden_size, width, merge=config.merge_kernel_size[0])
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                pad_token_id=PAD,
            )
        )

    def see(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, scenes: int) -> torch.Tensor:
        """[scenes * 4, tokens, width]: for each cell of each scene, its tokens through time."""
        vision = self.projector(self.encoder(pixel_values, grid_thw).pooler_output)
        return rearrange(vision, "(b k c) d -> (b c) k d", b=scenes, c=len(CELLS))

    def read(self, vision: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits of the word after each of `words`: [rows, k, width], [rows, length] -> [rows, length, vocabulary]."""
        embedding = self.decoder.embed_tokens
        hidden = self.decoder(inputs_embeds=torch.cat([vision, embedding(words)], dim=1)).last_hidden_state
        return F.linear(hidden[:, vision.shape[1] :], embedding.weight)


@dataclass(frozen=True)
class Example:
    """A scene as the encoder sees it, chunks of [t, h, w, 3] uint8, and the questions about each of its cells."""

    chunks: tuple[np.ndarray, ...]
    questions: tuple[tuple[Question, ...], ...]


def make_examples(spec: SceneSpec, n: int, seed: int, stride: int = 1) -> list[Example]:
    """n scenes, of which the encoder sees every `stride`-th frame, in chunks of up to four."""
    examples = []
    for scene in sample_scenes(spec, n, seed):
        frames = draw(scene)[stride // 2 :: stride]
        chunks = tuple(frames[start : start + 4] for start in range(0, len(frames), 4))
        by_cell = tuple(tuple(q for q in scene.questions if q.where == where) for where in CELLS)
        examples.append(Example(chunks, by_cell))
    return examples


def collate(batch: Sequence[Example], config: MoonViT3DConfig, rng: np.random.Generator):
    """Pack the chunks, and string each cell's questions together in random order: "<start> asked answer asked answer ...".

    Returns:
        pixel_values, grid_thw, words [batch * 4, length], targets of that shape: the answer where one is due, else -100.
    """
    costs = {len(e.chunks) if config.temporal_pooling else sum(map(len, e.chunks)) for e in batch}
    if len(costs) > 1:
        raise ValueError(
            f"the scenes of a batch must cost equally many tokens; a cell's cost here is one of {sorted(costs)}"
        )
    pixel_values, grid_thw = pack([chunk for example in batch for chunk in example.chunks], config)
    rows, targets = [], []
    for questions in (cell for example in batch for cell in example.questions):
        row, target = [START], [-100]
        for index in rng.permutation(len(questions)):
            answer = TOKEN[questions[index].answer]
            row += [TOKEN[questions[index].asked], answer]
            target += [answer, -100]
        rows.append(torch.tensor(row))
        targets.append(torch.tensor(target))
    words = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return pixel_values, grid_thw, words, nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)


def train(
    model: VisionReader,
    data: Sequence[Example],
    *,
    seed: int,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """One pass over `data`, in an order that depends on the seed alone; AdamW, warm-up-stable-decay.

    Returns:
        One row per step: step, loss, learning_rate.

    Raises:
        ValueError: fewer scenes than one batch, or scenes that do not cost equally many tokens (stills and one-chunk clips
            do).
    """
    if len(data) < batch_size:
        raise ValueError(f"{len(data)} scenes are less than one batch of {batch_size}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    steps = len(data) // batch_size
    model.to(device).train()
    weight = torch.ones(len(WORDS), device=device)
    weight[[TOKEN[word] for word in DIRECTIONS]] = MOTION_WEIGHT
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_stable_decay(step, steps))
    losses, rates = [], []
    for step in tqdm(range(steps), leave=False, mininterval=1.0, disable=not progress):
        batch = [data[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        pixel_values, grid_thw, words, targets = collate(batch, model.encoder.config, rng)
        with mixed_precision(device):
            logits = model.read(model.see(pixel_values.to(device), grid_thw, len(batch)), words.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), weight=weight)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    return pd.DataFrame({"step": range(steps), "loss": torch.stack(losses).cpu().numpy(), "learning_rate": rates})


def warmup_stable_decay(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: up over a twentieth, flat, over three tenths down to a tenth."""
    rising = (step + 1) / math.ceil(0.05 * steps)
    falling = 0.1 + 0.9 * (steps - step) / (0.3 * steps)
    return min(1.0, rising, falling)


def mixed_precision(device: torch.device | str):
    """bfloat16 where it pays."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=has_bf16(torch.device(device)))


@torch.no_grad()
def evaluate(
    model: VisionReader, data: Sequence[Example], *, device: torch.device | str = "cpu", batch_size: int = 64
) -> pd.DataFrame:
    """Ask every question on its own, so that no other answer is in sight.

    Returns:
        One row per question: asked, kind, concept, answer, given, correct.
    """
    model.to(device).eval()
    rows = []
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        cells = [cell for example in batch for cell in example.questions]
        asked = [(row, question) for row, cell in enumerate(cells) for question in cell]
        pixel_values, grid_thw = pack([chunk for example in batch for chunk in example.chunks], model.encoder.config)
        words = torch.tensor([[START, TOKEN[question.asked]] for _, question in asked], device=device)
        with mixed_precision(device):
            vision = model.see(pixel_values.to(device), grid_thw, len(batch))
            logits = model.read(vision[torch.tensor([row for row, _ in asked], device=device)], words)[:, -1]
        for (_, question), index in zip(asked, logits.argmax(-1).tolist(), strict=True):
            rows.append((question.asked, question.kind, question.concept, question.answer, WORDS[index]))
    frame = pd.DataFrame(rows, columns=["asked", "kind", "concept", "answer", "given"])
    return frame.assign(correct=frame.answer == frame.given)

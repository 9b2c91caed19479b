"""The training loop of every pre-training stage, on accelerate: rows in a planned order, evaluation on schedule, resume.

The loop knows neither which stage it runs nor where vision comes in: both follow from the rows and the plan it is given.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from tqdm.auto import tqdm

from k25lite.model import K25Lite
from k25lite.training.decoupled import decoupled_backward
from k25lite.training.muonclip import MuonClip
from k25lite.training.schedules import LearningRate, Step, rows_in
from k25lite.vision import MoonViT3DConfig, pack
from k25lite.vision.attention import has_bf16
from k25lite.world.streams import Row

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train, whatever the data.

    Args:
        optimiser: "muonclip" or "adamw".
        trained_scale: of the learning rate, for the parts that come trained (`TRAINED`).
        clip: largest norm of the gradient.
        qk_clip: largest attention logit, for "muonclip"; None does without.
        decoupled: the Decoupled Encoder Process, which keeps no activations of the encoder during the backbone's step.
    """

    learning_rate: LearningRate
    optimiser: Literal["muonclip", "adamw"] = "muonclip"
    weight_decay: float = 0.1
    clip: float = 1.0
    qk_clip: float | None = 100.0
    decoupled: bool = False
    trained_scale: float = 1.0


# The parts of a model that the ViT stage leaves: encoder, projector, and the words it was aligned with.
TRAINED = ("vision_tower", "mm_projector", "language_model.model.embed_tokens")

# How processes may share the work: MuonClip and the checkpoints take every weight to be whole in each.
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass
class History:
    """What training leaves beside the weights.

    Attributes:
        log: one row per step: step, loss (mean cross-entropy per token, in nats), gradient_norm, learning_rate.
        scores: what `evaluate` returned, with the step it was called before; the last step is the number of steps.
    """

    log: pd.DataFrame
    scores: pd.DataFrame

    def save(self, folder: Path) -> None:
        self.log.to_json(folder / "log.json", orient="records", double_precision=15)
        self.scores.to_json(folder / "scores.json", orient="records", double_precision=15)


def train(
    model: K25Lite,
    steps: Sequence[Step],
    rows: Mapping[str, Sequence[Row]],
    recipe: Recipe,
    *,
    evaluate: Callable[[K25Lite], pd.DataFrame] | None = None,
    evaluate_at: Sequence[int] = (),
    checkpoints: Path | None = None,
    checkpoint_every: int = 200,
    trackers: Sequence[str] = (),
    progress: bool = True,
) -> History:
    """Train `model` in place: the rows of `steps`, in that order.

    Under `accelerate launch` each process takes its share of every step's rows; the loss is the mean over the tokens of all
    of them, so that the result does not depend on how many processes there are.

    Args:
        evaluate: called with the model before each step of `evaluate_at` (the number of steps: after the last).
        checkpoints: a folder to resume from, if it holds this very training, and to leave checkpoints in.
        trackers: names of accelerate's trackers ("tensorboard", "wandb") to log to, under `checkpoints`.

    Raises:
        ValueError, before the first step: a step has fewer rows than there are processes, processes hold parts of the
            weights (FSDP), the checkpoint is of another training, or there is no room for checkpoints. OSError: the disk
            filled; the last checkpoint is whole.
    """
    accelerator = Accelerator(
        mixed_precision=precision(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # rows without vision
        log_with=list(trackers) or None,
        project_dir=checkpoints,
    )
    if accelerator.distributed_type not in WHOLE:
        raise ValueError(
            f"each process needs whole weights, which {accelerator.distributed_type.value} does not give it"
        )
    processes, rank = accelerator.num_processes, accelerator.process_index
    if min(map(len, steps)) < processes:
        raise ValueError(f"a step of {min(map(len, steps))} rows cannot be shared by {processes} processes")
    if recipe.decoupled and processes > 1:
        raise ValueError("the decoupled encoder is here in its single-device form; run one process")
    optimiser = make_optimiser(model, recipe)
    wrapped, optimiser = accelerator.prepare(model.train(), optimiser)
    if trackers:
        accelerator.init_trackers("k25lite", config={"optimiser": recipe.optimiser, "peak": recipe.learning_rate.peak})
    saver = None
    if checkpoints:
        data = (row for stream in rows.values() for row in stream)
        saver = Saver(checkpoints, accelerator, fingerprint([asdict(recipe), steps], model, data))
    first, log, scores = saver.resume() if saver else (0, [], [])
    consumed = rows_in(steps)
    for step in tqdm(range(first, len(steps)), leave=False, mininterval=1.0, disable=not progress or rank > 0):
        if evaluate and step in evaluate_at:
            scores += evaluate(model).assign(step=step).to_dict("records")
        mine = [rows[stream][index] for stream, index in steps[step][rank::processes]]
        batch = collate(mine, model.vision_tower.config)
        batch = {n: t if n == "grid_thw" else t.to(accelerator.device) for n, t in batch.items()}
        learning_rate = recipe.learning_rate(consumed[step + 1] / consumed[-1])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        optimiser.zero_grad()
        loss = backward(accelerator, wrapped, batch, recipe.decoupled)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip)
        optimiser.step()
        log.append({"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": learning_rate})
        if trackers:
            accelerator.log({name: float(value) for name, value in log[-1].items()}, step=step)
        if saver and (step + 1) % checkpoint_every == 0 and step + 1 < len(steps):
            saver.save(step + 1, log, scores)
    if evaluate and len(steps) in evaluate_at:
        scores += evaluate(model).assign(step=len(steps)).to_dict("records")
    if trackers:
        accelerator.end_training()
    return History(pd.DataFrame(log).astype(float), pd.DataFrame(scores))


def backward(accelerator: Accelerator, model: torch.nn.Module, batch: Batch, decoupled: bool) -> torch.Tensor:
    """Gradients of the mean loss over the tokens of all processes; returns that loss."""
    labels = batch.pop("labels")
    tokens = accelerator.reduce((labels[:, 1:] != -100).sum())
    # accelerate averages gradients over processes, and the sum is what is wanted.
    scale = accelerator.num_processes / tokens

    def loss_of(**vision: torch.Tensor) -> torch.Tensor:
        text = {name: batch[name] for name in ("input_ids", "position_ids")}
        with accelerator.autocast():
            return next_token_loss(model(**text, **vision).logits, labels) * scale

    vision: Batch = {name: batch[name] for name in ("pixel_values", "grid_thw") if name in batch}
    if decoupled and vision:
        encoder = accelerator.unwrap_model(model)
        loss = decoupled_backward(encoder, vision, loss_of, accelerator.backward, autocast=accelerator.autocast)
    else:
        loss = loss_of(**vision)
        accelerator.backward(loss)
    return accelerator.reduce(loss.detach(), "mean")


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of all labelled tokens, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def collate(rows: Sequence[Row], config: MoonViT3DConfig) -> Batch:
    """Rows as the inputs of `K25Lite`, with labels [rows, context]."""
    names = ("input_ids", "position_ids", "labels")
    batch = {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names}
    if media := [item for row in rows for item in row.media]:
        batch["pixel_values"], batch["grid_thw"] = pack(media, config)
    return batch


def make_optimiser(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    peak, decay = recipe.learning_rate.peak, recipe.weight_decay
    if recipe.optimiser == "muonclip":
        return MuonClip(
            model, peak, decay, qk_clip_threshold=recipe.qk_clip, slow=TRAINED, slow_scale=recipe.trained_scale
        )
    parts: list[dict[str, Any]] = [
        {"params": [], "lr_scale": 1.0},
        {"params": [], "lr_scale": recipe.trained_scale},
    ]
    for name, parameter in model.named_parameters():
        parts[name.startswith(TRAINED)]["params"].append(parameter)
    return torch.optim.AdamW(parts, peak, (0.9, 0.95), weight_decay=decay, fused=True)


def precision() -> Literal["bf16", "no"]:
    """What accelerate calls the precision of a training on its device."""
    return "bf16" if has_bf16(PartialState().device) else "no"


def fingerprint(training: Any, model: K25Lite, rows: Iterable[Row] = ()) -> str:
    """Of a training, as JSON can say it, its data and initial weights, so that no checkpoint of another is taken for it."""
    digest = hashlib.sha256(json.dumps([training, model.config.to_json_string()]).encode())
    for row in rows:
        for array in (row.input_ids, row.position_ids, row.labels, *row.media):
            digest.update(array.tobytes())
    for parameter in model.parameters():  # as bytes, because numpy has no bfloat16
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Saver:
    """Checkpoints of one training: written beside the last one and then moved into its place, so that one is always whole.

    Raises:
        ValueError: no room for two checkpoints.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, fingerprint: str):
        self.folder, self.accelerator, self.fingerprint = folder, accelerator, fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        weights = sum(p.numel() * p.element_size() for model in accelerator._models for p in model.parameters())
        needed = 2 * 3 * weights  # two checkpoints of weights and up to two moments
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ValueError(f"{folder}: checkpoints need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")

    def resume(self) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
        """The step to go on with, the log and the scores so far; from the start if there is no checkpoint.

        Raises:
            ValueError: the checkpoint is of another training.
        """
        last = self.folder / "last"
        if not last.exists():  # none was written, or the process was killed between two renames of `save`
            last = self.folder / "previous"
        if not last.exists():
            return 0, [], []
        state = json.loads((last / "progress.json").read_text())
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{last} is a checkpoint of another model, plan, data or recipe: use another folder, or remove it"
            )
        self.accelerator.load_state(str(last))
        return state["step"], state["log"], state["scores"]

    def save(self, step: int, log: list[dict[str, Any]], scores: list[dict[str, Any]]) -> None:
        """Write the state before `step`. Whatever goes wrong, the last checkpoint stays."""
        partial, last, previous = (self.folder / name for name in ("partial", "last", "previous"))
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            # Not as safetensors, where accelerate warns of the tied weights each time.
            self.accelerator.save_state(str(partial), safe_serialization=False)
            self.accelerator.wait_for_everyone()  # save_state does not: the others may still be writing
            if self.accelerator.is_main_process:
                numbers = [{name: float(value) for name, value in entry.items()} for entry in log]
                state = {"fingerprint": self.fingerprint, "step": step, "log": numbers, "scores": scores}
                (partial / "progress.json").write_text(json.dumps(state))
                if last.exists():
                    shutil.rmtree(previous, ignore_errors=True)
                    last.rename(previous)
                partial.rename(last)
                shutil.rmtree(previous, ignore_errors=True)
        except Exception as error:  # safetensors, pickle and the system each have their own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"{self.folder}: step {step} could not be saved ({error}); the last checkpoint is whole"
            ) from error
        self.accelerator.wait_for_everyone()

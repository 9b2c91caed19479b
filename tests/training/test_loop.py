"""The training loop: it learns, resumes to the bit after a kill, refuses what is not its own, and shares steps exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import DistributedType
from accelerate.tracking import GeneralTracker

from k25lite.training import loop
from k25lite.training.decoupled import decoupled_backward
from k25lite.training.loop import Recipe, Saver, collate, fingerprint, next_token_loss, train
from k25lite.training.schedules import EARLY, LearningRate, plan

RECIPE = Recipe(LearningRate(3e-3))
STEPS = plan(EARLY, 36, 4, 4)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_what_repeats(make_model, rows):
    steps = [[("text", 0), ("vision", 0)]] * 60
    log = train(make_model(), steps, rows, RECIPE, progress=False).log
    assert log.loss.iloc[-1] < 0.5 * log.loss.iloc[0]


@pytest.mark.parametrize("optimiser", ["muonclip", "adamw"])
def test_same_seed_same_bits(make_model, rows, optimiser):
    recipe = Recipe(LearningRate(3e-3), optimiser=optimiser)
    runs = [(model := make_model(1), train(model, STEPS, rows, recipe, progress=False)) for _ in range(2)]
    assert runs[0][1].log.equals(runs[1][1].log)
    assert torch.equal(weights(runs[0][0]), weights(runs[1][0]))


def test_the_loss_is_the_mean_over_tokens_and_never_crosses_documents(make_model, rows):
    """By hand: every document alone, the tokens of its answers, whatever shares its row."""
    model = make_model().eval()
    row = rows["text"][0]
    batch = collate([row], model.vision_tower.config)
    with torch.no_grad():
        packed = next_token_loss(model(batch["input_ids"], position_ids=batch["position_ids"]).logits, batch["labels"])
        starts = [i for i, p in enumerate(row.position_ids) if p == 0] + [row.tokens]
        total = 0.0
        for begin, end in pairwise(starts):
            if end <= begin:
                continue
            ids = torch.from_numpy(row.input_ids[begin:end])[None]
            asked = torch.from_numpy(row.labels[begin + 1 : end] != -100)
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
            total -= float(log_p.gather(1, ids[0, 1:, None])[asked].sum())
    assert float(packed) == pytest.approx(total, rel=1e-5)


def test_the_decoupled_encoder_gives_the_same_gradients(make_model, rows):
    model = make_model()
    batch = collate(rows["vision"], model.vision_tower.config)
    labels = batch.pop("labels")
    vision = {name: batch.pop(name) for name in ("pixel_values", "grid_thw")}

    def loss_of(**vision):
        return next_token_loss(model(**batch, **vision).logits, labels) / 100

    gradients = []
    for items in (None, 1, 3, 1000):
        model.zero_grad()
        if items is None:
            loss_of(**vision).backward()
        else:
            decoupled_backward(model, vision, loss_of, items=items)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(g.abs().sum() > 0 for name, g in gradients[0].items() if name.startswith("vision_tower"))


def test_the_decoupled_encoder_trains_alike(make_model, rows):
    def losses(decoupled):
        recipe = Recipe(LearningRate(3e-3), optimiser="adamw", decoupled=decoupled)
        return train(make_model(), STEPS, rows, recipe, progress=False).log.loss

    pd.testing.assert_series_equal(losses(True), losses(False), rtol=1e-3)


SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from k25lite.model import K25Lite, K25LiteConfig
from k25lite.training.joint import tokenizer
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import EARLY, LearningRate, plan
from k25lite.vision import MoonViT3DConfig
from k25lite.world.families import LiteWorld
from k25lite.world.streams import TEXT_MIX, VISION_MIX, documents, make_rows

out, slow = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
words, world = tokenizer(), LiteWorld(0)
mixes = {"text": (TEXT_MIX, 36), "vision": (VISION_MIX, 4)}
rows = {name: make_rows(documents(world, mix, 0), count, 64, words) for name, (mix, count) in mixes.items()}
torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, kv_lora_rank=16, moe=False)
vision = MoonViT3DConfig.lite(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
model = K25Lite(K25LiteConfig.lite(len(words), vision_config=vision, **small))
steps = plan(EARLY, 36, 4, 4)

def evaluate(model):
    import pandas as pd
    time.sleep(slow)
    print("step", flush=True)
    return pd.DataFrame([{"family": "none", "correct": 0}])

history = train(model, steps, rows, Recipe(LearningRate(3e-3)), evaluate=evaluate, evaluate_at=range(len(steps) + 1),
                checkpoints=out / "checkpoints" if len(sys.argv) < 4 else None, checkpoint_every=2, progress=False)
if torch.distributed.is_initialized() and torch.distributed.get_rank():
    sys.exit()
history.save(out)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save(weights, out / "weights.pt")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def test_killed_and_resumed_is_the_same_to_the_bit(script, tmp_path):
    """Kill -9 somewhere after the third evaluation: the second process goes on from the last checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    subprocess.run([sys.executable, script, whole, "0"], check=True, capture_output=True)
    process = subprocess.Popen([sys.executable, script, cut, "0.2"], stdout=subprocess.PIPE, text=True)
    for _ in range(6):
        process.stdout.readline()
    time.sleep(0.3 * int.from_bytes(os.urandom(1)) / 255)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "weights.pt").exists()
    saved = json.loads((cut / "checkpoints" / "last" / "progress.json").read_text())["step"]
    assert 2 <= saved < len(STEPS)
    again = subprocess.run([sys.executable, script, cut, "0"], check=True, capture_output=True, text=True)
    assert again.stdout.count("step") == len(STEPS) + 1 - saved, "it went on, it did not begin anew"
    for name in ("log.json", "scores.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(torch.load(cut / "weights.pt"), torch.load(whole / "weights.pt"))


def test_two_processes_give_the_loss_of_one(script, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, one, "0", "-"], check=True, capture_output=True, env=environment)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run([*launch, script, two, "0", "-"], check=True, capture_output=True, env=environment)
    alone, shared = (pd.read_json(folder / "log.json", precise_float=True) for folder in (one, two))
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-3)


def test_a_checkpoint_of_another_training_is_refused(make_model, rows, tmp_path):
    train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, checkpoint_every=5, progress=False)
    assert (tmp_path / "last").exists()
    for other in (Recipe(LearningRate(1e-3)), Recipe(LearningRate(3e-3), optimiser="adamw")):
        with pytest.raises(ValueError, match="another model, plan, data or recipe"):
            train(make_model(), STEPS, rows, other, checkpoints=tmp_path, progress=False)
    for model in (make_model(num_hidden_layers=1), make_model(seed=1)):
        with pytest.raises(ValueError, match="another model, plan, data or recipe"):
            train(model, STEPS, rows, RECIPE, checkpoints=tmp_path, progress=False)
    first, *others = rows["vision"]
    changes = ({"labels": first.labels + 1}, {"media": tuple(255 - item for item in first.media)})
    streams = [rows["text"][::-1], *([replace(first, **change), *others] for change in changes)]
    for name, stream in zip(("text", "vision", "vision"), streams, strict=True):
        with pytest.raises(ValueError, match="another model, plan, data or recipe"):
            train(make_model(), STEPS, rows | {name: stream}, RECIPE, checkpoints=tmp_path, progress=False)


def test_a_kill_between_the_two_renames_of_a_checkpoint_loses_nothing(make_model, rows, tmp_path):
    whole = train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, checkpoint_every=4, progress=False)
    (tmp_path / "last").rename(tmp_path / "previous")
    begun = []
    options = {"evaluate": lambda model: begun.append(model) or pd.DataFrame(), "evaluate_at": range(len(STEPS))}
    again = train(
        make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, checkpoint_every=1, progress=False, **options
    )
    assert again.log.equals(whole.log)
    assert len(begun) == len(STEPS) % 4, "it went on, it did not begin anew"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]
    assert json.loads((tmp_path / "last" / "progress.json").read_text())["step"] == len(STEPS) - 1


def test_a_model_in_half_precision_has_a_fingerprint_of_its_own(make_model):
    one, other = (fingerprint("", make_model(seed).bfloat16()) for seed in (0, 1))
    assert one == fingerprint("", make_model(0).bfloat16()) != other


class TwoProcesses:
    """An accelerator whose other process is still writing when `save_state` returns in this one."""

    is_main_process, _models, unwritten = True, (), None

    def save_state(self, folder, **_):
        self.unwritten = Path(folder) / "random_states_1.pkl"
        self.unwritten.parent.mkdir()

    def wait_for_everyone(self):
        if self.unwritten:
            self.unwritten.write_text("")
            self.unwritten = None


def test_a_checkpoint_is_moved_once_every_process_has_written_its_part(tmp_path):
    Saver(tmp_path, TwoProcesses(), "").save(1, [], [])
    assert (tmp_path / "last" / "random_states_1.pkl").exists()


def test_no_room_is_said_before_training_starts(make_model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"checkpoints need .* MB, 0 MB are free"):
        train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, progress=False)


def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(make_model, rows, tmp_path, monkeypatch):
    """A real full disk: writing beyond a limit on file sizes fails in the system call, as on a full disk."""
    import resource

    train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, checkpoint_every=5, progress=False)
    before = (tmp_path / "last" / "progress.json").read_text()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"step 6 could not be saved .* the last checkpoint is whole"):
            train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, checkpoint_every=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "last" / "progress.json").read_text() == before
    assert not (tmp_path / "partial").exists()
    resumed = train(make_model(), STEPS, rows, RECIPE, checkpoints=tmp_path, progress=False)
    assert len(resumed.log) == len(STEPS)


def test_a_step_smaller_than_the_processes_is_refused(make_model, rows, monkeypatch):
    monkeypatch.setattr(loop.Accelerator, "num_processes", 5)
    with pytest.raises(ValueError, match="cannot be shared by 5 processes"):
        train(make_model(), STEPS, rows, RECIPE, progress=False)


def test_processes_that_hold_parts_of_the_weights_are_refused(make_model, rows, monkeypatch):
    monkeypatch.setattr(loop.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="needs whole weights, which FSDP does not give it"):
        train(make_model(), STEPS, rows, RECIPE, progress=False)


class Tracker(GeneralTracker):
    """Stands for TensorBoard and its like: keeps what it is told."""

    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self):
        super().__init__()
        self.config, self.steps, self.finished = {}, [], False

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.steps.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_step(make_model, rows):
    tracker = Tracker()
    log = train(make_model(), STEPS, rows, RECIPE, trackers=[tracker], progress=False).log
    assert tracker.config == {"optimiser": "muonclip", "peak": 3e-3}
    assert tracker.steps == list(enumerate(log.to_dict("records")))
    assert tracker.finished

"""k25lite: the Kimi K2.5 report at a scale that fits one GPU or a laptop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode="markdown")
bench = typer.Typer(no_args_is_help=True, help="Measure k25lite against its peers, side by side in one run.")
app.add_typer(bench, name="bench")
widesearch = typer.Typer(no_args_is_help=True, help="Score answers of the WideSearch benchmark, which are tables.")
app.add_typer(widesearch, name="widesearch")


class Profile(StrEnum):
    smoke = "smoke"
    lite = "lite"
    full = "full"


class Backend(StrEnum):
    openai = "openai"
    local = "local"


class Scoring(StrEnum):
    compatible = "compatible"
    strict = "strict"


@contextmanager
def one_line_errors(*failures: type[Exception]) -> Iterator[None]:
    """Bad input ends in one line on stderr and exit code 2, and `failures` in one with exit code 1; not in a traceback."""
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ModuleNotFoundError, *failures)
    try:
        yield
    except expected as error:
        typer.echo(f"k25lite: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, failures) else 2) from error


@app.command(epilog="Examples: `k25lite reproduce` · `k25lite reproduce 01 --profile full --seeds 5`")
def reproduce(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="Numbers, names or paths; all if none is given.")
    ] = None,
    profile: Annotated[Profile, typer.Option(help="How much to compute.")] = Profile.lite,
    out: Annotated[Path | None, typer.Option(help="Where to write [default: runs/reproduce/PROFILE].")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds [default: the notebook's own].")] = None,
) -> None:
    """Run the notebooks and build the scorecard: the report's numbers beside ours."""
    from k25lite.reproduce import reproduce as run

    with one_line_errors():
        succeeded = run(notebooks or None, profile=profile.value, out=out, seeds=seeds)
    if not succeeded:
        raise typer.Exit(1)


@app.command(epilog="Example: `k25lite record --videos 32 --minutes 1440 --seed 0 --out data/generated/day`")
def record(
    out: Annotated[Path, typer.Option(help="Folder for the videos and their ground truth.")],
    videos: Annotated[int, typer.Option(help="How many files.")] = 4,
    minutes: Annotated[float, typer.Option(help="Footage over all files together.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Same seed, same game.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Games at the same time [default: one per processor].")] = None,
    width: Annotated[int, typer.Option(help="Of the picture, in pixels.")] = 160,
    map_seconds: Annotated[float, typer.Option(help="Game time on a map before the next.")] = 120.0,
    maps: Annotated[
        str | None, typer.Option(help="As in MAP01,MAP05-MAP08,DEATHMATCH [default: all 32, and no scenario].")
    ] = None,
) -> None:
    """Record real game footage with its ground truth. A second call resumes what was cut off."""
    from k25lite.gameplay.doom import parse_maps
    from k25lite.gameplay.record import record as run

    with one_line_errors(RuntimeError):  # the game crashed
        manifest = run(
            out,
            videos=videos,
            minutes=minutes,
            seed=seed,
            workers=workers,
            width=width,
            map_seconds=map_seconds,
            maps=parse_maps(maps) if maps else None,
        )
    typer.echo(f"Recorded: {manifest}")


@app.command(
    epilog="Examples: `k25lite analyze day/ --out analysis --truth day/events.jsonl` · "
    "`k25lite analyze play.mp4 --out analysis --backend openai --model kimi-k2.5 --base-url https://api.moonshot.ai/v1`"
)
def analyze(
    paths: Annotated[list[Path], typer.Argument(help="Videos, and folders of videos.")],
    out: Annotated[Path, typer.Option(help="Folder for the report, events.jsonl and metrics.json.")],
    truth: Annotated[Path | None, typer.Option(help="events.jsonl to score against.")] = None,
    backend: Annotated[Backend, typer.Option(help="The trained detector, or an endpoint.")] = Backend.local,
    model: Annotated[str | None, typer.Option(help="A detector's folder, or a vision model's name.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the endpoint [default: $OPENAI_BASE_URL].")] = None,
    workers: Annotated[int | None, typer.Option(help="Sub-agents at the same time [default: one a core].")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, auto, or local.")] = None,
    max_images: Annotated[int, typer.Option(help="Frames an endpoint is shown at most, retries included.")] = 20_000,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens an endpoint may use.")] = None,
) -> None:
    """Find the events of hours of video by a swarm, and write a report to watch them in. A second call resumes."""
    from k25lite.gameplay.analyze import analyze as run
    from k25lite.gameplay.remote import Budget

    budget = Budget(max_images, max_tokens)
    with one_line_errors(RuntimeError):
        report = run(
            paths,
            out,
            truth=truth,
            backend=backend.value,
            model=model,
            base_url=base_url,
            workers=workers,
            ray=ray,
            budget=budget,
        )
    typer.echo(f"Report: {report}")


@app.command(epilog='Example: `k25lite ask data/generated/day/gameplay_0000.mp4 "is there a boss ?" --at 75`')
def ask(
    video: Annotated[Path, typer.Argument(help="A video of the game.")],
    question: Annotated[str, typer.Argument(help="In the words of its training.")] = "what happens here ?",
    at: Annotated[float, typer.Option(help="Seconds at which the clip of 7 s begins.")] = 0.0,
    model: Annotated[Path | None, typer.Option(help="A model's folder [default: the shipped one].")] = None,
) -> None:
    """Ask K25Lite about a few seconds of play. A question it cannot read ends with the list of those it can."""
    from transformers.utils.logging import disable_progress_bar

    from k25lite.gameplay.questions import CLIP_SECONDS, answer, read_clip
    from k25lite.gameplay.questions_stage import load_answerer
    from k25lite.gameplay.story import clock

    disable_progress_bar()
    with one_line_errors():
        speaker, processor, size = load_answerer(model)
        start, clip = read_clip(video, at, size)
        (said,) = answer(speaker, processor, [clip], [question])
    if said.startswith("00:00:"):  # seconds of the clip
        said = f"at {clock(start + int(said[6:]))}"
    typer.echo(f"{clock(start)} to {clock(start + CLIP_SECONDS)}: {said}")


@app.command(
    epilog='Example: `k25lite swarm "Which moons have ice?" --model kimi-k2.5 --base-url https://api.moonshot.ai/v1`'
)
def swarm(
    question: Annotated[str | None, typer.Argument(help="What to work on; or give --task.")] = None,
    task: Annotated[Path | None, typer.Option(help="A file with the question.")] = None,
    backend: Annotated[Backend, typer.Option(help="An endpoint, or a model in this process.")] = Backend.openai,
    model: Annotated[str, typer.Option(help="Its name at the endpoint, or its folder or Hub id.")] = "kimi-k2.5",
    base_url: Annotated[str | None, typer.Option(help="Of the endpoint [default: $OPENAI_BASE_URL].")] = None,
    tool: Annotated[list[str] | None, typer.Option(help="A Python function, as module:name; may be repeated.")] = None,
    max_parallel: Annotated[int, typer.Option(help="Sub-agents at work at the same time.")] = 16,
    budget: Annotated[int | None, typer.Option(help="Critical steps of the whole run.")] = None,
    trace: Annotated[Path | None, typer.Option(help="JSONL; an unfinished one is resumed.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or auto.")] = None,
) -> None:
    """Have an orchestrator and its sub-agents work on a question: the answer on stdout; a trace and a timeline in files."""
    from k25lite.swarm.command import run

    with one_line_errors(RuntimeError):
        text = task.read_text() if task else question
        if not text:
            raise ValueError("give a question, or --task with a file that holds one")
        result = run(text, backend.value, model, base_url, tool or [], max_parallel, budget, trace, ray)
    typer.echo(result.answer if result.done else f"k25lite: {result.reason}", err=not result.done)
    if not result.done:
        raise typer.Exit(1)


@widesearch.command(
    "score", epilog="Example: `k25lite widesearch score --tasks tasks.jsonl --gold gold --responses responses.jsonl`"
)
def widesearch_score(
    tasks: Annotated[Path, typer.Option(help="JSONL: instance_id, query, language, evaluation.")],
    gold: Annotated[Path, typer.Option(help="Folder with the gold tables, INSTANCE_ID.csv.")],
    responses: Annotated[Path, typer.Option(help="JSONL: instance_id, trial, response.")],
    mode: Annotated[Scoring, typer.Option(help="The public evaluation's numbers, or a reward's.")] = Scoring.compatible,
    json: Annotated[Path | None, typer.Option(help="Write the scores of all trials here.")] = None,
    judge: Annotated[str | None, typer.Option(help="For llm_judge columns: a function, as module:name.")] = None,
    align: Annotated[str | None, typer.Option(help="Maps columns and keys to gold's: module:name.")] = None,
) -> None:
    """Score tables against gold, by rows and by items: avg@N, max@N and min@N over the trials of each task."""
    from k25lite.swarm.tools import plugin
    from k25lite.swarm.widesearch import evaluate, load_responses, load_tasks

    with one_line_errors():
        functions = {role: plugin(name) for role, name in (("judge", judge), ("align", align)) if name}
        report = evaluate(load_tasks(tasks, gold), load_responses(responses), mode.value, **functions)
        typer.echo(report.table())
        if json:
            report.save(json)


Json = Annotated[Path | None, typer.Option(help="Write the measurements here.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda [default: both, where there is a GPU].")]
Quick = Annotated[bool, typer.Option(help="Tiny shapes: does it run? Not for quoting.")]


@bench.command("vision", epilog="Example: `k25lite bench vision --json bench.json`")
def bench_vision(json: Json = None, device: Device = None, quick: Quick = False) -> None:
    """MoonViT3D against transformers' vision tower: same weights, same inputs."""
    _measure("vision", json, device, quick)


@bench.command("training", epilog="Example: `k25lite bench training --json bench.json --device cpu`")
def bench_training(json: Json = None, device: Device = None, quick: Quick = False) -> None:
    """Training against plain PyTorch: loop, language model, decoupled encoder, MuonClip; and how costs grow."""
    _measure("training", json, device, quick)


@bench.command("swarm", epilog="Example: `k25lite bench swarm --json bench.json`")
def bench_swarm(json: Json = None, device: Device = None, quick: Quick = False) -> None:
    """What sub-agents cost beside the model's time, against bare asyncio and public frameworks; and local batching."""
    _measure("swarm", json, device, quick)


@bench.command("video", epilog="Example: `k25lite bench video --json bench.json`")
def bench_video(
    json: Json = None,
    device: Device = None,
    quick: Quick = False,
    footage: Annotated[Path | None, typer.Option(help="What `k25lite record` made [default: an hour].")] = None,
    model: Annotated[Path | None, typer.Option(help="A detector's folder [default: fresh weights].")] = None,
) -> None:
    """Decoding and analysing footage against bare decoding of the same files; and how time and memory grow with hours."""
    _measure("gameplay", json, device, quick, footage=footage, model=model)


def _measure(room: str, json: Path | None, device: str | None, quick: bool, **more: Path | None) -> None:
    """Run the benchmark of a room, show it and write it."""
    from k25lite.bench import Disagreement

    with one_line_errors(Disagreement):
        if json:
            json.parent.mkdir(parents=True, exist_ok=True)
            if json.is_dir():
                raise ValueError(f"--json is a file, and {json} a folder")
            TemporaryFile(dir=json.parent).close()  # can anything be written there? Not to be told after minutes
        report = import_module(f"k25lite.{room}.bench").run(device=device, quick=quick, **more)
        typer.echo(report.table())
        if json:
            report.save(json)

"""Run the notebooks one after another and build the scorecard from what they measured.

Papermill executes each notebook in a kernel of its own and saves the executed copy after every cell, so a notebook that
fails leaves everything up to its failing cell. The rest still run: one broken notebook hides nothing else.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from k25lite import scorecard
from k25lite.results import PROFILES, load


def reproduce(
    notebooks: Sequence[str] | None = None,
    *,
    profile: str = "lite",
    out: Path | None = None,
    seeds: int | None = None,
    root: Path | None = None,
    stream: TextIO | None = None,
) -> bool:
    """Execute notebooks in order and build the scorecard; True if every one ran to its end and left its results.

    notebooks: numbers ("01"), names ("01_moonvit3d") or paths; None means all of `root`/notebooks. root: the checkout;
    by default the working directory if it has notebooks, else the checkout this library lies in. seeds: how many
    (0, 1, ...); None leaves them to the notebook's profile. `out`, by default `root`/runs/reproduce/`profile`, receives
    notebooks/NN_name.ipynb (executed), results/NN_name.json, scorecard.html and scorecard.json, over older ones; the
    scorecard also shows what earlier runs left there of other notebooks of the checkout.
    Progress goes to `stream`, by default standard output. A claim that does not hold is a result, not a failure.
    Raises ValueError, before anything runs, for an unknown notebook or profile, fewer than one seed, or an `out` whose
    copies would fall on the notebooks themselves. Interrupted, it stops its kernel.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"a run needs at least one seed, got {seeds}")
    root = (root or _checkout()).resolve()
    out = Path(out or root / "runs" / "reproduce" / profile).resolve()
    stream = stream or sys.stdout
    selected = select(notebooks, root / "notebooks")
    if any(notebook.parent == out / "notebooks" for notebook in selected):
        raise ValueError(f"the executed copies under {out} would overwrite the notebooks they come from")

    parameters: dict[str, Any] = {"PROFILE": profile}
    if seeds is not None:
        parameters["SEEDS"] = list(range(seeds))
    failures: dict[str, str] = {}
    for notebook in selected:
        results = out / "results" / f"{notebook.stem}.json"
        copy = out / "notebooks" / notebook.name
        failure = _run(notebook, copy, results, parameters, stream)
        if failure:
            failures[notebook.stem] = failure

    shown = {notebook.stem for notebook in selected}  # and what earlier runs left
    shown |= {n.stem for n in _there(root / "notebooks") if (out / "results" / f"{n.stem}.json").exists()}
    html, data = scorecard.build([out / "results" / f"{name}.json" for name in sorted(shown)], out, failures)
    print(f"\n{len(selected) - len(failures)} of {len(selected)} notebooks ran to the end", file=stream)
    for name in failures:
        print(f"  failed: {name}", file=stream)
    print(f"scorecard: {html}\n           {data}", file=stream, flush=True)
    return not failures


def select(wanted: Sequence[str] | None, folder: Path) -> list[Path]:
    """The notebooks meant by `wanted` (numbers, names, paths; None: all in `folder`), each once, sorted by name.

    Raises ValueError naming what exists if one is unknown, or if two share a name and so would share their results.
    """
    there = _there(folder)
    chosen = set(there) if wanted is None else set()
    for word in wanted or ():
        number = word.zfill(2) if word.isdecimal() else None
        matches = [n for n in there if word in (n.stem, n.name) or n.name.partition("_")[0] == number]
        if not matches and word.endswith(".ipynb") and Path(word).is_file():
            matches = [Path(word).resolve()]
        if not matches:
            names = ", ".join(n.stem for n in there) or "none"
            raise ValueError(f"no notebook {word!r}; in {folder} there are: {names}")
        chosen.update(matches)
    if not chosen:
        raise ValueError(f"no notebooks in {folder}")
    for name, count in Counter(n.name for n in chosen).items():
        if count > 1:
            raise ValueError(f"{count} notebooks named {name} would overwrite each other's results")
    return sorted(chosen, key=lambda n: n.name)


def _there(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def _run(notebook: Path, copy: Path, results: Path, parameters: dict[str, Any], stream: TextIO) -> str | None:
    """Execute one notebook and say how it went. Returns what failed, in one line, or None."""
    for stale in (copy, results):  # of an earlier run: it must not pass for this one's
        stale.unlink(missing_ok=True)
        stale.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(notebook.stem, stream)
    before = os.environ.get("K25LITE_STATIC")
    os.environ["K25LITE_STATIC"] = "1"  # kernels inherit it; see k25lite.plots.explore
    try:
        with progress:
            _execute(notebook, copy, parameters | {"OUT": str(results)}, progress)
    except PapermillExecutionError as error:
        failure = f"cell {progress}: {_first_line(f'{error.ename}: {error.evalue}')}"
    except Exception as error:  # a file that is no notebook, a kernel that died: the other notebooks still run
        where = f"cell {progress}: " if progress.number else ""
        failure = where + _first_line(f"{type(error).__name__}: {error}")
    else:
        failure = _fault(results, notebook.stem, parameters["PROFILE"])
    finally:
        del os.environ["K25LITE_STATIC"]
        if before is not None:
            os.environ["K25LITE_STATIC"] = before
    print(f"{notebook.stem}  {'FAILED' if failure else 'done'}  {progress.elapsed}", file=stream)
    if failure:
        print(f"    {failure}", file=stream)
        if copy.exists():
            print(f"    executed copy: {copy}", file=stream)
    stream.flush()
    return failure or None


def _execute(notebook: Path, copy: Path, parameters: dict[str, Any], progress: "Progress") -> None:
    source = nbformat.read(notebook, as_version=4)
    progress.total = sum(not _is_injected(cell) for cell in source.cells)
    papermill.execute_notebook(
        source,
        str(copy).replace("{", "{{").replace("}", "}}"),  # papermill takes a path for a format string
        parameters,
        kernel_name="python3",
        language="python",
        kernel_manager_class=ThisPython,
        on_cell_start=progress.cell_started,
        progress_bar=False,
        cwd=notebook.parent,  # where Jupyter runs it, so that relative paths mean the same
    )


def _fault(results: Path, name: str, profile: str) -> str:
    """What is wrong with the results of a notebook that ran to its end; empty if nothing is."""
    try:
        record = load(results)
    except FileNotFoundError:
        return f"it ran to its end but saved no results to OUT, {results}"
    except ValueError as error:
        return str(error)
    if (record.notebook, record.profile) != (name, profile):
        return f"its results are of {record.notebook!r} at {record.profile!r}, not of {name!r} at {profile!r}"
    return ""


class ThisPython(AsyncKernelManager):
    """Starts kernels in the running interpreter; a registered "python3" may belong to another environment."""

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--log-level=ERROR"]  # a kernel warns that its loopback sockets are not encrypted
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(extra_arguments=quiet))


class Progress:
    """Says which cell of a notebook runs: one line that keeps moving in a terminal, a line per code cell elsewhere."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name, self.stream = name, stream
        self.number = self.total = 0
        self._injected = 0
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._bar = tqdm(file=stream, disable=not stream.isatty(), leave=False, bar_format="{desc}  {elapsed}")

    def __enter__(self) -> None:
        threading.Thread(target=self._tick, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._bar.close()

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def elapsed(self) -> str:
        """Time since the start, as 01:23."""
        return tqdm.format_interval(time.monotonic() - self._started)

    def cell_started(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Take note of a cell, counted from 1 as the author wrote them: the one papermill injects is none of theirs."""
        injected = _is_injected(cell)
        self._injected += injected
        self.number = cell_index + 1 - self._injected
        self._bar.set_description_str(f"{self.name}  cell {self}")
        if self._bar.disable and cell.cell_type == "code" and not injected:
            print(f"{self.name}  cell {self}  {self.elapsed}", file=self.stream, flush=True)

    def _tick(self) -> None:
        while not self._stopped.wait(1):
            self._bar.refresh()  # the clock goes on during a long cell


def _is_injected(cell: nbformat.NotebookNode) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", ())


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0]


def _checkout() -> Path:
    here = Path.cwd()
    return here if (here / "notebooks").is_dir() else Path(__file__).resolve().parent.parent

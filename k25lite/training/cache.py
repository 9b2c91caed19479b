"""The stage cache: what a stage left is kept under a key of its configuration and of the code that made it.

A later notebook finds what an earlier one trained, and a notebook opened alone trains what it needs. Any change to the
module that defines a stage, or to anything of this package that it imports, makes a new key: stale weights are never taken
for fresh ones, and work on a later stage costs no earlier one.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = Path(__file__).resolve().parents[1]


def stages_folder() -> Path:
    """Where stages are kept: $K25LITE_STAGES, else runs/stages of the checkout; of the working directory without one."""
    root = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()
    return Path(os.environ.get("K25LITE_STAGES") or root / "runs" / "stages")


def cached(
    name: str, config: Any, build: Callable[..., None], *, resumes: bool = False, threads: int | None = 1
) -> Path:
    """The folder of a stage, built by `build(folder)` if it is not there yet.

    Two processes may build the same stage at once; the first to finish is kept. A build that fails or is killed leaves
    nothing that would be taken for a stage.

    Args:
        config: everything the outcome depends on beside the code, as JSON can say it.
        resumes: call `build(folder, checkpoints)`; what it leaves in the folder `checkpoints` the next call finds there if
            this one is killed. It is None while another process builds the same stage.
        threads: that torch computes with on a CPU. Their number rounds sums differently, and where a stage is built, alone
            or beside others, shall not change what it learns. None: as many as the caller has.
    """
    folder = stages_folder() / f"{name}-{key(config, Path(inspect.getfile(build)))}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # of processes that train together one alone would get the lock
    with _checkpoints(folder) if resumes and alone else nullcontext() as checkpoints:
        if not folder.exists():  # another process may have finished it by now
            with _threads(threads):
                _build(folder, name, config, partial(build, checkpoints=checkpoints) if resumes else build)
    return folder


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build(folder: Path, name: str, config: Any, build: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(unfinished)
        (unfinished / "stage.json").write_text(json.dumps({"name": name, "config": config}, indent=2))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _checkpoints(stage: Path) -> Iterator[Path | None]:
    """The folder for the checkpoints of a stage, gone once that is there; None if another process holds it."""
    folder = stage.with_name(f".{stage.name}-checkpoints")
    with ExitStack() as stack:
        try:
            import fcntl  # not on Windows

            folder.mkdir(exist_ok=True)
            fcntl.flock(stack.enter_context(open(folder / "lock", "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError):  # held, or just removed with its stage complete, or locks are not to be had here
            yield None
            return
        yield folder
        if stage.exists():
            shutil.rmtree(folder, ignore_errors=True)


def key(config: Any, module: Path) -> str:
    """Of a configuration, the code of a module, and the versions and kind of device that numbers depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    what = [config, code_hash(module), torch.__version__, transformers.__version__, device]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash(module: Path) -> str:
    """Of a module's source and that of all modules of this package that it imports, directly or not."""
    digest = hashlib.sha256()
    for file in sorted(imported(module)):
        digest.update(os.path.relpath(file, PACKAGE).encode() + file.read_bytes())
    return digest.hexdigest()


def imported(module: Path) -> set[Path]:
    """The files of a module and of everything in this package that its import statements lead to."""
    found: set[Path] = set()
    left = [module]
    while left:
        if (file := left.pop()) in found:
            continue
        found.add(file)
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = Path(os.path.relpath(file, PACKAGE.parent)).parts[: -node.level] if node.level else ()
                origin = ".".join([*above, *([node.module] if node.module else [])])
                names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
        for name in names:
            if name.split(".")[0] == PACKAGE.name:
                path = PACKAGE.parent.joinpath(*name.split("."))
                left += [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    return found

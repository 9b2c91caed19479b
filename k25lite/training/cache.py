"""The stage cache: what a stage left is kept under a key of its configuration and of the code that made it.

A later notebook finds what an earlier one trained, and a notebook opened alone trains what it needs. Any change to the
library's models, world or training makes a new key: stale weights are never taken for fresh ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = Path(__file__).resolve().parents[1]
CODE = ("model.py", "processing.py", "vision", "world", "training")  # what can change the outcome of a stage


def stages_folder() -> Path:
    """Where stages are kept: $K25LITE_STAGES, else runs/stages of the checkout."""
    return Path(os.environ.get("K25LITE_STAGES") or PACKAGE.parent / "runs" / "stages")


def cached(name: str, config: Any, build: Callable[[Path], None]) -> Path:
    """The folder of a stage, built by `build(folder)` if it is not there yet.

    Two processes may build the same stage at once; the first to finish is kept. A build that fails or is killed leaves
    nothing that would be taken for a stage.

    Args:
        config: everything the outcome depends on beside the code, as JSON can say it.
    """
    folder = stages_folder() / f"{name}-{key(config)}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(partial)
        (partial / "stage.json").write_text(json.dumps({"name": name, "config": config}, indent=2))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def key(config: Any) -> str:
    """Of a configuration, the code, and the versions and kind of device that numbers depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    what = [config, code_hash(), torch.__version__, transformers.__version__, device]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    digest = hashlib.sha256()
    for name in CODE:
        path = PACKAGE / name
        for file in sorted(path.rglob("[!b]*.py")) if path.is_dir() else [path]:  # benchmarks change no outcome
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()

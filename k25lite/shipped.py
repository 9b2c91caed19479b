"""Where the models lie that come with k25lite: in data/ of a checkout, and inside of the package once it is installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The folder data/`name`: "answerer", "detector" or "subagent"."""
    installed = PACKAGE / "data"
    return (installed if installed.is_dir() else PACKAGE.parent / "data") / name

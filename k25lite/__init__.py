"""The Kimi K2.5 report at a scale that fits one GPU or a laptop: a library to read and import. Start with the notebooks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k25lite.model import K25Lite as K25Lite
    from k25lite.model import K25LiteConfig as K25LiteConfig
    from k25lite.processing import K25LiteProcessor as K25LiteProcessor
    from k25lite.results import Record as Record
    from k25lite.swarm import Orchestrator as Orchestrator
    from k25lite.vision import MoonViT3D as MoonViT3D
    from k25lite.vision import MoonViT3DConfig as MoonViT3DConfig

_HOMES = {
    "K25Lite": "k25lite.model",
    "K25LiteConfig": "k25lite.model",
    "K25LiteProcessor": "k25lite.processing",
    "MoonViT3D": "k25lite.vision",
    "MoonViT3DConfig": "k25lite.vision",
    "Orchestrator": "k25lite.swarm",
    "Record": "k25lite.results",
}
__all__ = ["K25Lite", "K25LiteConfig", "K25LiteProcessor", "MoonViT3D", "MoonViT3DConfig", "Orchestrator", "Record"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `k25lite --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'k25lite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""The Lite World: what the models learn from, generated from a seed. `families` is the way in; `show` draws samples."""

from k25lite.world.scenes import Question, Scene, SceneSpec, draw, sample_scenes

__all__ = ["Question", "Scene", "SceneSpec", "draw", "sample_scenes"]

"""The Lite World: what the models learn from, generated from a seed. So far: scenes of shapes and digits, and clips."""

from k25lite.world.scenes import Question, Scene, SceneSpec, draw, sample_scenes

__all__ = ["Question", "Scene", "SceneSpec", "draw", "sample_scenes"]

"""A world, rows and a model small enough to train in a second."""

import pytest
import torch

from k25lite.model import K25Lite, K25LiteConfig
from k25lite.training.joint import tokenizer
from k25lite.vision import MoonViT3DConfig
from k25lite.world.families import LiteWorld
from k25lite.world.streams import TEXT_MIX, VISION_MIX, documents, make_rows

CONTEXT = 64


@pytest.fixture(scope="session")
def words():
    return tokenizer()


@pytest.fixture(scope="session")
def world():
    return LiteWorld(0)


@pytest.fixture(scope="session")
def rows(words, world):
    mixes = {"text": (TEXT_MIX, 36), "vision": (VISION_MIX, 4)}
    return {name: make_rows(documents(world, mix, 0), count, CONTEXT, words) for name, (mix, count) in mixes.items()}


@pytest.fixture
def make_model(words):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "kv_lora_rank": 16, "moe": False}
        vision = MoonViT3DConfig.lite(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        return K25Lite(K25LiteConfig.lite(len(words), vision_config=vision, **small | changes))

    return make

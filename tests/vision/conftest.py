import pytest
from encoders import randomise

from k25lite.vision import MoonViT3D, MoonViT3DConfig


@pytest.fixture(scope="session")
def lite() -> MoonViT3D:
    model = MoonViT3D(MoonViT3DConfig.lite()).eval()
    randomise(model)
    return model

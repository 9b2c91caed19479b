"""Media in, vision tokens out: files -> patches -> packed sequence -> MoonViT-3D -> projector."""

from k25lite.vision.media import MediaError, VideoChunk, pack, read_image, read_video, video_chunks
from k25lite.vision.moonvit3d import MoonViT3D, MoonViT3DConfig
from k25lite.vision.projector import Projector

__all__ = [
    "MediaError",
    "MoonViT3D",
    "MoonViT3DConfig",
    "Projector",
    "VideoChunk",
    "pack",
    "read_image",
    "read_video",
    "video_chunks",
]

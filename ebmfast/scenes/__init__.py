"""Rendered scenes with one object: generate a data set, or read one without the renderer."""
from .dataset import TEST, TRAIN, SceneConfig, SceneData, draw_scene, folder_of, generate, load
from .render import COLORS, SHAPES, SIZE_RANGE, Scene, render

__all__ = [
    "COLORS", "SHAPES", "SIZE_RANGE", "TEST", "TRAIN", "Scene", "SceneConfig", "SceneData",
    "draw_scene", "folder_of", "generate", "load", "render",
]

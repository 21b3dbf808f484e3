"""Rendered scenes of objects on a floor: generate a data set, or read one without the renderer."""
from .dataset import ObjectsData, SceneConfig, SceneData, draw_scene, folder_of, generate, load
from .render import COLORS, COLORS_20, SHAPES, SIZE_RANGE, Scene, Thing, render
from .sets import HELD_OUT, OBJECTS, SETS, TEST, TRAIN, at_resolution, command_of, named

__all__ = [
    "COLORS", "COLORS_20", "HELD_OUT", "OBJECTS", "SETS", "SHAPES", "SIZE_RANGE", "TEST", "TRAIN", "ObjectsData", "Scene",
    "SceneConfig", "SceneData", "Thing", "at_resolution", "command_of", "draw_scene", "folder_of", "generate", "load", "named",
    "render",
]

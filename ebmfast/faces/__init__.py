"""Faces in CelebA's layout: a reader of the official files, and schematic faces drawn in the same layout."""
from .celeba import ATTRIBUTES, CelebA, CelebAError, FaceData
from .draw import Face, draw_face, write_faces

__all__ = ["ATTRIBUTES", "CelebA", "CelebAError", "Face", "FaceData", "draw_face", "write_faces"]

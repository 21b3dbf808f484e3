"""Samplers: each describes its chain and binds to an evaluator and a backend as `init` and `step`."""

from .annealed import Annealed
from .langevin import Langevin

__all__ = ["Annealed", "Langevin"]

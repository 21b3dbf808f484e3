"""Samplers: each describes its chain and binds to an evaluator and a backend as `init` and `step`."""

from .annealed import Annealed
from .hmc import HMC
from .langevin import Langevin
from .mala import MALA

SAMPLERS = (Annealed, HMC, Langevin, MALA)
Sampler = Annealed | HMC | Langevin | MALA

__all__ = ["HMC", "MALA", "SAMPLERS", "Annealed", "Langevin", "Sampler"]

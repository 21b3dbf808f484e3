"""Samplers: each describes its chain and binds to an evaluator and a backend as `init` and `step`."""

from .annealed import Annealed
from .baoab import BAOAB
from .hmc import HMC
from .langevin import Langevin
from .mala import MALA
from .warmup import DualAveraging

SAMPLERS = (Annealed, BAOAB, HMC, Langevin, MALA)
Sampler = Annealed | BAOAB | HMC | Langevin | MALA

__all__ = ["BAOAB", "HMC", "MALA", "SAMPLERS", "Annealed", "DualAveraging", "Langevin", "Sampler"]

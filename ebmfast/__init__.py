"""ebmfast: fast, reproducible sampling of composed energy-based models.

    import ebmfast as ef

    red, cube = ef.Concept(color_net, [1, 0, 0], "red"), ef.Concept(shape_net, [0, 1], "cube")
    r = ef.sample(red & ~cube, n=64, shape=(3, 32, 32), sampler=ef.Langevin(step_size=1e-3), steps=200, seed=0)

p(x) ∝ exp(-E(x)); `a & b` adds energies, `a | b` is -logsumexp(-E), `~b` subtracts α·E.
"""

from . import diagnostics, energies, images, inference, ops, zoo
from .branches import DrawBranches, log_partition, root_branches
from .calibration import Calibration, calibrate
from .composition import (
    Calibrated,
    Concept,
    Expression,
    Family,
    Slot,
    UngroundedNegationError,
    all_of,
    any_of,
    from_json,
    negate,
    with_prior,
    without,
)
from .coupling import CoupledError
from .driver import StepInfo
from .expressions import parse
from .generate import load_dataset
from .inference import ConditionSamples, Inference, infer
from .samplers import BAOAB, HMC, MALA, Annealed, DualAveraging, Langevin
from .sampling import Run, prepare, sample
from .state import Fault, Interrupted, NonFiniteError, Report, Result, RunawayError, SampleState, Trace, TraceResult
from .weights import AboveSigma, PiecewiseSigma

__version__ = "0.1.0"

__all__ = [
    "BAOAB", "HMC", "MALA", "AboveSigma", "Annealed", "Calibrated", "Calibration", "Concept", "ConditionSamples",
    "CoupledError", "DrawBranches", "DualAveraging", "Expression", "Family", "Fault", "Inference", "Interrupted", "Langevin",
    "NonFiniteError", "PiecewiseSigma", "Report", "Result", "Run", "RunawayError", "SampleState", "Slot", "StepInfo", "Trace",
    "TraceResult", "UngroundedNegationError", "all_of", "any_of", "calibrate", "diagnostics", "energies", "from_json",
    "images", "infer", "inference", "load_dataset", "log_partition", "negate", "ops", "parse", "prepare", "root_branches", "sample",
    "with_prior", "without", "zoo",
]

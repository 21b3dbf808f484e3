"""Training: denoising score matching for noise-conditional energies of one concept each."""
from .score_matching import NoiseLevels, contrast, draw_candidates, score_error
from .trainer import DivergenceError, TrainConfig, Trainer, validation_error

__all__ = [
    "DivergenceError", "NoiseLevels", "TrainConfig", "Trainer", "contrast", "draw_candidates", "score_error",
    "validation_error",
]

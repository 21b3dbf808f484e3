"""Training: denoising score matching for noise-conditional energies, contrastive divergence for energies without noise level."""
from .contrastive import ContrastiveConfig, ContrastiveTrainer, ReplayBuffer
from .loop import DivergenceError, Loop
from .score_matching import NoiseLevels, contrast, draw_candidates, ratio_gradient, score_error
from .trainer import Frozen, TrainConfig, Trainer, validation_error

__all__ = [
    "ContrastiveConfig", "ContrastiveTrainer", "DivergenceError", "Frozen", "Loop", "NoiseLevels", "ReplayBuffer", "TrainConfig",
    "Trainer", "contrast", "draw_candidates", "ratio_gradient", "score_error", "validation_error",
]

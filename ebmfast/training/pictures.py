"""Grids of samples while a model trains."""
from __future__ import annotations

from pathlib import Path

from torch import Tensor


def grid_writer(conditions: Tensor, resolution: int, noise_levels: bool, columns: int = 8, rows: int = 2):
    """A callback for `Loop`: samples of the averaged model under the first conditions [N, C], written as `samples-ITERATION.png`.

    The conditions stay the same, so the pictures of a run can be compared. Models with noise levels are annealed; for others
    the chains start from uniform noise and take twice the steps of training.
    """
    from ..evaluation import save_grid

    shown = conditions[:columns * rows].float()

    def write(trainer) -> None:
        cfg, model = trainer.config, trainer.averaged()
        if noise_levels:
            x = draw(model, shown, resolution, cfg.levels.low, cfg.levels.high)
        else:
            model = model.folded() if hasattr(model, "folded") else model
            x = 2.0 * descend(model, shown, resolution, 2 * cfg.steps, cfg.drift, cfg.noise, cfg.gradient_clip) - 1.0
        save_grid(x, Path(trainer.folder) / f"samples-{trainer.iteration:06d}.png", columns, max(1, 96 // resolution))

    return write


def draw(model, conditions: Tensor, resolution: int, low: float, high: float, seed: int = 0) -> Tensor:
    """One sample [N, 3, R, R] in [-1, 1] of a noise-conditional model under each condition [N, C], on the CPU."""
    from ..samplers import Annealed

    return _sample(model, conditions, resolution, Annealed.geometric(high, low, 16, steps_per_level=4), seed, sigma=(low, high))


def descend(model, conditions: Tensor, resolution: int, steps: int, drift: float, noise: float, clip: float | None,
            seed: int = 0) -> Tensor:
    """One sample [N, 3, R, R] in [0, 1] of a model without noise level under each condition [N, C], on the CPU."""
    from ..samplers import Langevin

    return _sample(model, conditions, resolution, Langevin.reference_code(drift, noise, grad_clip_value=clip), seed, steps)


def _sample(model, conditions, resolution, sampler, seed, steps=None, sigma=None) -> Tensor:
    from ..composition import Family, Slot
    from ..sampling import sample

    device = next(model.parameters()).device
    expression = Family(model, "model", condition_dim=conditions.shape[1], sigma=sigma)[Slot("c")]
    result = sample(expression, n=len(conditions), shape=(3, resolution, resolution), sampler=sampler, steps=steps,
                    conditions={"c": conditions.to(device)}, seed=seed, energies=False, device=device)
    return result.x.cpu()

"""Grids of samples while a model trains."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def grid_writer(conditions: Tensor, resolution: int, columns: int = 8, rows: int = 2):
    """A callback for `Loop`: samples of the averaged model under the first conditions [N, C], written as `samples-ITERATION.png`.

    The conditions stay the same, so the pictures of a run can be compared.
    """
    from ..evaluation import save_grid

    shown = conditions[:columns * rows].float()

    def write(trainer) -> None:
        x = draw(trainer.averaged(), shown, resolution, trainer.config.levels.low, trainer.config.levels.high)
        save_grid(x, Path(trainer.folder) / f"samples-{trainer.iteration:06d}.png", columns, max(1, 96 // resolution))

    return write


def draw(model, conditions: Tensor, resolution: int, low: float, high: float, seed: int = 0) -> Tensor:
    """One sample [N, 3, R, R] of a noise-conditional model under each condition [N, C], on the CPU."""
    from ..composition import Family, Slot
    from ..samplers import Annealed
    from ..sampling import sample

    device = next(model.parameters()).device
    expression = Family(model, "model", condition_dim=conditions.shape[1], sigma=(low, high))[Slot("c")]
    sampler = Annealed.geometric(high, low, 16, steps_per_level=4)
    result = sample(expression, n=len(conditions), shape=(3, resolution, resolution), sampler=sampler,
                    conditions={"c": conditions.to(device)}, seed=seed, energies=False, device=device)
    return torch.as_tensor(result.x).cpu()

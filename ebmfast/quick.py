"""Short calls of a prepared run: a training loop that asks for its negatives thousands of times.

A call in the chain engine, from a given start, with nothing to watch on the way, costs little beyond its arithmetic:
everything that stays the same was settled by the first call. Whatever is not plain, or not right, is left to the
general path, which says what is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from . import rng
from ._native import core
from .chain import Chain
from .driver import CHECK_EVERY
from .samplers.langevin import ChainKernel
from .samplers.metropolis import Metropolis
from .state import Result, SampleState

_CPU = torch.device("cpu")


class QuickCall:
    """One call of `run` with `steps` steps, in the chain engine `chain`."""

    def __init__(self, run, chain: Chain, shape: tuple[int, ...], steps: int):
        self._run, self._chain, self._shape, self._steps = run, chain, shape, steps
        self._coefficients = run.sampler.coefficients(run.plan.expression, steps)
        self._drift, self._noise = self._coefficients.float32
        self._slots = run.plan.expression.slots
        self._metropolis = isinstance(run.sampler, Metropolis)
        self._bounds = run.sampler.bounds if self._metropolis else None
        # Longer calls have to listen for Ctrl-C on the way.
        self._most = chain.steps_within(ChainKernel.PATIENCE, 1) // max(steps, 1)

    @staticmethod
    def fits(run, chain: Chain | None, steps: int) -> bool:
        """Whether calls of `run` with `steps` steps can be quick ones.

        Where a sampler knows energies, a call that is long enough for a chain to run away is watched, and one that warms up
        has two parts: both are for the general path.
        """
        sampler = run.sampler
        if isinstance(sampler, Metropolis) and (sampler.warmup is not None or not 0 < steps <= CHECK_EVERY):
            return False
        return type(chain) is Chain and sampler.fixed_schedule and sampler.noise_levels() is None

    def __call__(self, n: int | None, seed, conditions: Mapping | None, x: Tensor, first_chain: int) -> Result | None:
        """The result, or None where the general path has to look at the arguments."""
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.device != _CPU or x.shape[1:] != self._shape:
            return None
        rows = x.shape[0]
        if not x.is_contiguous() or rows > self._most or (n is not None and n != rows) or torch.is_inference_mode_enabled():
            return None
        if type(first_chain) is not int or not 0 <= first_chain <= rng.MAX_CHAINS - rows:
            return None
        rows_of = self._conditions(conditions, rows)
        if rows_of is None or not core.all_finite(x.data_ptr(), x.numel()) or not self._inside(x):
            return None
        chain, faults = self._chain, torch.zeros(rows, dtype=torch.int64, device=_CPU)
        out = x.detach().clone() if x.requires_grad else x.clone()
        with chain.lock:
            if not chain.refresh():
                return None
            seed = rng.resolve_seed(seed)
            began = time.perf_counter()
            accepted, more = self._decisions(rows) if self._metropolis else (None, {})
            fine = chain.run(
                out, faults, rows_of, self._drift, self._noise, None, step=0, seed=seed, first_chain=first_chain, **more)
            energy, leaf_energies = self._energies(out, rows_of) if fine and self._run.energies else (None, None)
        if not fine or (energy is not None and not core.all_finite(leaf_energies.data_ptr(), leaf_energies.numel())):
            return self._run(rows, seed, steps=self._steps, conditions=conditions, x=x, first_chain=first_chain, quick=False)
        seconds, threads, isa = time.perf_counter() - began, torch.get_num_threads(), core.isa()

        def state() -> SampleState:
            step = torch.full((rows,), self._steps, dtype=torch.int64, device=_CPU)
            return SampleState(out, step, faults, seed, first_chain, 0, self._steps, dict(zip(self._slots, rows_of)))

        def report():
            info = {"backend": "cpu", "isa": isa, "threads": threads}
            return self._run.describe(
                backend="cpu", info=info, engine="chain", device=_CPU, dtype=torch.float32, seed=seed, first_chain=first_chain,
                chains=rows, steps=self._steps, batch=rows, seconds=seconds, coefficients=self._coefficients, faults=())

        acceptance = None if accepted is None else accepted[0] / self._steps
        return Result(out, energy, leaf_energies, None, state, report, acceptance)

    def _decisions(self, rows: int) -> tuple[Tensor, dict]:
        """Rows for the number of proposals accepted and for energies, and what the engine has to know of them."""
        results = torch.zeros(2, rows, dtype=torch.float32, device=_CPU)
        at = results.data_ptr()
        return results, {"accepted": at, "energies": at + 4 * rows, "stream": self._run.sampler.stream, "accept_stream": rng.ACCEPT}

    def _inside(self, x: Tensor) -> bool:
        """Whether chains start within the bounds, where there are any."""
        if self._bounds is None or not x.numel():
            return True
        low, high = torch.aminmax(x.detach())
        return self._bounds[0] <= float(low) and float(high) <= self._bounds[1]

    def _conditions(self, conditions: Mapping | None, rows: int) -> list[Tensor] | None:
        if not self._slots:
            return None if conditions else []
        if conditions is None or len(conditions) != len(self._slots):
            return None
        found = []
        for slot in self._slots:
            c = conditions.get(slot)
            plain = type(c) is Tensor and c.dtype is torch.float32 and c.device == _CPU and c.is_contiguous()
            if not plain or c.shape != (rows, self._chain.widths[slot]) or not core.all_finite(c.data_ptr(), c.numel()):
                return None
            found.append(c.detach().clone())  # a state that resumes must not follow what becomes of the caller's buffer
        return found

    def _energies(self, x: Tensor, conditions: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            columns = self._chain.energies(x, conditions)
            return self._run.plan.program.evaluate(columns), torch.stack(columns, 1)

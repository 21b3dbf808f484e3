"""What a call of a sampler hands back: results, reports, traces, and states that resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._checks import positive_integer
from .diagnostics import Diagnostics

FORMAT = "ebmfast-state-1"


class Fault(NamedTuple):
    """A chain that was stopped: its id, the step, the leaf to blame (or None), and why.

    `reason` is "non-finite", of an energy or a state, or "ran away": its energy fell without end (`ebmfast.guard`).
    """

    chain: int
    step: int
    leaf: str | None
    reason: str = "non-finite"


class NonFiniteError(ArithmeticError):
    """Chains became non-finite. `faults` lists them; `chains`, `step` and `leaf` are those of the first."""

    def __init__(self, faults: list[Fault], what: str):
        self.faults = faults
        self.chains = [f.chain for f in faults]
        self.step, self.leaf = faults[0].step, faults[0].leaf
        shown = ", ".join(map(str, self.chains[:8])) + (", ..." if len(faults) > 8 else "")
        blame = f"the concept {self.leaf}" if self.leaf else "no single concept (the step may be too large)"
        super().__init__(
            f"non-finite {what} in {len(faults)} chain(s) [{shown}], first at step {self.step}, from {blame}."
            ' Take smaller steps or clip gradients, or pass on_nonfinite="freeze" or "restart"')


class RunawayError(NonFiniteError):
    """Chains ran away: their energy falls without end. `faults` lists all that were stopped."""

    def __init__(self, faults: list[Fault], what: str = ""):
        super().__init__(faults, what)
        ran = [f for f in faults if f.reason == "ran away"]
        shown = ", ".join(str(f.chain) for f in ran[:8]) + (", ..." if len(ran) > 8 else "")
        self.args = (
            f"{len(ran)} chain(s) [{shown}] ran away, first seen at step {ran[0].step}: the energy falls without end, ever more"
            " steeply, so the composition has no normalisable density there. Ground the negation (a smaller `alpha`, or a"
            " positive concept that outweighs it far out), or bound the domain: `bounds=(low, high)` with MALA and HMC,"
            ' `clamp=(low, high)` with Langevin; or pass on_nonfinite="freeze" or "restart"',)


class Interrupted(KeyboardInterrupt):
    """Sampling was interrupted; `state` holds every chain where it stood. Pass it as `resume=`."""

    def __init__(self, state: SampleState):
        self.state = state
        done = int((state.step >= state.target).sum())
        then = ("error.state.x has the samples" if state.finished else
                "to go on: save error.state with .save(path), and call sample(..., resume=error.state) with the same"
                " arguments")
        super().__init__(f"interrupted with {done} of {len(state.step)} chains finished; {then}")


@dataclass(frozen=True)
class Trace:
    """What to keep while chains run: every `every` steps, the energy per chain, and the states if asked.

    Each kept step costs one forward pass (MALA and HMC know their energies); states cost memory. `diagnostics` follows how
    chains mix without keeping anything but moments (`TraceResult.diagnostics`): of the energy, and of every element of x or
    of `summary(x)` `[B, *S]` → `[B, Q]`, for instance a few features of pictures; it costs 7·Q float64 numbers per chain.
    """

    every: int = 1
    energy: bool = True
    states: bool = False
    diagnostics: bool = False
    summary: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self):
        object.__setattr__(self, "every", positive_integer(self.every, "`every`"))
        if self.summary is not None and not self.diagnostics:
            raise ValueError("`summary` belongs to diagnostics=True")


@dataclass
class TraceResult:
    """`steps` `[T]` (counted from the chain's first), `energy` `[T, n]` and `x` `[T, n, *S]`, or None.

    `diagnostics` are those of this call's draws, of chains without a fault; None where they were not asked for, or for
    fewer than 4 draws, or where an interrupt left chains at different steps.
    """

    steps: torch.Tensor
    energy: torch.Tensor | None
    x: torch.Tensor | None
    diagnostics: Diagnostics | None = None
    moments: tuple = field(default=(), repr=False, compare=False)  # what diagnostics are made of: streams, shape

    def arviz(self) -> dict[str, dict[str, np.ndarray]]:
        """What was kept as `arviz.from_dict` takes it (`**` of it before ArviZ 1.0): groups of arrays `[chain, draw, ...]`."""
        kept = {"energy": self.energy, "x": self.x}
        posterior = {k: v.transpose(0, 1).detach().cpu().numpy() for k, v in kept.items() if v is not None}
        groups = {"posterior": posterior}
        return groups | {"sample_stats": {"lp": -posterior["energy"]}} if "energy" in posterior else groups


@dataclass
class SampleState:
    """Everything that a later call needs to continue these chains bit for bit.

    x `[n, *S]`; step `[n]`, the step each chain takes next; faults `[n]`, 0 where a chain runs; the seed and
    the first chain's id, which fix the noise; `base` and `target`, first and last step of the call it is from; `extra`,
    what else the sampler carries from step to step, `[n, ...]` each: momenta, what a warm-up has learnt.
    """

    x: torch.Tensor
    step: torch.Tensor
    faults: torch.Tensor
    seed: int
    first_chain: int = 0
    base: int = 0
    target: int = 0
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every chain reached `target`."""
        return bool((self.step >= self.target).all())

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, to a temporary file first, then in place of `path`."""
        path = Path(path)
        tensors = {"x": self.x, "step": self.step, "faults": self.faults}
        for group in ("conditions", "extra"):
            tensors |= {f"{group}.{name}": rows for name, rows in getattr(self, group).items()}
        numbers = {k: getattr(self, k) for k in ("seed", "first_chain", "base", "target")}
        metadata = {"format": FORMAT, "state": json.dumps(numbers)}
        partial = path.with_name(path.name + ".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> SampleState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a saved state.
        """
        try:
            with safe_open(str(path), "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a saved state: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved state: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        conditions, extra = ({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                             for prefix in ("conditions.", "extra."))
        return cls(tensors["x"], tensors["step"], tensors["faults"], conditions=conditions, extra=extra,
                   **json.loads(metadata["state"]))


@dataclass
class Report:
    """What ran. `str(report)` is a line for people; the fields are for manifests."""

    expression: str
    sampler: str
    backend: str
    backend_info: Mapping[str, object]
    device: str
    dtype: str
    compute_dtype: str
    seed: int
    first_chain: int
    chains: int
    steps: int
    micro_batch: int
    seconds: float
    step_scale: str
    effective_temperature: tuple[float, float]
    versions: Mapping[str, str]
    captured: bool = False  # steps, or gradients of samplers other than Langevin, were replayed from a recording
    uncaptured: str | None = None  # why not
    gpu: str | None = None  # the name of its model
    tf32: tuple[str, ...] = ()  # "matmul" and "conv": whose float32 factors torch might round to TF32
    halved_from: int | None = None  # the micro-batch with which memory was out
    engine: str = "step"
    models: str = ""
    faults: list[Fault] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        """Steps of all chains together, per second."""
        return self.chains * self.steps / self.seconds if self.seconds > 0 else 0.0

    def __str__(self):
        low, high = self.effective_temperature
        heat = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        reasons = Counter(f.reason for f in self.faults)
        faults = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
        machine = [self.device, *filter(None, [self.gpu])] + [f"TF32 in {' and '.join(self.tf32)}"] * bool(self.tf32)
        where = f"{self.backend} ({self.engine} engine, {', '.join(machine)})"
        return (f"{self.chains} chains x {self.steps} steps on {where} in {self.seconds:.2f} s,"
                f" {self.steps_per_second:,.0f} chain steps/s, micro-batch {self.micro_batch}, seed {self.seed},"
                f" effective temperature {heat}{faults}")


class Result:
    """What a call returns.

    Attributes:
        x: final states `[n, *S]`.
        energy, leaf_energies: `[n]` and `[n, K]`, None with energies=False.
        trace: a `TraceResult`, or None.
        acceptance: `[n]`, the share of proposals that a chain accepted, after its warm-up where it had one; None for samplers
            that accept every step.
        step_size: `[n]`, the step sizes that chains adapted in a warm-up, as of the last step; None where they did not.
        branch: `[n]`, the branch of the OR at the root that a chain drew (branches="draw"), else None.
        state: a `SampleState` that resumes; its x is this one.
        report: a `Report` of what ran.

    `state` and `report` may be given as functions; they are made when they are first asked for.
    """

    def __init__(self, x: torch.Tensor, energy: torch.Tensor | None, leaf_energies: torch.Tensor | None, trace: TraceResult | None,
                 state: SampleState | Callable[[], SampleState], report: Report | Callable[[], Report],
                 acceptance: torch.Tensor | None = None, branch: torch.Tensor | None = None,
                 step_size: torch.Tensor | None = None) -> None:
        self.x, self.energy, self.leaf_energies, self.trace = x, energy, leaf_energies, trace
        self.acceptance, self.branch, self.step_size = acceptance, branch, step_size
        self._state, self._report = state, report

    @property
    def state(self) -> SampleState:
        """Where every chain stands; `sample(..., resume=r.state)` goes on."""
        if callable(self._state):
            self._state = self._state()
        return self._state

    @property
    def report(self) -> Report:
        """What ran."""
        if callable(self._report):
            self._report = self._report()
        return self._report

    def __getstate__(self):
        return vars(self) | {"_state": self.state, "_report": self.report}

    def __repr__(self):
        return f"Result(x={list(self.x.shape)}, {self.report})"

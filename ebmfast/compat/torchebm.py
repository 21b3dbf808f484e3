"""The samplers of torchebm 0.8 over ebmfast's engines: `from ebmfast.compat.torchebm import LangevinDynamics` is the change.

Signatures, defaults, shapes, diagnostics and schedulers are those of torchebm 0.8, and so are the laws of the chains:

    x <- clamp( x - η ∇E(x) + σ √(2η) z ),   z ~ N(0, I)

Noise is ebmfast's: a pure function of a seed drawn from `generator` (or from torch's global one), the chain, the step and
the element, so a chain is the same in any batch. Models may be torchebm's, any `nn.Module` or a function of x; those
without a `gradient` are differentiated. Native energies (`ebmfast.energies`, `nn.Sequential` of Linear and activations,
torchebm's Gaussian, double well, harmonic, Rosenbrock and Styblinski-Tang models) run whole chains in the chain engine.

What no engine takes runs in a plain loop over torch operations, and a warning says so once: energies that couple the
batch, schedulers inside the model that change it from step to step, mixed precision, dtypes below float32, and chains
that are not finite, which go on as NaN there, as in torchebm. Options that torchebm itself ignores, or that have no
counterpart here, raise.

With torchebm installed, the samplers are subclasses of its `BaseSampler`, so that its losses and trainers take them.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import sampling
from ..composition import Concept
from ..rng import resolve_seed
from ..samplers import HMC, Langevin
from ..state import NonFiniteError, Trace
from ._leaf import Called, Twin, couples, is_native, twin

try:
    import torchebm as _torchebm
except ModuleNotFoundError as _missing:
    if _missing.name != "torchebm":
        raise
    _torchebm = None
    from ._bare import BaseSampler, ConstantScheduler, Schedulable
else:
    from torchebm.core import BaseModel, BaseSampler, ConstantScheduler, Schedulable

__all__ = ["SUPPORTED", "HamiltonianMonteCarlo", "LangevinDynamics"]

SUPPORTED = "0.8"  # the torchebm whose contract this is; tested against 0.8.9
WHOLE = 1 << 62  # chains per micro-batch where the batch must not be cut
KEPT_BYTES = 32 << 20  # states held at a time for diagnostics
PREPARED = 16  # runs kept per sampler
Model = Callable[..., Tensor]
Scheduled = Any  # a number, or a scheduler
Samples = Tensor | tuple[Tensor, dict[str, Tensor]]
ELSEWHERE = ("RiemannianManifoldHMC", "GradientDescentSampler", "NesterovSampler", "FlowSampler")

if _torchebm is not None and not _torchebm.__version__.startswith(f"{SUPPORTED}."):
    warnings.warn(f"ebmfast.compat.torchebm follows torchebm {SUPPORTED}; installed is {_torchebm.__version__}, whose contract may"
                  " differ", stacklevel=2)


def __getattr__(name: str):
    if name in ELSEWHERE:
        raise ImportError(f"{name} has no counterpart in ebmfast: import it from torchebm.samplers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Unfit(Exception):
    """Why no engine takes the values of a schedule."""


class _Runs:
    """What a sampler has prepared; a copy of the sampler prepares anew."""

    def __init__(self):
        self.lock = threading.RLock()
        self.called: Called | None = None
        self.twin: Twin | None = None
        self.native: dict[tuple[int, ...], bool] = {}  # by shape: whether the model itself is a native energy
        self.uncoupled: set = set()  # modes of the model in which its rows were seen not to be coupled
        self.said: set[str] = set()
        self.prepared: OrderedDict[tuple, tuple[sampling.Run, list]] = OrderedDict()

    def __deepcopy__(self, memo):
        return _Runs()

    def __reduce__(self):
        return _Runs, ()

    def run(self, key: tuple, prepare: Callable[[list], sampling.Run]) -> tuple[sampling.Run, list]:
        """The run of that key, and the list that its schedules read."""
        if key not in self.prepared:
            schedules: list = []
            self.prepared[key] = prepare(schedules), schedules
            if len(self.prepared) > PREPARED:
                self.prepared.popitem(last=False)
        self.prepared.move_to_end(key)
        return self.prepared[key]


class _Kept:
    """The trajectory and the diagnostics of a call, filled from states kept every `thin` steps."""

    def __init__(self, x: Tensor, n_steps: int, thin: int, trajectory: bool, diagnostics: bool, acceptance: bool):
        self.thin, self.count, self.filled = thin, n_steps // thin, 0
        plain = {"dtype": x.dtype, "device": x.device}
        self.trajectory = torch.empty(len(x), self.count, *x.shape[1:], **plain) if trajectory else None
        self.diagnostics: dict[str, Tensor] | None = None
        if diagnostics:
            self.diagnostics = {name: torch.empty(self.count, *x.shape[1:], **plain) for name in ("mean", "var")}
            self.diagnostics["energy"] = torch.empty(self.count, **plain)
            if acceptance:
                self.diagnostics["acceptance_rate"] = torch.empty(self.count, **plain)

    @property
    def wanted(self) -> bool:
        """Whether states on the way are needed at all."""
        return self.trajectory is not None or self.diagnostics is not None

    def add(self, x: Tensor, energy: Tensor | None, accepted: Tensor | None = None) -> None:
        """States `[T, n, *S]`, their energies `[T, n]`, and the shares of proposals that were accepted, `[T]`."""
        now = slice(self.filled, self.filled + len(x))
        self.filled = now.stop
        if self.trajectory is not None:
            self.trajectory[:, now] = x.transpose(0, 1)
        if self.diagnostics is None:
            return
        alone = x.shape[1] == 1
        self.diagnostics["mean"][now] = x.mean(1)
        self.diagnostics["var"][now] = 0.0 if alone else x.var(1, unbiased=False).clamp_(1e-10, 1e10)
        self.diagnostics["energy"][now] = energy.mean(1)
        if accepted is not None:
            self.diagnostics["acceptance_rate"][now] = accepted

    def output(self, x: Tensor):
        """What `sample` returns, `x` the final states."""
        found = x if self.trajectory is None else self.trajectory
        return found if self.diagnostics is None else (found, self.diagnostics)


class _Sampler(BaseSampler):
    """What both samplers have in common: which engine takes a call, schedules, and what is kept."""

    _needs_energies: bool  # whether energies decide about the next state
    _schedules: tuple[str, ...]  # names of the values that a scheduler decides

    def __init__(self, model, dtype: torch.dtype, device):
        super().__init__(model=model, dtype=dtype, device=device)
        self._runs = _Runs()

    # What a subclass fills in.

    def _options(self) -> tuple:
        """What a prepared run depends on, beside the scheduled values."""
        raise NotImplementedError

    def _dynamics(self, values: tuple[Any, ...]):
        """The sampler with these values: numbers, or functions of the step."""
        raise NotImplementedError

    def _plain_step(self, x: Tensor, kwargs: dict, generator, values: tuple[float, ...]) -> tuple[Tensor, Tensor | None]:
        """The states after a step, and which proposals were accepted."""
        raise NotImplementedError

    def _sample(self, x, dim, n_steps, n_samples, thin, return_trajectory, return_diagnostics, reset_schedulers, y, model_kwargs,
                generator):
        if thin < 1:
            raise ValueError(f"thin must be >= 1, got {thin}")
        if reset_schedulers:
            self.reset_schedulers()
        kwargs = self._merge_condition(model_kwargs, y)
        if generator is not None and generator.device.type != self.device.type:
            raise RuntimeError(f"`generator` must be on {self.device}, got a generator on {generator.device}")
        x = self._init_state(x, dim, n_samples, generator).detach()
        kwargs = self._prepare_model_kwargs(kwargs)
        self._check_state(x)

        def kept():
            return _Kept(x, n_steps, thin, return_trajectory, return_diagnostics, self._needs_energies)

        with self._runs.lock:
            if n_steps > 0 and len(x) and self._fits(x, kwargs):
                schedulers = self._all_schedulers()
                before = [(s, copy.copy(vars(s))) for s in _with_parts(schedulers)]
                try:
                    return self._in_engine(x, kwargs, n_steps, generator, kept(), schedulers)
                except NonFiniteError as error:
                    self._say("non-finite", f"chains stopped being finite ({error.args[0].split(',')[0]})")
                except _Unfit as error:
                    self._say("values", str(error))
                for scheduler, values in before:
                    vars(scheduler).update(values)
            return self._in_a_loop(x, kwargs, n_steps, generator, kept())

    def _check_state(self, x: Tensor) -> None:
        pass

    def _fits(self, x: Tensor, kwargs: dict) -> bool:
        """Whether an engine takes these chains; where none does, a warning says why, once."""
        if self.dtype not in (torch.float32, torch.float64):
            return self._say("dtype", f"chains are {str(self.dtype).removeprefix('torch.')}")
        if not _built_in(self.integrator):
            return self._say("integrator", f"the integrator is {type(self.integrator).__name__}")
        if self.use_mixed_precision or getattr(self.model, "use_mixed_precision", False):
            return self._say("precision", "mixed precision is set")
        kind = type(self)
        if kind._model_gradient is not BaseSampler._model_gradient or kind._model_energy is not BaseSampler._model_energy:
            return self._say("own", f"{kind.__name__} has a way of its own to call the model")
        if any(not _constant(s) for s in self._of_the_model()):
            return self._say("schedulers", "a scheduler in the model changes it from step to step")
        if not bool(torch.isfinite(x).all()):
            return self._say("non-finite", "chains start where they are not finite")
        if self._couples(x, kwargs):
            return self._say("coupled", f"the energy of a chain changes with the other chains of its batch in"
                                        f" {type(self.model).__name__}")
        return True

    def _say(self, which: str, why: str) -> bool:
        if which not in self._runs.said:
            self._runs.said.add(which)
            warnings.warn(f"{type(self).__name__} runs in a plain loop, not in ebmfast's engines: {why}", stacklevel=6)
        return False

    def _couples(self, x: Tensor, kwargs: dict) -> bool:
        runs, called = self._runs, self._called(kwargs)
        if called.own is not None and not self._needs_energies:
            return False  # the whole batch runs together, whatever the gradient of one chain owes to the others
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        mode = tuple(m.training for m in modules), tuple(sorted(kwargs))
        if mode in runs.uncoupled or len(x) == 1 or self._native_leaf(x, kwargs) is not None:
            return False
        if couples(called, x):
            return True
        runs.uncoupled.add(mode)
        return False

    # Leaves and runs.

    def _called(self, kwargs: dict) -> Called:
        runs = self._runs
        if runs.called is None or runs.called.model is not self.model:
            own = getattr(self.model, "gradient", None)
            plain = _torchebm is not None and isinstance(self.model, BaseModel) and (
                type(self.model).gradient is BaseModel.gradient and "gradient" not in vars(self.model))
            lower = plain and getattr(self.model, "force_fp32_gradient", False) and self.dtype != torch.float32
            runs.called = Called(self.model, None if plain and not lower else own)
            runs.twin = twin(self.model) if _torchebm is not None else None
            runs.native.clear()
            runs.uncoupled.clear()
            runs.prepared.clear()
        runs.called.kwargs = kwargs
        return runs.called

    def _native_leaf(self, x: Tensor, kwargs: dict):
        """The model as a native energy, or None."""
        runs, shape = self._runs, x.shape[1:]
        if kwargs or x.dtype != torch.float32:
            return None
        if runs.twin is not None:
            return runs.twin.native if x.ndim == 2 and runs.twin.follow() else None
        if x.device.type != "cpu":
            return None
        if shape not in runs.native:
            runs.native[shape] = is_native(self.model, shape)
        return self.model if runs.native[shape] else None

    def _prepared(self, x: Tensor, kwargs: dict, steps: tuple[float, ...] | list[tuple[float, ...]]):
        """The run for chains like `x`, with the same values at every step, or a list of them."""
        called, native, constant = self._called(kwargs), self._native_leaf(x, kwargs), isinstance(steps, tuple)
        whole = bool(kwargs) or called.own is not None
        key = (native is not None, x.shape[1:], whole, steps if constant else None, *self._options())

        def prepare(schedules: list):
            leaf = called.concept() if native is None else Concept(native, name=type(self.model).__name__)
            values = steps if constant else tuple(_at(schedules, i) for i in range(len(self._schedules)))
            return sampling.prepare(leaf, self._dynamics(values), shape=x.shape[1:], check=False, energies=False,
                                    batch_size=WHOLE if whole and native is None else None)

        run, schedules = self._runs.run(key, prepare)
        if not constant:
            schedules[:] = steps
        return run

    def _in_engine(self, x: Tensor, kwargs: dict, n_steps: int, generator, kept: _Kept, schedulers: list):
        steps = self._scheduled(n_steps, schedulers)
        if any(values[0] <= 0 or not math.isfinite(sum(values)) for values in ([steps] if isinstance(steps, tuple) else steps)):
            raise _Unfit("a step size is not positive, or not finite")
        run, seed = self._prepared(x, kwargs, steps), resolve_seed(generator)
        if not kept.wanted:
            return run(x=x, steps=n_steps, seed=seed).x
        block = max(1, KEPT_BYTES // max(1, x.numel() * x.element_size())) * kept.thin
        trace = Trace(every=kept.thin, energy=kept.diagnostics is not None, states=True)
        rate = _Acceptance(kept.thin) if kept.diagnostics is not None and self._needs_energies else None
        state = None
        for done in range(0, n_steps, block):
            start = {"x": x, "seed": seed} if state is None else {"resume": state}
            if rate is not None:
                rate.begin(x if state is None else state.x)
            result = run(steps=min(block, n_steps - done), trace=trace, callback=rate, **start)
            state = result.state
            if result.trace.x is not None:
                kept.add(result.trace.x, result.trace.energy, None if rate is None else rate.take())
        return kept.output(result.x)

    # The plain loop.

    def _in_a_loop(self, x: Tensor, kwargs: dict, n_steps: int, generator, kept: _Kept):
        with self.autocast_context():
            for i in range(n_steps):
                x, accepted = self._plain_step(x, kwargs, generator, self._values())
                self.step_schedulers()
                if kept.wanted and (i + 1) % kept.thin == 0:
                    energy = None if kept.diagnostics is None else self._height(x, kwargs)[None]
                    if energy is not None and self._needs_energies:
                        energy = _bounded(energy)
                    kept.add(x[None], energy, None if accepted is None else accepted.float().mean()[None])
        return kept.output(x)

    def _slope(self, x: Tensor, kwargs: dict) -> Tensor:
        """∇E(x) as torchebm asks for it; models without a `gradient` are differentiated."""
        if hasattr(self.model, "gradient"):
            return self._model_gradient(x, kwargs)
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._called(kwargs)(leaf).sum(), leaf)
        return gradient.detach()

    def _height(self, x: Tensor, kwargs: dict) -> Tensor:
        """E(x) `[B]`."""
        return self._model_energy(x, kwargs) if hasattr(self.model, "gradient") else self._called(kwargs)(x)

    # Schedulers.

    def _values(self) -> tuple[float, ...]:
        return tuple(float(self.get_scheduled_value(name)) for name in self._schedules)

    def _all_schedulers(self) -> list:
        """Schedulers of all modules from here down, each as often as a step advances it."""
        found: list = []

        def visit(module):
            if isinstance(module, Schedulable):
                found.extend(module.schedulers.values())

        self.apply(visit)
        return found

    def _of_the_model(self) -> list:
        """Schedulers that the model can read."""
        if not isinstance(self.model, torch.nn.Module):
            return []
        found: list = []
        for module in self.model.modules():
            own = vars(module)
            found += [v for v in own.values() if hasattr(v, "get_value") and hasattr(v, "reset")]
            found += (own.get("schedulers") or {}).values() if isinstance(module, Schedulable) else ()
        return found

    def _scheduled(self, n_steps: int, schedulers: list) -> tuple[float, ...] | list[tuple[float, ...]]:
        """The values of every step of a call, or of all steps where nothing changes; schedulers end where they do after it."""
        own = type(self).step_schedulers is not BaseSampler.step_schedulers
        if not own and all(map(_constant, schedulers)):
            for scheduler in schedulers:
                scheduler.step_count += n_steps
            return self._values()
        steps = []
        for _ in range(n_steps):
            steps.append(self._values())
            if own:
                self.step_schedulers()
                continue
            for scheduler in schedulers:
                scheduler.step()
        return steps if any(values != steps[0] for values in steps) else steps[0]

    def explain(self, shape: tuple[int, ...]) -> str:
        """The plan and the engine of the next call, for chains of that shape: as `ebmfast.Run.explain`."""
        with self._runs.lock:
            x = torch.zeros(1, *shape, dtype=self.dtype, device=self.device)
            return self._prepared(x, {}, self._values()).explain()


class _Acceptance:
    """The share of chains that moved, of every `thin`-th step: a callback."""

    only_looks = True  # changes neither states nor models

    def __init__(self, thin: int):
        self.thin = thin
        self.moved: dict[int, Tensor] = {}  # chains that did, by step

    def begin(self, x: Tensor) -> None:
        """Chains are at `x`."""
        self.before = x.clone()

    def __call__(self, info) -> None:
        """A step is done."""
        before = self.before[info.first_chain:info.first_chain + len(info.x)]  # one micro-batch after the other
        if info.step % self.thin == 0:
            moved = (info.x != before).flatten(1).any(1).float().sum()
            self.moved[info.step] = self.moved.get(info.step, 0.0) + moved
        if (info.step + 1) % self.thin == 0:
            before.copy_(info.x)

    def take(self) -> Tensor:
        """The rates `[T]` since the last call."""
        rates = torch.stack([self.moved[step] for step in sorted(self.moved)]) / len(self.before)
        self.moved.clear()
        return rates


def _constant(scheduler) -> bool:
    return type(scheduler) is ConstantScheduler


def _with_parts(schedulers: list) -> list:
    """Schedulers, and those that they drive."""
    found, left = [], list(schedulers)
    while left:
        scheduler = left.pop()
        if all(s is not scheduler for s in found):
            found.append(scheduler)
            left += [v for v in vars(scheduler).values() if hasattr(v, "get_value") and hasattr(v, "reset")]
    return found


def _at(schedules: list, i: int) -> Callable[[int], float]:
    return lambda step: schedules[step][i]


def _bounded(energy: Tensor) -> Tensor:
    return energy.clamp(-1e10, 1e10)


def _integrator(given, default: str, owner: _Sampler):
    """The integrator asked for, as torchebm finds and checks it."""
    if _torchebm is None:
        if given not in (None, default):
            raise NotImplementedError(f"`integrator` must be None or {default!r}: others are torchebm's, which is not installed")
        return default
    from torchebm.integrators.integrator_utils import resolve_integrator

    return resolve_integrator(given, default=default, family=_family(default), owner=type(owner).__name__, device=owner.device,
                              dtype=owner.dtype)


def _family(default: str) -> type:
    from torchebm import core

    return {"euler_maruyama": core.BaseSDERungeKuttaIntegrator, "leapfrog": core.BaseSymplecticIntegrator}[default]


def _built_in(integrator) -> bool:
    """Whether an integrator's update is the one that the engines have."""
    if isinstance(integrator, str):
        return True
    from torchebm import integrators

    return type(integrator) in (integrators.EulerMaruyamaIntegrator, integrators.LeapfrogIntegrator)


class LangevinDynamics(_Sampler):
    """Unadjusted Langevin dynamics under torchebm's contract: x <- clamp(x - η ∇E(x) + σ √(2η) z).

    Args:
        model: an energy E(x) `[B]` of x `[B, *S]`, called with `model_kwargs`; its `gradient` is used where it has one of its own.
        step_size: η, positive, or a scheduler.
        noise_scale: σ, positive, or a scheduler; the temperature is σ².
        decay: 0.
        clamp: `(low, high)` for every element after each step.
        dtype: float32; float64 runs in the reference backend; others in a plain loop.
        device: where chains run, unless the model's parameters say so.
        integrator: None, "euler_maruyama", or torchebm's `EulerMaruyamaIntegrator`; others of torchebm's run in a plain loop.

    Raises:
        ValueError: η or σ not positive, or bounds that are none.
        NotImplementedError: a decay.
    """

    _needs_energies = False
    _schedules = ("step_size", "noise_scale")

    def __init__(self, model: Model, step_size: Scheduled = 1e-3, noise_scale: Scheduled = 1.0, decay: float = 0.0,
                 clamp: tuple[float, float] | None = None, dtype: torch.dtype = torch.float32,
                 device: str | torch.device | None = None, integrator: Any = None) -> None:
        super().__init__(model, dtype, device)
        self._register_param("step_size", step_size, positive=True)
        self._register_param("noise_scale", noise_scale, positive=True)
        if clamp is not None and clamp[0] >= clamp[1]:
            raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}")
        clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        if decay:
            raise NotImplementedError(f"`decay` must be 0, got {decay}: torchebm takes it and does nothing with it")
        self.clamp, self.decay = clamp, decay
        self.integrator = _integrator(integrator, "euler_maruyama", self)

    @torch.no_grad()
    def sample(self, x: Tensor | None = None, dim: int | tuple[int, ...] | None = None, n_steps: int = 100, n_samples: int = 1,
               thin: int = 1, return_trajectory: bool = False, return_diagnostics: bool = False, reset_schedulers: bool = True, *,
               y: Tensor | None = None, model_kwargs: dict[str, Any] | None = None,
               generator: torch.Generator | None = None) -> Samples:
        """Run `n_steps` steps of chains that start at `x`, or at N(0, I).

        Args:
            x: starting points `[n, *S]`, not modified.
            dim: S, or its only size, where `x` is None.
            n_steps, n_samples: steps, and chains where `x` is None.
            thin: keep every `thin`-th state in trajectory and diagnostics.
            return_trajectory: return `[n, n_steps // thin, *S]` in the place of the final states `[n, *S]`.
            return_diagnostics: return a dict too: "mean" and "var" over chains `[T, *S]`, and "energy" `[T]`, their mean.
            reset_schedulers: take all schedulers below this module back to step 0 first.
            y: shorthand for `model_kwargs={"y": y}`.
            model_kwargs: keyword arguments of the model.
            generator: what the seed, and starting points, are drawn from; torch's global generator if None.

        Raises:
            ValueError: thin < 1; neither `x` nor `dim`; `y` given twice.
            RuntimeError: a generator on another device.
        """
        return self._sample(x, dim, n_steps, n_samples, thin, return_trajectory, return_diagnostics, reset_schedulers, y,
                            model_kwargs, generator)

    def _options(self) -> tuple:
        return (None if self.clamp is None else tuple(self.clamp),)

    def _dynamics(self, values):
        eta, sigma = values
        if callable(eta):
            return Langevin(drift=eta, noise=lambda t: abs(sigma(t)) * math.sqrt(2 * eta(t)), clamp=self.clamp)
        return Langevin(drift=eta, noise=abs(sigma) * math.sqrt(2 * eta), clamp=self.clamp)

    def _plain_step(self, x, kwargs, generator, values):
        eta, sigma = values
        if _built_in(self.integrator):
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x - eta * self._slope(x, kwargs) + abs(sigma) * math.sqrt(2 * eta) * noise
        else:
            x = self.integrator.step(state={"x": x}, step_size=eta, noise_scale=sigma, generator=generator,
                                     drift=lambda y, t: -self._slope(y, kwargs))["x"]
        return (x if self.clamp is None else x.clamp_(*self.clamp)), None

    def __repr__(self):
        eta, sigma = self._values()
        return (f"{type(self).__name__}(model={type(self.model).__name__}, step_size={eta}, noise_scale={sigma},"
                f" integrator={_name(self.integrator)})")


class HamiltonianMonteCarlo(_Sampler):
    """Hamiltonian Monte Carlo under torchebm's contract: leapfrog from p ~ N(0, M), one decision per chain.

    Args:
        model: as in `LangevinDynamics`.
        step_size: ε, positive, or a scheduler.
        n_leapfrog_steps: leapfrog steps per proposal, 1 or more.
        mass: the diagonal of M: a float, or a tensor `[dim]`; None is 1.
        dtype, device: as in `LangevinDynamics`.
        integrator: None, "leapfrog", or torchebm's `LeapfrogIntegrator`; other separable ones run in a plain loop.

    Raises:
        ValueError: ε or `n_leapfrog_steps` not positive.
        TypeError: a mass that is neither; an integrator that is not separable and symplectic.
    """

    _needs_energies = True
    _schedules = ("step_size",)

    def __init__(self, model: Model, step_size: Scheduled = 1e-3, n_leapfrog_steps: int = 10, mass: float | Tensor | None = None,
                 dtype: torch.dtype = torch.float32, device: str | torch.device | None = None, integrator: Any = None) -> None:
        super().__init__(model, dtype, device)
        self._register_param("step_size", step_size, positive=True)
        if n_leapfrog_steps <= 0:
            raise ValueError(f"n_leapfrog_steps must be positive, got {n_leapfrog_steps}")
        if mass is not None and not isinstance(mass, float | Tensor):
            raise TypeError(f"`mass` must be a float, a tensor or None, got {type(mass).__name__}")
        self.n_leapfrog_steps = n_leapfrog_steps
        self.mass = mass.to(self.device) if isinstance(mass, Tensor) else mass
        self.integrator = _integrator(integrator, "leapfrog", self)
        if not getattr(self.integrator, "separable", True):
            raise TypeError("HamiltonianMonteCarlo needs a separable symplectic integrator, got"
                            f" {type(self.integrator).__name__}")

    @torch.no_grad()
    def sample(self, x: Tensor | None = None, dim: int | None = None, n_steps: int = 100, n_samples: int = 1, thin: int = 1,
               return_trajectory: bool = False, return_diagnostics: bool = False, reset_schedulers: bool = True, *,
               y: Tensor | None = None, model_kwargs: dict[str, Any] | None = None,
               generator: torch.Generator | None = None) -> Samples:
        """Run `n_steps` proposals of chains that start at `x` `[n, dim]`, or at N(0, I).

        Arguments as in `LangevinDynamics.sample`; `dim` may be left out where the model has a tensor `mean`. Diagnostics
        also have "acceptance_rate" `[T]`, the share of chains whose proposal was accepted.

        Raises:
            ValueError: thin < 1; no `x`, and neither `dim` nor a mean; states that are not vectors; `y` given twice.
            RuntimeError: a generator on another device.
        """
        if x is None and dim is None and isinstance(getattr(self.model, "mean", None), Tensor):
            dim = self.model.mean.shape[0]
        return self._sample(x, dim, n_steps, n_samples, thin, return_trajectory, return_diagnostics, reset_schedulers, y,
                            model_kwargs, generator)

    def _check_state(self, x: Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"`x` must be [n, dim] in HamiltonianMonteCarlo, got {list(x.shape)}")

    def _options(self) -> tuple:
        mass = tuple(self.mass.flatten().tolist()) if isinstance(self.mass, Tensor) else self.mass
        return self.n_leapfrog_steps, mass

    def _dynamics(self, values):
        mass = 1.0 if self.mass is None else self.mass
        return HMC(step_size=values[0], n_leapfrog_steps=self.n_leapfrog_steps, mass=mass)

    def _initialize_momentum(self, shape, generator: torch.Generator | None = None) -> Tensor:
        p = torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
        return p if self.mass is None else p * self.mass**0.5

    def _compute_kinetic_energy(self, p: Tensor) -> Tensor:
        return 0.5 * (p.square() if self.mass is None else p.square() / self.mass).sum(-1)

    def _plain_step(self, x, kwargs, generator, values):
        p = self._initialize_momentum(x.shape, generator)

        def hamiltonian(y: Tensor, p: Tensor) -> Tensor:
            return _bounded(self._height(y, kwargs)) + self._compute_kinetic_energy(p).clamp(max=1e10)

        before = hamiltonian(x, p)
        y, p = self._proposal(x, p, kwargs, values[0])
        ratio = torch.exp((before - hamiltonian(y, p)).clamp(-50.0, 50.0))
        accepted = torch.rand(len(x), device=x.device, generator=generator) < ratio
        return torch.where(accepted[:, None], y, x), accepted

    def _proposal(self, x: Tensor, p: Tensor, kwargs: dict, size: float) -> tuple[Tensor, Tensor]:
        """The end of a trajectory; forces are bounded, and NaN becomes 0, as in torchebm."""
        if not _built_in(self.integrator):
            end = self.integrator.integrate({"x": x, "p": p}, step_size=size, n_steps=self.n_leapfrog_steps, mass=self.mass,
                                            drift=lambda y, t: -self._slope(y, kwargs), safe=True)
            return end["x"], end["p"]
        mass = 1.0 if self.mass is None else self.mass
        pull = self._slope(x, kwargs).clamp(-1e6, 1e6).neg_()
        for _ in range(self.n_leapfrog_steps):
            p = p + 0.5 * size * pull
            x = (x + size * p / mass).nan_to_num_(nan=0.0)
            pull = self._slope(x, kwargs).clamp(-1e6, 1e6).neg_()
            p = (p + 0.5 * size * pull).nan_to_num_(nan=0.0)
        return x, p

    def __repr__(self):
        mass = self.mass if not isinstance(self.mass, Tensor) else f"tensor{tuple(self.mass.shape)}"
        return (f"{type(self).__name__}(model={type(self.model).__name__}, step_size={self._values()[0]},"
                f" n_leapfrog_steps={self.n_leapfrog_steps}, mass={mass}, integrator={_name(self.integrator)})")


def _name(integrator) -> str:
    return integrator if isinstance(integrator, str) else type(integrator).__name__

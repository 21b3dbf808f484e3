"""Which implementations of the step exist here, and why not.

====================  ==============================================  =============================
``reference``         plain torch (`ebmfast.reference`), any device   the specification; float64 too
``cpu``               C++ (`csrc/`), for CPU tensors                  bit for bit the reference
``cuda``              CUDA C++ (`csrc/cuda`), EBMFAST_CUDA=ON         compiled, never run on a GPU
``triton``            Triton (`kernels/`), NVIDIA and AMD             compiled and interpreted,
                                                                      never run on a GPU
====================  ==============================================  =============================

"auto" takes what has been proven on the device at hand, so neither ``cuda`` nor ``triton``: ask for them by
name. With TRITON_INTERPRET=1 in the environment, ``triton`` works on CPU tensors in Triton's interpreter: the
same bits, thousands of times slower, for tests.

Per step, with everything that does not change prepared once::

    backend = resolve("auto", x.device)
    plan = backend.prepare(x, n_gradients=K, weights_per_chain=False, seed=seed, clamp=(-1, 1), faults=faults)
    for i in range(steps):
        plan(gradients, weights, drift, noise, i)      # x changes in place

`ebmfast.reference.langevin_step` states what a step computes and what each argument means.
"""

from __future__ import annotations

import abc
import importlib.util
import math
import os
from collections.abc import Callable, Sequence

import torch

from ebmfast import _checks, reference, rng
from ebmfast._native import core

__all__ = ["NAMES", "Backend", "BackendUnavailableError", "available", "home", "resolve"]

Gradients = torch.Tensor | Sequence[torch.Tensor]
# (gradients, weights, drift, noise, step) -> None
Plan = Callable[[Gradients, torch.Tensor | None, float, float, int], None]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; says why and what to do."""


class Backend(abc.ABC):
    """One implementation of the noise and of the step."""

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    gradient_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # of a float32 state
    home: str = "cpu"  # a type of device that it works on
    captures: bool = False  # whether plans read step, schedules, seed and first chain from device memory

    @abc.abstractmethod
    def _plan(
        self,
        x: torch.Tensor,
        *,
        n_gradients: int,
        gradient_dtype: torch.dtype,
        weights_per_chain: bool,
        seed: int,
        first_chain: int,
        stream: int,
        clamp: tuple[float, float] | None,
        grad_clip_value: float | None,
        grad_clip_norm: float | None,
        frozen_mask: torch.Tensor | None,
        faults: torch.Tensor | None,
    ) -> Plan: ...

    @abc.abstractmethod
    def _fill(
        self,
        out: torch.Tensor,
        *,
        uniform: bool,
        seed: int,
        step: int,
        stream: int,
        first_chain: int,
        first_element: int,
    ) -> None: ...

    @abc.abstractmethod
    def unsuitable(self, device: torch.device) -> str | None:
        """Why this backend cannot work on tensors of that device; None if it can."""

    def info(self) -> dict[str, object]:
        """What a report should name: the backend, and what of it decides the bits."""
        return {"backend": self.name}

    def prepare(
        self,
        x: torch.Tensor,
        *,
        n_gradients: int,
        gradient_dtype: torch.dtype = torch.float32,
        weights_per_chain: bool = False,
        seed: int,
        first_chain: int = 0,
        stream: int = rng.NOISE,
        clamp: tuple[float, float] | None = None,
        grad_clip_value: float | None = None,
        grad_clip_norm: float | None = None,
        frozen_mask: torch.Tensor | None = None,
        faults: torch.Tensor | None = None,
    ) -> Plan:
        """Checks and stores what stays the same; returns ``plan(gradients, weights, drift, noise, step)``.

        The plan works in place on this very ``x`` (and ``faults``), which must keep their storage. Gradients
        come as one contiguous ``[K, B, *S]`` or as K contiguous ``[B, *S]`` of ``gradient_dtype`` (float32 or
        bfloat16; reference and triton take float16 too), anew each step; weights as float32 ``[K]``, or
        ``[K, B]`` with ``weights_per_chain``. Not for two threads at a time. Arguments and semantics:
        `ebmfast.reference.langevin_step`. Raises TypeError or ValueError.
        """
        _checks.check_state(x, self.dtypes, frozen_mask, faults)
        reason = self.unsuitable(x.device)
        _checks.check(
            reason is None, "x", f"a tensor that backend {self.name!r} can work on", f"{x.device} ({reason})"
        )
        _checks.check_noise_id(seed=seed, stream=stream, first_chain=first_chain, chains=x.shape[0])
        allowed = self.gradient_dtypes if x.dtype == torch.float32 else (x.dtype,)
        _checks.check(gradient_dtype in allowed, "gradient_dtype", f"one of {allowed}", gradient_dtype)
        _checks.check(clamp is None or clamp[0] <= clamp[1], "clamp", "(low, high) with low <= high", clamp)
        for name, limit in (("grad_clip_value", grad_clip_value), ("grad_clip_norm", grad_clip_norm)):
            _checks.check(limit is None or 0 <= limit < math.inf, name, "None or a number >= 0", limit)
        return self._plan(
            x,
            n_gradients=n_gradients,
            gradient_dtype=gradient_dtype,
            weights_per_chain=weights_per_chain,
            seed=seed,
            first_chain=first_chain,
            stream=stream,
            clamp=clamp,
            grad_clip_value=grad_clip_value,
            grad_clip_norm=grad_clip_norm,
            frozen_mask=frozen_mask,
            faults=faults,
        )

    def step(
        self,
        x: torch.Tensor,
        gradients: Gradients,
        weights: torch.Tensor | None,
        drift: float,
        noise: float,
        *,
        seed: int,
        step: int,
        **options,
    ) -> None:
        """One step, in place: `prepare` and its plan in one. ``options`` are those of `prepare`."""
        stacked = isinstance(gradients, torch.Tensor)
        dtype = gradients.dtype if stacked else gradients[0].dtype if gradients else x.dtype
        per_chain = weights is not None and weights.ndim == 2
        plan = self.prepare(
            x,
            n_gradients=len(gradients),
            gradient_dtype=dtype,
            weights_per_chain=per_chain,
            seed=seed,
            **options,
        )
        plan(gradients, weights, drift, noise, step)

    def accept(
        self,
        current: Sequence[torch.Tensor],
        proposed: Sequence[torch.Tensor],
        log_ratio: torch.Tensor,
        faults: torch.Tensor,
        *,
        seed: int,
        step: int,
        first_chain: int,
    ) -> torch.Tensor:
        """Rows of ``current`` become those of ``proposed`` in chains that accept; returns which did, bool ``[B]``.

        Tensors are ``[B, ...]``, the states first, those of ``current`` contiguous; ``log_ratio`` ``[B]``; chains with a
        fault (int64 ``[B]``, not 0) never accept. `ebmfast.reference.metropolis_accept` states the decision.
        """
        log_ratio = torch.where(faults == 0, log_ratio, -math.inf)
        accepted = self._accept(current[0], proposed[0], log_ratio, seed=seed, step=step, first_chain=first_chain)
        for old, new in zip(current[1:], proposed[1:]):
            old.copy_(torch.where(accepted.view(-1, *[1] * (old.ndim - 1)), new, old))
        return accepted

    def _accept(self, x, proposal, log_ratio, **noise_id) -> torch.Tensor:
        return reference.metropolis_accept(x, proposal, log_ratio, **noise_id)

    def normal(
        self,
        shape: Sequence[int],
        chains: int,
        *,
        seed: int,
        step: int,
        stream: int = rng.NOISE,
        first_chain: int = 0,
        first_element: int = 0,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Standard normals, float32 ``[chains, *shape]``: the bits of `ebmfast.rng.normal`."""
        return self._filled(
            shape,
            chains,
            device,
            uniform=False,
            seed=seed,
            step=step,
            stream=stream,
            first_chain=first_chain,
            first_element=first_element,
        )

    def uniform(
        self,
        shape: Sequence[int],
        chains: int,
        *,
        seed: int,
        step: int,
        stream: int = rng.NOISE,
        first_chain: int = 0,
        first_element: int = 0,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Uniforms in (0, 1), float32 ``[chains, *shape]``: the bits of `ebmfast.rng.uniform`."""
        return self._filled(
            shape,
            chains,
            device,
            uniform=True,
            seed=seed,
            step=step,
            stream=stream,
            first_chain=first_chain,
            first_element=first_element,
        )

    def _filled(
        self, shape, chains, device, *, uniform, seed, step, stream, first_chain, first_element
    ) -> torch.Tensor:
        _checks.check_noise_id(seed=seed, step=step, stream=stream, first_chain=first_chain, chains=chains)
        last = first_element + math.prod(shape)
        _checks.check(
            first_element % 4 == 0 and 0 <= first_element <= last <= rng.MAX_ELEMENTS,
            "first_element",
            "a multiple of 4, with all elements below 2^34",
            first_element,
        )
        out = torch.empty((chains, *shape), dtype=torch.float32, device=device)
        reason = self.unsuitable(out.device)
        _checks.check(
            reason is None,
            "device",
            f"one that backend {self.name!r} can work on",
            f"{out.device} ({reason})",
        )
        self._fill(
            out,
            uniform=uniform,
            seed=seed,
            step=step,
            stream=stream,
            first_chain=first_chain,
            first_element=first_element,
        )
        return out


class ReferenceBackend(Backend):
    """Plain torch: the specification."""

    name = "reference"
    dtypes = (torch.float32, torch.float64)
    gradient_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def unsuitable(self, device: torch.device) -> str | None:
        return None

    def _plan(self, x, *, n_gradients, gradient_dtype, weights_per_chain, **options) -> Plan:
        def plan(gradients, weights, drift, noise, step) -> None:
            _checks.check_noise_id(step=step)
            _checks.check_gradients(x, gradients, n_gradients, gradient_dtype)
            _checks.check_weights(x, weights, n_gradients, weights_per_chain)
            reference.langevin_step(x, gradients, weights, drift, noise, step=step, **options)

        return plan

    def _fill(self, out, *, uniform, **noise_id) -> None:
        draw = rng.uniform if uniform else rng.normal
        out.copy_(draw(out.shape[1:], out.shape[0], device=out.device, **noise_id))


class CpuBackend(Backend):
    """The C++ kernels; threads follow `torch.get_num_threads`, and never change bits."""

    name = "cpu"

    def unsuitable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "its kernels read CPU memory"

    def info(self) -> dict[str, object]:
        return {"backend": self.name, "isa": core.isa(), "threads": torch.get_num_threads()}

    def accept(self, current, proposed, log_ratio, faults, **noise_id) -> torch.Tensor:
        batch = log_ratio.shape[0]
        fits = log_ratio.dtype is torch.float32 and log_ratio.is_contiguous()
        for old, new in zip(current, proposed, strict=True):
            same = old.dtype is new.dtype and old.shape == new.shape and new.device.type == "cpu"
            fits = fits and same and old.is_contiguous() and new.is_contiguous()
        if not fits:
            return super().accept(current, proposed, log_ratio, faults, **noise_id)
        rows = [
            (old.data_ptr(), new.data_ptr(), old.nbytes // max(batch, 1)) for old, new in zip(current, proposed)
        ]
        accepted = torch.empty(batch, dtype=torch.bool, device=log_ratio.device)
        core.accept(
            rows,
            log_ratio.data_ptr(),
            faults.data_ptr(),
            accepted.data_ptr(),
            batch,
            stream=rng.ACCEPT,
            **noise_id,
        )
        return accepted

    def _plan(self, x, **options) -> Plan:
        return _CpuPlan(x, **options)

    def _fill(self, out, *, uniform, **noise_id) -> None:
        size = math.prod(out.shape[1:])
        core.fill(
            out.data_ptr(), out.shape[0], size, uniform=uniform, threads=torch.get_num_threads(), **noise_id
        )


class CudaBackend(Backend):
    """CUDA C++ kernels of the step, in stream order, and whole chains (`ebmfast.cuda_chain`). Not in "auto": never run on a GPU."""

    name = "cuda"
    home = "cuda"

    def unsuitable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "its kernels read GPU memory"

    def _plan(self, x, **options) -> Plan:
        return _CudaPlan(x, **options)

    def _fill(self, out, *, uniform, **noise_id) -> None:
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream(out.device).cuda_stream
            size = math.prod(out.shape[1:])
            core.cuda_fill(
                out.data_ptr(), out.shape[0], size, uniform=uniform, cuda_stream=stream, **noise_id
            )


class TritonBackend(Backend):
    """Triton kernels, in stream order. Not in "auto": compiled and run by the interpreter, never run on a GPU.

    Its plans also take drift, noise and a clock as tensors on the device, for a captured graph: `ebmfast.kernels.step`.
    """

    captures = True

    name = "triton"
    gradient_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @property
    def home(self) -> str:
        return "cpu" if _interpreted() else "cuda"

    def unsuitable(self, device: torch.device) -> str | None:
        if device.type == self.home:
            return None
        if device.type == "cpu":
            return "its kernels read GPU memory; TRITON_INTERPRET=1 runs them on the CPU, slowly"
        return "TRITON_INTERPRET=1 keeps it on the CPU" if _interpreted() else "its kernels read GPU memory"

    def info(self) -> dict[str, object]:
        import triton

        return {"backend": self.name, "triton": triton.__version__, "interpreted": _interpreted()}

    def _plan(self, x, **options) -> Plan:
        return _TritonPlan(x, **options)

    def _accept(self, x, proposal, log_ratio, **noise_id) -> torch.Tensor:
        from ebmfast.kernels.accept import accept

        accepted = torch.empty(len(x), dtype=torch.bool, device=x.device)
        accept(x, proposal.contiguous(), log_ratio.float().contiguous(), accepted, **noise_id)
        return accepted

    def _fill(self, out, **options) -> None:
        from ebmfast.kernels.fill import fill

        fill(out, **options)


class _CheckedPlan:
    """Called every step, so its checks are cheap; what fails them goes to the checks that explain."""

    def __init__(self, x, *, n_gradients, gradient_dtype, weights_per_chain) -> None:
        self._x, self._n, self._dtype, self._shape = x, n_gradients, gradient_dtype, x.shape
        self._device = x.device
        self._stacked = torch.Size((n_gradients, *x.shape))
        self._per_chain = weights_per_chain
        self._weights: object = object()

    def _check(self, gradients: Gradients, weights: torch.Tensor | None, step: int) -> bool:
        """Raises on arguments that do not fit; whether the gradients are stacked."""
        dtype, device = self._dtype, self._device
        stacked = isinstance(gradients, torch.Tensor)
        shape = self._stacked if stacked else self._shape
        each = (gradients,) if stacked else gradients
        fits = stacked or len(gradients) == self._n
        for g in each:
            if g.dtype is not dtype or g.shape != shape or g.device != device or not g.is_contiguous():
                fits = False
        if not fits:
            _checks.check_gradients(self._x, gradients, self._n, dtype)
        if not 0 <= step < 4294967296:
            _checks.check_noise_id(step=step)
        if self._n > 0 and weights is not self._weights:  # most often the same tensor at every step
            _checks.check_weights(self._x, weights, self._n, self._per_chain)
            self._weights = weights
        return stacked


class _TritonPlan(_CheckedPlan):
    def __init__(self, x, *, n_gradients, gradient_dtype, weights_per_chain, **options) -> None:
        from ebmfast.kernels.step import StepPlan

        super().__init__(x, n_gradients=n_gradients, gradient_dtype=gradient_dtype, weights_per_chain=weights_per_chain)
        self._run = StepPlan(x, n_gradients=n_gradients, weights_per_chain=weights_per_chain, **options)

    def __call__(self, gradients, weights, drift, noise, step) -> None:
        if isinstance(step, torch.Tensor):
            self._check_schedules(drift, noise, step)
        self._check(gradients, weights, 0 if isinstance(step, torch.Tensor) else step)
        self._run(gradients, weights, drift, noise, step)

    def _check_schedules(self, drift: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> None:
        device = self._device
        _checks.check_tensor("step", step, dtypes=[torch.int64], device=device, shapes=[(4,)])
        _checks.check_tensor("drift", drift, dtypes=[torch.float32], device=device, shapes=[drift.shape[:1]])
        _checks.check(len(drift) > 0, "drift", "of shape [T], T > 0", list(drift.shape))
        _checks.check_tensor("noise", noise, dtypes=[torch.float32], device=device, shapes=[drift.shape])


class _NativePlan(_CheckedPlan):
    """Hands addresses to a plan of `_core`."""

    def __init__(
        self,
        x,
        *,
        n_gradients,
        gradient_dtype,
        weights_per_chain,
        seed,
        first_chain,
        stream,
        clamp,
        grad_clip_value,
        grad_clip_norm,
        frozen_mask,
        faults,
    ) -> None:
        super().__init__(x, n_gradients=n_gradients, gradient_dtype=gradient_dtype, weights_per_chain=weights_per_chain)
        self._keep = (frozen_mask, faults)  # the plan holds their addresses
        args = core.step_args(
            x=x.data_ptr(),
            batch=x.shape[0],
            size=math.prod(x.shape[1:]),
            n_gradients=n_gradients,
            bf16=gradient_dtype == torch.bfloat16,
            weights_per_chain=weights_per_chain,
            seed=seed,
            stream=stream,
            first_chain=first_chain,
            clamp=clamp,
            clip_value=grad_clip_value,
            frozen=0 if frozen_mask is None else frozen_mask.data_ptr(),
            frozen_per_chain=frozen_mask is not None and frozen_mask.ndim == x.ndim,
        )
        self._run = self._native(args, faults, grad_clip_norm)

    def _addresses(self, gradients: Gradients, weights: torch.Tensor | None, step: int):
        """The gradients' addresses (or the first, if stacked) and the weights', all of them checked."""
        stacked = self._check(gradients, weights, step)
        if self._n == 0:
            return (), 0
        return gradients.data_ptr() if stacked else [g.data_ptr() for g in gradients], weights.data_ptr()


class _CpuPlan(_NativePlan):
    def _native(self, args, faults, clip_norm):
        return core.StepPlan(args, _address(faults), clip_norm).run

    def __call__(self, gradients, weights, drift, noise, step) -> None:
        gradients, weights = self._addresses(gradients, weights, step)
        self._run(gradients, weights, step, drift, noise, torch.get_num_threads())


class _CudaPlan(_NativePlan):
    def _native(self, args, faults, clip_norm):
        x, clips = self._x, clip_norm is not None
        blocks = -(-math.prod(x.shape[1:]) // reference.NORM_BLOCK)
        self._scratch = (
            torch.zeros(x.shape[0], dtype=torch.uint8, device=x.device) if faults is not None else None,
            torch.empty(x.shape[0], blocks, dtype=torch.float64, device=x.device) if clips else None,
            torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if clips else None,
        )
        return core.CudaPlan(args, _address(faults), clip_norm, *map(_address, self._scratch)).run

    def __call__(self, gradients, weights, drift, noise, step) -> None:
        gradients, weights = self._addresses(gradients, weights, step)
        with torch.cuda.device(self._device):
            self._run(gradients, weights, step, drift, noise, torch.cuda.current_stream().cuda_stream)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cuda_reason() -> str | None:
    if not core.build_info()["cuda"]:
        return "this build has no CUDA kernels; reinstall with EBMFAST_CUDA=ON (needs nvcc)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")  # as Triton reads it


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux)"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch finds no GPU; install a torch built for it, or set TRITON_INTERPRET=1 to run on the CPU, slowly"
    return None


_BACKENDS: dict[str, Backend] = {
    b.name: b for b in (ReferenceBackend(), CpuBackend(), TritonBackend(), CudaBackend())
}
_REASONS = {"triton": _triton_reason, "cuda": _cuda_reason}
NAMES = ("reference", "cpu", "triton", "cuda")
_AUTO = ("cpu", "reference")


def available() -> dict[str, str | None]:
    """For each backend, None if it can run here, or why it cannot and what to do."""
    return {name: _REASONS[name]() if name in _REASONS else None for name in NAMES}


def home(name: str) -> str:
    """A type of device that the backend of that name works on."""
    return _BACKENDS[name].home


def resolve(name: str, device: torch.device | str) -> Backend:
    """The backend of that name; "auto" is the fastest one proven to work on ``device``.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: it is known but cannot run here, or not on this device.
    """
    device = torch.device(device)
    if name == "auto":
        return next(_BACKENDS[n] for n in _AUTO if _BACKENDS[n].unsuitable(device) is None)
    if name not in NAMES:
        raise ValueError(f"`backend` must be one of {', '.join(('auto', *NAMES))}, got {name!r}")
    reason = available()[name]
    if reason is None and (unsuitable := _BACKENDS[name].unsuitable(device)) is not None:
        reason = f"it cannot work on {device} ({unsuitable}); move the tensors or use backend='auto'"
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    return _BACKENDS[name]

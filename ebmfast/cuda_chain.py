"""The chain engine on NVIDIA GPUs: all steps of a call in one launch (`csrc/cuda/plan.h`). It has not run on a GPU yet.

Parameters live on the device and are packed there anew at every call, in stream order, so that nothing is compared, nothing
can be stale, and the host waits for nothing. Products of matrices are float32, exact to rounding. They run on tensor cores

* with `compute_dtype=torch.bfloat16`: products of hidden layers with hidden layers, as on the CPU;
* where torch itself may use TF32 for float32 products (`torch.set_float32_matmul_precision("high")`, or
  `torch.backends.cuda.matmul.allow_tf32`): those of every layer. Full Gaussians, biases and the state stay float32.

Sums are float32 in either case, in an order that depends neither on the number of chains nor on the GPU's size.

On CPU tensors the same code runs the same kernels' text on the host, slowly: what the tests see of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import backends, rng
from ._checks import indexed
from ._native import core
from .chain import Chain, NotNative, reason_against

MOST_MEMORY = 1 << 30  # bytes of scratch where shared memory is not enough
MOST_SLOTS = 16  # kMaxSlots of csrc/cuda/tables.h
MULTIPLICATIONS_PER_SECOND = 2e12  # of a GPU with enough to do, and
STEPS_PER_SECOND = 1e5  # of one without: guesses, to keep a launch short enough for Ctrl-C
HOST = 132, 227 << 10, False  # the tests' device: multiprocessors, shared memory of a block, threads in reverse


def tf32_allowed() -> bool:
    """Whether torch may round float32 products to TF32."""
    matmul = torch.backends.cuda.matmul
    # Newer releases have the string, and refuse to tell the flag once it has been set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def tf32_products(device: torch.device, engine: str = "step") -> tuple[str, ...]:
    """Of "matmul" and "conv", those whose float32 factors torch may round to TF32 on that device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return ()
    conv = getattr(torch.backends.cudnn, "conv", None)
    allowed = conv.fp32_precision == "tf32" if hasattr(conv, "fp32_precision") else torch.backends.cudnn.allow_tf32
    return ("matmul",) * tf32_allowed() + ("conv",) * (bool(allowed) and engine == "step")


class DeviceChain(Chain):
    """A composition of native energies whose parameters and chains are on one GPU; otherwise as `Chain`."""

    paced = False  # launches return at once

    def __init__(self, expression, shape: Sequence[int], compute_dtype: torch.dtype | None = None, *, device, **options):
        device = indexed(device)
        if (refusal := self.refusal(options)) is not None:
            raise NotNative(refusal)
        self._values_at: dict[float | None, Tensor] = {}
        self._image, self._last_stream = b"", None
        super().__init__(expression, shape, compute_dtype, device=device, **options)

    @staticmethod
    def refusal(options: Mapping) -> str | None:
        """Why this engine does not take a sampler's steps of those options; None if it does."""
        return None if options.get("metropolis") is None else "the CUDA chain engine takes the steps of Langevin dynamics only"

    def _has_bf16(self) -> bool:
        return True

    def _new_plan(self, codes):
        if len(self.expression.slots) > MOST_SLOTS:
            raise NotNative(f"{len(self.expression.slots)} slots, the CUDA chain engine takes {MOST_SLOTS}")
        gpu, self._tf32 = self.device.type == "cuda", tf32_allowed()
        limits = (*core.cuda_limits(self.device.index), False) if gpu else HOST
        return core.DevicePlan(self.size, codes, self._tf32, gpu, *limits)

    def _check_scratch(self) -> None:
        try:
            needs = self._plan.choose(1 << 20)["memory_bytes"]
        except ValueError as error:
            raise NotNative(str(error)) from None
        if needs > MOST_MEMORY:
            raise NotNative(f"chains of {self.size} numbers would need {needs >> 20} MiB of scratch memory")
        self._blob = torch.empty(self._plan.blob_bytes(), dtype=torch.uint8, device=self.device)

    def refresh(self) -> bool:
        """Read parameters as they are now. False if a module, or torch's choice of precision, is no longer what it was."""
        return self._tf32 == tf32_allowed() and super().refresh()

    def _read(self) -> None:
        base = self._blob.data_ptr()
        image = self._plan.image(base)
        with self._stream() as stream:
            if image != self._image:
                self._blob[:len(image)].copy_(self._upload(torch.frombuffer(bytearray(image), dtype=torch.uint8)))
                self._image = image
            self._plan.prepare(base, stream)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[int]:
        """The current stream of the device, behind whatever of this chain another stream still has to do."""
        if self.device.type != "cuda":
            yield 0
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = stream
            yield stream.cuda_stream

    def _upload(self, tensor: Tensor) -> Tensor:
        """A small tensor on the device, without waiting."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _set_values(self, sigma: float | None) -> None:
        """Program values at a noise level; those of mixtures are read anew, on the device."""
        parts = list(self._values(sigma))
        fixed = self._values_at.get(sigma)
        if fixed is None:
            flat = [v for part in parts for v in ([0.0] * len(part) if isinstance(part, Tensor) else part)]
            fixed = self._values_at[sigma] = self._upload(torch.tensor(flat, dtype=torch.float32, device="cpu"))
        self._now, place = fixed.clone() if self._mixtures else fixed, 0
        for part in parts:
            if isinstance(part, Tensor):
                self._now[place:place + len(part)].copy_(part)
            place += len(part)

    def _memory(self, chains: int) -> Tensor:
        return torch.empty(self._plan.choose(chains)["memory_bytes"] // 4, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def _unit_energies(self, x: Tensor, conditions: Sequence[Tensor], out: Tensor) -> None:
        with self._stream() as stream:
            memory = self._memory(len(x))
            self._plan.energies(self._blob.data_ptr(), x.data_ptr(), len(x), [c.data_ptr() for c in conditions], out.data_ptr(), 0,
                                memory.data_ptr(), stream)

    def steps_within(self, seconds: float, chains: int) -> int:
        """About how many steps of `chains` chains take at most that long."""
        return int(min(seconds * STEPS_PER_SECOND, seconds * MULTIPLICATIONS_PER_SECOND / (self._plan.work() * max(chains, 1))))

    @torch.no_grad()
    def run(self, x: Tensor, faults: Tensor, conditions: Sequence[Tensor], drift: Tensor, noise: Tensor, sigma: float | None, *,
            step: int, seed: int, first_chain: int, frozen_mask: Tensor | None = None) -> None:
        """Steps `step` to `step + len(drift) - 1` of every chain without a fault, in place and in stream order.

        `refresh` comes first."""
        per_chain = frozen_mask is not None and frozen_mask.ndim == x.ndim
        with self._stream() as stream:
            self._set_values(sigma)
            schedule, memory = self._upload(torch.stack([drift, noise])), self._memory(len(x))
            self._plan.run(
                self._blob.data_ptr(), x.data_ptr(), x.shape[0], seed, first_chain, rng.NOISE, step, drift.shape[0],
                schedule[0].data_ptr(), schedule[1].data_ptr(), [c.data_ptr() for c in conditions],
                0 if frozen_mask is None else frozen_mask.data_ptr(), per_chain, faults.data_ptr(), self._now.data_ptr(),
                memory.data_ptr(), stream)


CHAINS: dict[str, type[Chain]] = {"cpu": Chain, "cuda": DeviceChain}


def chains_on(device: torch.device, expression, shape: Sequence[int] | None, compute_dtype: torch.dtype | None) -> str:
    """Whether the chain engine runs a composition whose models are on that device, and if not, why."""
    if device.type not in CHAINS:
        return f"no: it runs on CPUs and NVIDIA GPUs, this is {device}"
    reason = backends.available()[device.type]
    if reason is None:
        reason = reason_against(expression, shape, compute_dtype, kind=CHAINS[device.type], device=device)
    if reason is not None:
        return f"no: {reason}"
    where = "the CPU" if device.type == "cpu" else f'{device} with backend="{device.type}"'
    return f"yes, on {where}: every leaf is a native energy"

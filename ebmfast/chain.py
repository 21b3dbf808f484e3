"""The chain engine: compositions of native energies, whose chains run whole in C++ (`csrc/chain_kernels.cpp`).

Native are the energies of `ebmfast.energies` that have a closed-form gradient, `MLP`, and plain `nn.Sequential`s of
Linear layers and known activations, with float32 parameters on the CPU (`ebmfast.cuda_chain` does the same on a GPU). A
subclass that overrides `forward`, a hook, a parametrisation, or any other layer makes a module one for the step engine;
`NotNative` says which and why.

Parameters are read at every call: packed weights are compared with the memory they were packed from, so that no
write to a parameter, in whatever way it is made, goes unseen.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import energies, rng
from ._native import core
from .composition import Concept, Expression, Slot
from .program import Program
from .weights import weight_at

ACTIVATIONS = {nn.SiLU: 0, nn.ReLU: 1, nn.Tanh: 2, nn.Softplus: 3, nn.GELU: 4}
GELU_TANH = 5
MULTIPLICATIONS_PER_SECOND = 2e10  # of one core: a guess, until a call has been timed
MOST_SCRATCH = 64 << 20  # bytes per thread
GLOBAL_HOOKS = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks,
                nn_module._global_backward_pre_hooks)


class NotNative(Exception):
    """Why a composition, or a leaf of it, cannot run in the chain engine."""


class Watch:
    """Places whose values were read, to be looked at again at every call (`core.Watch` does that).

    A value that is another object, a tensor whose memory moved, a hook or a child that came or went: each means
    that a module has to be read, or recognised, anew. What is written *in* a tensor's memory needs no watch.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._core = core.Watch()
        self.unchanged = self._core.unchanged

    def value(self, mapping: dict, name: str):
        """What stands there, watched from now on."""
        value = mapping.get(name)
        tensor = isinstance(value, Tensor)
        contiguous = int(value.is_contiguous()) if tensor and value.ndim > 1 else -1
        self._core.add(mapping, name, value, value.data_ptr() if tensor else 0, contiguous)
        return value

    def hooks(self, mapping: dict) -> None:
        """A mapping of hooks that must stay empty."""
        self._core.add_size(mapping, 0)

    def module(self, module: nn.Module) -> None:
        """A module whose hooks and children count, and a forward of its own."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            self.hooks(hooks)
        self.value(module.__dict__, "forward")
        self._core.add_size(module._modules, len(module._modules))
        for name in module._modules:
            self.value(module._modules, name)

    def tensor(self, module: nn.Module, name: str, shape: Sequence[int], leaf: Concept) -> Tensor | None:
        """The parameter or buffer `name`, or None where it is None; raises `NotNative` if kernels cannot read it."""
        mapping = module._parameters if name in module._parameters else module._buffers
        if name not in mapping:
            raise NotNative(f"{leaf.name}: its {name} is neither a parameter nor a buffer")
        value = self.value(mapping, name)
        if value is None:
            if name != "bias":
                raise NotNative(f"{leaf.name}: its {name} is None")
            return None
        if type(value) not in (Tensor, nn.Parameter):
            raise NotNative(f"{leaf.name}: its {name} is a {type(value).__name__}")
        if value.dtype != torch.float32 or value.device != self.device:
            raise NotNative(f"{leaf.name}: its {name} is {str(value.dtype).removeprefix('torch.')} on {value.device}")
        if tuple(value.shape) != tuple(shape):
            raise NotNative(f"{leaf.name}: its {name} is {list(value.shape)}, chains need {list(shape)}")
        if not (value.is_contiguous() or (value.ndim == 2 and value.stride(1) == 1)):
            raise NotNative(f"{leaf.name}: its {name} is not contiguous")
        return value

    def number(self, module: nn.Module, name: str, leaf: Concept) -> float:
        """The attribute `name`, a number; raises `NotNative` if it is anything else, whose changes could go unseen."""
        value = self.value(module.__dict__, name)
        if type(value) not in (int, float):
            raise NotNative(f"{leaf.name}: its {name} is {'absent' if value is None else type(value).__name__}, not a number")
        return float(value)


def _plain(module: nn.Module, kind: type, leaf: Concept) -> None:
    """Raise unless `module` computes what `kind` does: its forward, no hook, no instance attribute in its way."""
    if type(module).forward is not kind.forward or type(module).__call__ is not nn.Module.__call__:
        raise NotNative(f"{leaf.name}: {type(module).__name__} overrides the forward of {kind.__name__}")
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or (
            module._backward_pre_hooks):
        raise NotNative(f"{leaf.name}: its {type(module).__name__} has hooks, or a forward of its own")


def _exact(module: nn.Module, kind: type, leaf: Concept) -> None:
    if type(module) is not kind:
        raise NotNative(f"{leaf.name}: {type(module).__name__} is not a plain {kind.__name__}")
    _plain(module, kind, leaf)


class _Native:
    """A leaf in the engine's terms; `unit` is its number in the plan, once `add` has been called."""

    units = 1
    mixture = False

    def __init__(self, leaf: Concept, index: int, size: int):
        self.leaf, self.index, self.size = leaf, index, size

    def add(self, plan, matrices: dict) -> None:
        """Declare the unit; `matrices` shares packed weights between leaves of one module."""
        raise NotImplementedError

    def load(self, plan, watch: Watch) -> None:
        """Hand over where parameters are now."""
        raise NotImplementedError


class _Coordinates(_Native):
    """Harmonic, DoubleWell, StyblinskiTang and Rosenbrock: numbers only."""

    def add(self, plan, matrices):
        kind = {energies.Harmonic: plan.add_diagonal, energies.Rosenbrock: plan.add_rosenbrock}
        self.unit = kind.get(_kind(self.leaf.source.model), plan.add_quartic)(self.index)

    def load(self, plan, watch):
        model = self.leaf.source.model

        def number(module, name):
            return watch.number(module, name, self.leaf)

        match _kind(model):
            case energies.Harmonic:
                plain = {"dtype": torch.float32, "device": watch.device}  # whatever torch's defaults are
                self.keep = torch.zeros(self.size, **plain), torch.full((self.size,), number(model, "k"), **plain)
                plan.set_vectors(self.unit, self.keep[0].data_ptr(), self.keep[1].data_ptr(), 0, 0)
            case energies.Rosenbrock:
                if self.size < 2:
                    raise NotNative(f"{self.leaf.name}: Rosenbrock needs at least 2 numbers per chain")
                plan.set_constants(self.unit, 0.0, number(model, "a"), number(model, "b"), 0.0)
            case energies.DoubleWell:
                plan.set_constants(self.unit, 0.0, number(model, "barrier_height"), number(model, "b") ** 2, 0.0)
            case _:  # 1/2 (x^4 - 16 x^2 + 5 x) = 1/2 (x^2 - 8)^2 + 5/2 x - 32
                plan.set_constants(self.unit, -32.0 * self.size, 0.5, 8.0, 2.5)


class _Gaussians(_Native):
    """Gaussian and GaussianMixture: one unit per component; the mixture's logsumexp is part of the program."""

    def __init__(self, leaf, index, size):
        super().__init__(leaf, index, size)
        self.model = leaf.source.model
        self.mixture = _kind(self.model) is energies.GaussianMixture
        self.units = len(self.model.means) if self.mixture else 1
        self.full = (self.model.precisions.ndim == 3) if self.mixture else (self.model.precision.ndim == 2)

    def add(self, plan, matrices):
        size = self.size
        self.matrices = [core.PackedMatrix(size, size, False) for _ in range(self.units)] if self.full else []
        added = [plan.add_full(self.index, m) for m in self.matrices] or [plan.add_diagonal(self.index) for _ in range(self.units)]
        self.unit = added[0]

    def load(self, plan, watch):
        one = (self.size, self.size) if self.full else (self.size,)
        tensor, count = watch.tensor, self.units
        if self.mixture:
            means = tensor(self.model, "means", (count, self.size), self.leaf)
            precisions = tensor(self.model, "precisions", (count, *one), self.leaf)
            self.log_weights = tensor(self.model, "log_weights", (count,), self.leaf)
        else:
            means, precisions = tensor(self.model, "mean", one[:1], self.leaf), tensor(self.model, "precision", one, self.leaf)
        for i in range(count):
            mean, precision = (means[i], precisions[i]) if self.mixture else (means, precisions)
            if self.full:
                self.matrices[i].set_source(precision.data_ptr(), precision.stride(0))
            plan.set_vectors(self.unit + i, mean.data_ptr(), 0 if self.full else precision.data_ptr(), 0, 0)


class _Perceptron(_Native):
    """MLP, and Sequential of Linear layers and activations."""

    def __init__(self, leaf, index, size, bf16, slots, watch):
        super().__init__(leaf, index, size)
        self.bf16, model = bf16, leaf.source.model
        mlp = _kind(model) is energies.MLP
        self.linears, self.activations = _mlp_layers(leaf, watch) if mlp else _sequential_layers(leaf, watch)
        self.modulations = list(model.modulations) if mlp else []
        self.conditioning = model.conditioning if mlp else "concat"
        self.width = model.condition_dim if mlp else 0
        self.slot, self.fixed = -1, [0.0] * self.width
        condition = leaf.condition
        if condition is not None:
            if not self.width:
                raise NotNative(f"{leaf.name}: {type(model).__name__} takes no condition")
            if isinstance(condition, Slot):
                self.slot, self.fixed = slots.index(condition.name), []
            elif len(condition) != self.width:
                raise NotNative(f"{leaf.name}: its condition has {len(condition)} numbers, the model takes {self.width}")
            else:
                self.fixed = list(condition)

    def add(self, plan, matrices):
        self.inputs = [self.size, *(linear.out_features for linear in self.linears[:-1])]
        self.matrices = []
        for i, linear in enumerate(self.linears[:-1]):
            key = id(linear), i == 0
            if key not in matrices:
                matrices[key] = core.PackedMatrix(linear.out_features, self.inputs[i], self.bf16 and i > 0)
            self.matrices.append(matrices[key])
        self.unit = plan.add_mlp(self.index, list(zip(self.matrices, self.activations)))

    def load(self, plan, watch):
        tensor, leaf = watch.tensor, self.leaf
        for i, (linear, matrix) in enumerate(zip(self.linears, self.matrices)):
            extra = self.width if i == 0 and self.conditioning == "concat" else 0
            out = linear.out_features
            weight = tensor(linear, "weight", (out, self.inputs[i] + extra), leaf)
            bias = tensor(linear, "bias", (out,), leaf)
            matrix.set_source(weight.data_ptr(), weight.stride(0))
            shift, scale = ((0, 0), 0), ((0, 0), 0)
            if extra:
                shift = (weight.data_ptr() + 4 * self.size, weight.stride(0)), 0
            elif self.modulations:
                shift, scale = self._modulation(self.modulations[i], out, watch)
            slot = self.slot if shift[0][0] else -1
            address = 0 if bias is None else bias.data_ptr()
            plan.set_conditioning(self.unit, i, self.width, slot, self.fixed, address, *shift, *scale)
        read_out = tensor(self.linears[-1], "weight", (1, self.inputs[-1]), leaf)
        bias = tensor(self.linears[-1], "bias", (1,), leaf)
        plan.set_vectors(self.unit, 0, 0, read_out.data_ptr(), 0 if bias is None else bias.data_ptr())

    def _modulation(self, linear, out, watch):
        """Where shift and scale of a hidden layer come from: ((weight, stride), bias) each."""
        film = self.conditioning == "film"
        weight = watch.tensor(linear, "weight", ((2 if film else 1) * out, self.width), self.leaf)
        bias = watch.tensor(linear, "bias", (2 * out,), self.leaf)
        address, stride = weight.data_ptr(), weight.stride(0)
        if not film:
            return ((address, stride), 0), ((0, 0), 0)
        bias = 0 if bias is None else bias.data_ptr()
        return ((address + 4 * out * stride, stride), bias + 4 * out if bias else 0), ((address, stride), bias)


NATIVE = (energies.Gaussian, energies.GaussianMixture, energies.Harmonic, energies.DoubleWell, energies.StyblinskiTang,
          energies.Rosenbrock, energies.MLP)


def _kind(model) -> type | None:
    """The native class whose forward this module has."""
    for kind in (*NATIVE, nn.Sequential):
        if isinstance(model, kind):
            return kind
    return None


def _activation(module: nn.Module, leaf: Concept, watch: Watch) -> int:
    kind = type(module)
    if kind not in ACTIVATIONS:
        raise NotNative(f"{leaf.name}: {kind.__name__} is not one of the engine's layers, Linear and "
                        f"{', '.join(k.__name__ for k in ACTIVATIONS)}")
    _plain(module, kind, leaf)
    if kind is nn.Softplus:
        beta, threshold = (watch.number(module, name, leaf) for name in ("beta", "threshold"))
        if (beta, threshold) != (1, 20):
            raise NotNative(f"{leaf.name}: Softplus with beta {beta:g} and threshold {threshold:g}, not 1 and 20")
    if kind is nn.GELU and watch.value(module.__dict__, "approximate") == "tanh":
        return GELU_TANH
    return ACTIVATIONS[kind]


def _mlp_layers(leaf: Concept, watch: Watch):
    model = leaf.source.model
    for module in (model, model.layers, model.modulations):
        watch.module(module)
    for linear in (*model.layers, *model.modulations, model.read_out):
        _exact(linear, nn.Linear, leaf)
        watch.module(linear)
    watch.module(model.activation)
    return [*model.layers, model.read_out], [_activation(model.activation, leaf, watch)] * len(model.layers)


def _sequential_layers(leaf: Concept, watch: Watch):
    watch.module(leaf.source.model)
    layers = [m for m in leaf.source.model if type(m) is not nn.Identity]
    for layer in leaf.source.model:
        watch.module(layer)
        if type(layer) is nn.Identity:
            _plain(layer, nn.Identity, leaf)
    linears, activations = layers[::2], [_activation(m, leaf, watch) for m in layers[1::2]]
    for linear in linears:
        _exact(linear, nn.Linear, leaf)
    if len(layers) % 2 == 0:
        raise NotNative(f"{leaf.name}: a Sequential must be Linear layers with one activation between them")
    if any(before.out_features != linear.in_features for before, linear in zip(linears, linears[1:])):
        raise NotNative(f"{leaf.name}: widths of its layers do not match")
    if linears[-1].out_features != 1:
        raise NotNative(f"{leaf.name}: its last layer has {linears[-1].out_features} outputs, not one energy")
    return linears, activations


def _describe(leaf: Concept, index: int, shape: Sequence[int], bf16: bool, slots: tuple[str, ...], watch: Watch) -> _Native:
    """The leaf in the engine's terms; raises `NotNative` with the reason."""
    model, kind, size = leaf.source.model, _kind(leaf.source.model), torch.Size(shape).numel()
    if kind is None:
        name = getattr(model, "__name__", type(model).__name__)
        raise NotNative(f"{leaf.name}: {name} is not a native energy (ebmfast.energies; Sequential of Linear and activations)")
    if not shape:
        raise NotNative(f"{leaf.name}: chains of no dimension")
    _plain(model, kind, leaf)
    if leaf.source.gives_gradient:
        raise NotNative(f"{leaf.name}: its gradients come from a function of its own")
    if leaf.source.takes_sigma or leaf.source.takes_keep:
        raise NotNative(f"{leaf.name}: it takes a noise level or a keep flag")
    if kind is nn.Sequential and len(shape) != 1:
        raise NotNative(f"{leaf.name}: a Sequential takes chains of one dimension, these are {list(shape)}")
    if kind in (energies.MLP, nn.Sequential):
        return _Perceptron(leaf, index, size, bf16, slots, watch)
    watch.module(model)
    if leaf.condition is not None:
        raise NotNative(f"{leaf.name}: {kind.__name__} takes no condition")
    return (_Gaussians if kind in (energies.Gaussian, energies.GaussianMixture) else _Coordinates)(leaf, index, size)


def _natural_shape(expression: Expression) -> tuple[int, ...]:
    """The shape that the composition's models suggest where none is given yet."""
    for leaf in expression.leaves:
        match model := leaf.source.model:
            case energies.MLP():
                return (model.dim,)
            case energies.Gaussian():
                return tuple(model.mean.shape)
            case energies.GaussianMixture():
                return tuple(model.means.shape[1:])
            case nn.Sequential() if linears := [m for m in model if isinstance(m, nn.Linear)]:
                return (linears[0].in_features,)
    return (2,)


def reason_against(expression: Expression, shape: Sequence[int] | None = None, compute_dtype: torch.dtype | None = None, *,
                   kind: type[Chain] | None = None, device: torch.device | str = "cpu") -> str | None:
    """Why the chain engine (`kind`, that of the CPU) cannot run this composition, naming the leaf; None if it can."""
    try:
        (kind or Chain)(expression, _natural_shape(expression) if shape is None else shape, compute_dtype, device=device)
    except NotNative as error:
        return str(error)
    return None


class Chain:
    """A composition of native energies over chains of one shape, ready to run.

    Args:
        expression: the composition.
        shape: shape S of one chain.
        compute_dtype: None or float32, or bfloat16 for the products of hidden layers with hidden layers, sums in
            float32 (the first layer, biases, activations and the state stay float32).
        device: where the parameters are.
        noise_first, clamp, clip_value, clip_norm: what every step does beside the gradient, as in `Langevin`.
        metropolis: "mala" or "hmc" for steps that accept or reject, whose `clamp` is the bounds of the domain; None for `Langevin`.
        leapfrogs, mass: of HMC; the mass broadcasts to `shape`.

    Raises:
        NotNative: with the reason, naming the leaf.
    """

    paced = True  # whether a call of `run` takes as long as its steps do

    def __init__(self, expression: Expression, shape: Sequence[int], compute_dtype: torch.dtype | None = None, *,
                 device: torch.device | str = "cpu", noise_first: bool = False, clamp: tuple[float, float] | None = None,
                 clip_value: float | None = None, clip_norm: float | None = None, metropolis: str | None = None,
                 leapfrogs: int = 1, mass: Tensor | float = 1.0):
        if any(GLOBAL_HOOKS):
            raise NotNative("global hooks are registered")
        bf16 = compute_dtype == torch.bfloat16
        if compute_dtype not in (None, torch.float32) and not bf16:
            raise NotNative(f"compute_dtype {str(compute_dtype).removeprefix('torch.')}: the engine has float32 and bfloat16")
        if bf16 and not self._has_bf16():
            raise NotNative(f"compute_dtype bfloat16 needs AVX512-BF16; this level is {core.isa()}")
        if not expression.leaves:
            raise NotNative("the composition has no leaf")
        self.expression, self.bf16, self.device = expression, bf16, torch.device(device)
        self.size = torch.Size(shape).numel()
        self.lock = threading.RLock()  # over a refresh and what relies on it
        self._recognised, self._parameters, self._dead = Watch(self.device), Watch(self.device), False
        for hooks in GLOBAL_HOOKS:
            self._recognised.hooks(hooks)
        slots, watch = expression.slots, self._recognised
        self.natives = [_describe(leaf, k, shape, bf16, slots, watch) for k, leaf in enumerate(expression.leaves)]
        starts = [0, *itertools.accumulate(n.units for n in self.natives)]
        self._plan = self._new_plan([c for code in expression.program.codes for c in self._expand(code, starts)])
        matrices: dict = {}
        for native in self.natives:
            native.add(self._plan, matrices)
        self._plan.set_sampler(noise_first, clamp, clip_value, clip_norm)
        if metropolis is not None:
            try:
                masses = torch.as_tensor(mass, dtype=torch.float32, device="cpu").expand(tuple(shape)).flatten().tolist()
            except RuntimeError:
                raise NotNative(f"a mass that does not broadcast to {list(shape)}") from None
            self._plan.set_metropolis(metropolis == "hmc", leapfrogs, masses)
        slotted = [n for n in self.natives if isinstance(n.leaf.condition, Slot)]
        self.widths = {n.leaf.condition.name: n.width for n in slotted}
        for native in slotted:
            if native.width != self.widths[native.leaf.condition.name]:
                raise NotNative(f"{native.leaf.name}: others take {self.widths[native.leaf.condition.name]} numbers of that slot")
        self._mixtures = any(n.mixture for n in self.natives)
        self._sigma: object = object()
        self._load()
        self._check_scratch()

    @staticmethod
    def refusal(options: Mapping) -> str | None:
        """Why this engine does not take a sampler's steps of those options; None if it does."""
        return None

    def _has_bf16(self) -> bool:
        return core.chain_bf16()

    def _new_plan(self, codes: list[tuple[int, int]]):
        return core.ChainPlan(self.size, codes)

    def _check_scratch(self) -> None:
        if self._plan.scratch_bytes() > MOST_SCRATCH:
            needs = self._plan.scratch_bytes() >> 20
            raise NotNative(f"chains of {self.size} numbers would need {needs} MiB of scratch memory per thread")

    def _expand(self, code: tuple[int, int], starts: list[int]) -> list[tuple[int, int]]:
        kind, k = code
        if kind != Program.LEAF:
            return [code]
        units = [(Program.LEAF, starts[k] + i) for i in range(self.natives[k].units)]
        return [*units, (Program.LOGSUMEXP, len(units))] if self.natives[k].mixture else units

    def _load(self) -> None:
        watch = Watch(self.device)
        for native in self.natives:
            native.load(self._plan, watch)
        self._parameters = watch

    def refresh(self) -> bool:
        """Read parameters as they are now. False if a module is no longer what was recognised."""
        if self._dead or not self._recognised.unchanged() or (self.bf16 and not self._has_bf16()):
            return False
        if not self._parameters.unchanged():
            try:
                self._load()
            except NotNative:
                self._dead = True  # some addresses are taken anew, some are not
                return False
        self._read()
        return True

    def _read(self) -> None:
        self._plan.refresh()

    def bind(self, rows: Mapping[str, Tensor]) -> BoundChain:
        """The chain engine under conditions `{slot: [B, C]}`."""
        for slot, width in self.widths.items():
            if rows[slot].shape[1] != width:
                raise ValueError(f"`conditions[{slot!r}]` must have {width} columns, got {rows[slot].shape[1]}")
        return BoundChain(self, [rows[s].to(self.device, torch.float32).contiguous() for s in self.expression.slots])

    def _set_values(self, sigma: float | None) -> None:
        """Program values at a noise level; those of mixtures are read anew."""
        if sigma == self._sigma and not self._mixtures:
            return
        parts = (part.tolist() if isinstance(part, Tensor) else part for part in self._values(sigma))
        self._plan.set_values([*itertools.chain.from_iterable(parts)])
        self._sigma = sigma

    def _values(self, sigma: float | None) -> Iterator[list[float] | Tensor]:
        """Program values in order, those of mixtures as they stand in the module."""
        program, used = self.expression.program, 0
        for code, operand in program.codes:
            if code == Program.LEAF:
                native = self.natives[operand]
                if native.mixture:
                    yield [1.0]
                    yield native.log_weights
                continue
            count = operand + (code == Program.LOGSUMEXP)
            yield [weight_at(v, sigma) for v in program.values[used:used + count]]
            used += count

    def energies(self, x: Tensor, conditions: Sequence[Tensor]) -> list[Tensor]:
        """E_k(x), K tensors `[B]` in leaf order; `refresh` comes first."""
        out = x.new_empty(sum(n.units for n in self.natives), len(x))
        self._unit_energies(x, conditions, out)
        columns, start = [], 0
        for native in self.natives:
            part = out[start:start + native.units]
            start += native.units
            columns.append(-torch.logsumexp(native.log_weights[:, None] - part, 0) if native.mixture else part[0])
        return columns

    def _unit_energies(self, x: Tensor, conditions: Sequence[Tensor], out: Tensor) -> None:
        self._plan.energies(x.data_ptr(), len(x), [c.data_ptr() for c in conditions], out.data_ptr(), torch.get_num_threads())

    def steps_within(self, seconds: float, chains: int) -> int:
        """About how many steps of `chains` chains take that long; a guess that the caller corrects by the clock."""
        return int(seconds * MULTIPLICATIONS_PER_SECOND / (self._plan.work() * max(chains, 1)))

    def run(self, x: Tensor, faults: Tensor, conditions: Sequence[Tensor], drift: Tensor, noise: Tensor, sigma: float | None, *,
            step: int, seed: int, first_chain: int, frozen_mask: Tensor | None = None, **metropolis) -> bool:
        """Steps `step` to `step + len(drift) - 1` of every chain without a fault, in place; whether none has one after them.

        `refresh` comes first. `metropolis`: addresses and numbers of steps that accept or reject (`samplers.metropolis`)."""
        self._set_values(sigma)
        per_chain, stream = frozen_mask is not None and frozen_mask.ndim == x.ndim, metropolis.pop("stream", rng.NOISE)
        return self._plan.run(
            x.data_ptr(), x.shape[0], seed, first_chain, stream, step, drift.shape[0], drift.data_ptr(), noise.data_ptr(),
            [c.data_ptr() for c in conditions], 0 if frozen_mask is None else frozen_mask.data_ptr(), per_chain,
            faults.data_ptr(), torch.get_num_threads(), **metropolis)


class BoundChain:
    """A chain engine with the conditions of its chains, slot after slot `[B, C]`; stands where an `Evaluator` would."""

    def __init__(self, chain: Chain, conditions: list[Tensor]):
        self.chain, self.conditions = chain, conditions

    def refresh(self) -> None:
        """Read parameters as they are now."""
        if not self.chain.refresh():
            raise RuntimeError('a callback changed a model so that the chain engine cannot go on; pass engine="step"')

    def energies(self, x: Tensor, sigma: float | None = None) -> list[Tensor]:
        """E_k(x), K tensors `[B]` in leaf order. Native energies know no noise level."""
        return self.chain.energies(x.contiguous(), self.conditions)

    def total(self, energies: list[Tensor], sigma: float | None = None) -> Tensor:
        """E(x) `[B]` from the energies of the leaves."""
        return self.chain.expression.program.evaluate(energies, sigma)

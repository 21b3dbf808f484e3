"""The public surface: what importing it costs, and that every part of it is typed."""

import inspect
import subprocess
import sys

import pytest

import ebmfast as ef
from ebmfast import rng
from ebmfast.compat import research, torchebm

# What drivers and kernels ask of samplers and states, public in Python's sense alone.
INTERNAL = {"bind", "coefficients", "carry", "step_sizes", "step_scale", "native_options", "native_step", "describe", "begin",
            "update", "scale", "left", "check_grounded"}
HEAVY = ("PIL", "matplotlib", "mitsuba", "drjit", "jax", "torchebm", "blackjax", "triton", "tqdm", "pandas", "scipy", "pyarrow",
         "fsspec", "ray", "pytest", "torch._dynamo", "torch._inductor", "torch.utils.data", "ebmfast.training", "ebmfast.scenes",
         "ebmfast.compat", "ebmfast.cli", "ebmfast.benchmark", "ebmfast.doctor", "ebmfast.evaluation", "ebmfast.kernels")


def test_importing_is_light():
    """Counted in modules, not in seconds: beyond torch, only ours, safetensors and the standard library."""
    code = ("import sys, torch, numpy; before = set(sys.modules); import ebmfast;"
            "print('\\n'.join(sorted(set(sys.modules) - before)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ebmfast.sampling" in loaded
    assert not [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in HEAVY)]
    known = {*sys.stdlib_module_names, "ebmfast", "safetensors", "torch", "numpy"}
    assert not {name for n in loaded if (name := n.partition(".")[0]) not in known and not name.startswith("_")}
    assert sum(name.startswith("ebmfast") for name in loaded) < 80 and len(loaded) < 300


def surface():
    """Name and function of everything public."""
    for name in ef.__all__:
        thing = getattr(ef, name)
        if inspect.ismodule(thing):
            yield from ((f"{name}.{k}", getattr(thing, k)) for k in getattr(thing, "__all__", ()))
        else:
            yield name, thing
    yield from ((f"rng.{k}", getattr(rng, k)) for k in ("normal", "uniform", "resolve_seed"))
    models = ("concepts", "recommended", "own_priors", "card", "names", "load", "family")
    yield from ((f"zoo.{k}", getattr(ef.zoo, k)) for k in models)
    for module in (torchebm, research):
        yield from ((f"{module.__name__}.{k}", getattr(module, k)) for k in module.__all__)


FUNCTIONS = [(name, thing) for name, thing in surface() if callable(thing)]


def untyped(function, name):
    """Names of its parameters without a type, and "return"."""
    found = inspect.signature(function)
    missing = [p.name for p in found.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
    if found.return_annotation is found.empty and not inspect.isclass(function) and not name.endswith("__init__"):
        missing.append("return")
    return missing


@pytest.mark.parametrize("name, thing", FUNCTIONS, ids=[n for n, _ in FUNCTIONS])
def test_every_part_of_it_has_a_type_and_a_docstring(name, thing):
    assert inspect.getdoc(thing)
    bare = inspect.isclass(thing) and issubclass(thing, Exception) and "__init__" not in vars(thing)
    if thing is not ef.Run and not bare:  # a Run is made by `prepare`, never by hand
        assert not untyped(thing, name)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not member.startswith("_") and member not in INTERNAL and inspect.isfunction(function):
                assert not untyped(function, member), member
                assert function.__doc__, member

"""`python docs/api.py`: writes docs/api/*.md from the docstrings of what users call."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

HERE = Path(__file__).parent / "api"
# What drivers and kernels ask of samplers and states.
INTERNAL = {"bind", "coefficients", "carry", "step_sizes", "step_scale", "native_options", "native_step", "describe", "begin",
            "update", "scale", "left", "noise_levels", "initial_scale", "needs_energies", "clamp", "carried", "fixed_schedule"}
PAGES = {
    "composition": ("Composition", "ebmfast", (
        "Concept", "Family", "Slot", "Expression", "all_of", "any_of", "negate", "with_prior", "without", "parse", "from_json",
        "AboveSigma", "PiecewiseSigma", "UngroundedNegationError")),
    "sampling": ("Sampling", "ebmfast", (
        "sample", "prepare", "Run", "Result", "Report", "SampleState", "Trace", "TraceResult", "StepInfo", "Fault",
        "NonFiniteError", "RunawayError", "Interrupted", "CoupledError", "DrawBranches", "log_partition", "root_branches")),
    "samplers": ("Samplers", "ebmfast", ("Langevin", "MALA", "HMC", "BAOAB", "Annealed", "DualAveraging")),
    "inference": ("Inference and calibration", "ebmfast", (
        "infer", "Inference", "ConditionSamples", "calibrate", "Calibrated", "Calibration")),
    "datasets": ("Data sets", "ebmfast.generate", ("generate", "load_dataset")),
    "energies": ("Native energies", "ebmfast.energies", None),
    "diagnostics": ("Diagnostics", "ebmfast.diagnostics", ("split_rhat", "ess", "Diagnostics")),
    "rng": ("Noise", "ebmfast.rng", ("normal", "uniform", "resolve_seed")),
    "zoo": ("Bundled models", "ebmfast.zoo", (
        "concepts", "recommended", "own_priors", "card", "names", "load", "load_from", "family")),
    "compat-torchebm": ("torchebm's samplers", "ebmfast.compat.torchebm", ("LangevinDynamics", "HamiltonianMonteCarlo")),
    "compat-research": ("Research loops", "ebmfast.compat.research", None),
}


def pages() -> dict[str, str]:
    """File name → text."""
    found = {}
    for file, (title, module_name, names) in PAGES.items():
        module = importlib.import_module(module_name)
        parts = [f"# {title}", ""]
        if module_name != "ebmfast":
            parts += [f"`{module_name}`", "", _prose(module), ""]
        for name in names or module.__all__:
            parts += _entry(getattr(module, name), name, 2) if hasattr(module, name) else []
        found[f"{file}.md"] = "\n".join(parts).rstrip() + "\n"
    index = [f"- [{title}]({file}.md)" for file, (title, _, _) in PAGES.items()]
    found["index.md"] = "\n".join(["# API", "", "Made from docstrings by `make docs`.", "", *index]) + "\n"
    return found


def _entry(thing, name: str, level: int) -> list[str]:
    """Heading, signature and docstring of a function or class, and those of a class's methods."""
    if not callable(thing):
        return []
    lines = [f"{'#' * level} {name}", "", "```text", f"{name}{_signature(thing)}", "```", "", _prose(thing), ""]
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and member not in INTERNAL:
                lines += _member(value, member, level + 1)
    return lines


def _member(value, name: str, level: int) -> list[str]:
    if isinstance(value, property):
        text = _prose(value.fget)
        return [f"{'#' * level} .{name}", "", text, ""] if text else []
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if not inspect.isfunction(function) or not function.__doc__:
        return []
    return [f"{'#' * level} .{name}", "", "```text", f"{name}{_signature(function)}", "```", "", _prose(function), ""]


class _Written(str):
    """An annotation as it was written, without the quotes that Python shows it in; those of defaults stay."""

    __repr__ = str.__str__

    @classmethod
    def of(cls, annotation):
        return cls(annotation) if isinstance(annotation, str) else annotation


def _signature(thing) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "(...)"
    text = str(signature.replace(
        parameters=[p.replace(annotation=_Written.of(p.annotation)) for p in signature.parameters.values()],
        return_annotation=_Written.of(signature.return_annotation)))
    text = re.sub(r" at 0x[0-9a-f]+", "", text.replace("ebmfast.", ""))
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"^\((self|cls)(, )?", "(", text)
    if len(text) <= 110:
        return text
    inside, after = text[1:].rsplit(")", 1)
    return "(\n    " + ",\n    ".join(_split(inside)) + ",\n)" + after


def _split(arguments: str) -> list[str]:
    """Arguments at the commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(arguments[begin:i].strip())
            begin = i + 1
    return [*parts, arguments[begin:].strip()]


def _prose(thing) -> str:
    """A docstring as Markdown: sections become bold words, arguments list items, indented formulas code."""
    doc = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and "__doc__" not in vars(thing):
        doc = ""
    if doc.startswith(f"{getattr(thing, '__name__', '')}("):
        doc = ""  # what a dataclass or NamedTuple writes by itself
    lines, section = [], False
    for line in doc.splitlines():
        heading = re.fullmatch(r"(Args|Raises|Returns|Attributes|Buffers):", line)
        argument = re.match(r"    (\*{0,2}[\w`][\w, .`]*): (.*)", line) if section else None
        if heading:
            lines += ["", f"**{heading[1]}**", ""]
            section = True
        elif argument:
            lines.append(f"- `{argument[1]}`: {argument[2]}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def main() -> None:
    """Write all pages, and take away those that are none any more."""
    HERE.mkdir(exist_ok=True)
    found = pages()
    for path in HERE.glob("*.md"):
        if path.name not in found:
            path.unlink()
    for name, text in found.items():
        (HERE / name).write_text(text)
    print(f"wrote {len(found)} pages to {HERE}")


if __name__ == "__main__":
    main()

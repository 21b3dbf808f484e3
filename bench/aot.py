"""`python -m bench.aot`: every Triton kernel compiled ahead of time, without a GPU, through the launches that a GPU would see.

Prints registers, spills and fused multiply-adds of each, and writes them to `bench/results/triton_aot.json`.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from ebmfast.kernels import accept, fill, launch, program, step
from triton.backends.compiler import GPUTarget

from ebmfast import rng
from ebmfast.program import Program

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
RESULTS = Path(__file__).parent / "results" / "triton_aot.json"
# (E_0 OR (E_1 + 0.5 E_2)) + 2 E_3
NESTED = Program(((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 2)), (1.0, 0.5, 1.0, 0.0, -0.5, 1.0, 2.0), 4)


class _Driver:
    """What Triton asks the driver for before it compiles."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> str:
        return self._name  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


def _step(
    k: int = 3, shape: tuple[int, ...] = (64, 3, 64, 64), dtype: torch.dtype = torch.float32, graph: bool = False, **options
) -> Callable[[], None]:
    fixed = {"weights_per_chain": False, "seed": 1, "first_chain": 0, "stream": rng.NOISE, "clamp": None, "grad_clip_value": None}
    fixed |= {"grad_clip_norm": None, "frozen_mask": None, "faults": None}
    plan = step.StepPlan(torch.zeros(shape), n_gradients=k, **(fixed | options))
    per_chain = options.get("weights_per_chain", False)
    gradients, weights = torch.zeros((k, *shape), dtype=dtype), torch.zeros((k, shape[0]) if per_chain else (k,))
    time = (torch.zeros(60), torch.zeros(60), torch.zeros(step.CLOCK, dtype=torch.int64)) if graph else (0.1, 0.3, 5)
    return lambda: plan(gradients, weights, *time)


def cases() -> dict[str, Callable[[], None]]:
    """What is compiled: launches by name."""
    noise = {"seed": 1, "step": 5, "stream": rng.NOISE, "first_chain": 0, "first_element": 0}
    out, flags = torch.zeros(64, 3, 64, 64), torch.zeros(64, dtype=torch.bool)
    every = {
        "clamp": (-1.0, 1.0), "grad_clip_value": 1.0, "grad_clip_norm": 1.0, "weights_per_chain": True,
        "frozen_mask": torch.zeros(64, 3, 64, 64, dtype=torch.bool), "faults": torch.zeros(64, dtype=torch.int64),
    }  # fmt: skip
    energies, weights, total = torch.zeros(4, 4096), torch.zeros(4, 4096), torch.zeros(4096)
    return {
        "normals": lambda: fill.fill(out, uniform=False, **noise),
        "uniforms": lambda: fill.fill(out, uniform=True, **noise),
        "step": _step(faults=torch.zeros(64, dtype=torch.int64)),
        "step, odd size": _step(shape=(65, 2, 37, 41)),
        "step, K = 0": _step(k=0),
        "step, K = 8, bfloat16, every option": _step(k=8, dtype=torch.bfloat16, **every),
        "step, float16": _step(k=1, dtype=torch.float16),
        "step, in a graph": _step(graph=True, faults=torch.zeros(64, dtype=torch.int64)),
        "step, K = 0, in a graph": _step(k=0, graph=True, faults=torch.zeros(64, dtype=torch.int64)),
        "program": lambda: program.ProgramPlan(NESTED, total.device)(energies, total, weights),
        "accept": lambda: accept.accept(out, out.clone(), torch.zeros(64), flags, seed=1, step=5, first_chain=0),
    }


def compile_all(target: str, names: list[str] | None = None) -> list[dict]:
    """Of each kernel that the cases launch: name, registers, spills, fused multiply-adds and the assembly (``text``)."""
    rows = []
    for name, run in cases().items():
        if names is None or name in names:
            with _compiling_for(target), launch.compile_only() as compiled:
                run()
            rows += [{"case": name, "kernel": k.metadata.name, "target": target, **_examine(k, target)} for k in compiled]
    return rows


@contextlib.contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(target))
    try:
        with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            yield
    finally:
        driver._active = before


def _examine(kernel, target: str) -> dict:
    return _nvidia(kernel.asm["ptx"]) if target.startswith("sm_") else _amd(kernel.asm["amdgcn"])


def _nvidia(ptx: str) -> dict:
    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        architecture = re.search(r"^\.target (\w+)", ptx, re.M)[1]
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    fused = {"f32": len(re.findall(r"\bfma\.\S*f32", ptx)), "f64": len(re.findall(r"\bfma\.\S*f64", ptx))}
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spills": spills, "fused": fused, "text": ptx}


def _amd(assembly: str) -> dict:
    number = {k: int(v) for k, v in re.findall(r"^\s*\.(\w+_count):\s+(\d+)", assembly, re.M)}
    fused = {w: len(re.findall(rf"\bv_(?:pk_)?(?:fma|mad|mac|fmac)\w*_{w}", assembly)) for w in ("f32", "f64")}
    return {
        "registers": number["vgpr_count"], "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"], "fused": fused,
        "text": assembly,
    }  # fmt: skip


def main() -> None:
    rows = [row for target in TARGETS for row in compile_all(target)]
    print(f"{'case':<38} {'kernel':<16} {'target':<8} {'registers':>9} {'spills':>6}  fused f32, f64")
    for row in rows:
        del row["text"]
        print(
            f"{row['case']:<38} {row['kernel']:<16} {row['target']:<8} {row['registers']:>9} {row['spills']:>6}  "
            f"{row['fused']['f32']}, {row['fused']['f64']}"
        )
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'"triton": "{triton.__version__}", "num_warps": {launch.OPTIONS["num_warps"]}'
    RESULTS.write_text(f'{{{head}, "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()

"""`python -m bench.cuda_registers`: the CUDA kernels compiled by nvcc for sm_80 and sm_90, without a GPU.

Prints registers, spills and static shared memory of each, and writes them to `bench/results/cuda_registers.json`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/cuda_registers.json"
ARCHITECTURES = ("sm_80", "sm_90")
SOURCES = ("step", "chain")
# As cmake/cuda.cmake has them.
FLAGS = ("-std=c++17", "--fmad=false", "-cubin", "-Xptxas", "-v", "-I", str(ROOT / "csrc"))


def kernels(source: str) -> list[str]:
    """Names of the kernels in `csrc/cuda/{source}.cu`."""
    text = (ROOT / "csrc/cuda" / f"{source}.cu").read_text()
    return re.findall(r"__global__ void (?:__launch_bounds__\(.*\) )?(\w+)\(", text)


def compiled(source: str, architecture: str, cubin: Path) -> list[dict]:
    """Of each kernel of `csrc/cuda/{source}.cu`: name, registers, bytes of spills and of static shared memory."""
    command = ["nvcc", *FLAGS, f"-arch={architecture}", str(ROOT / "csrc/cuda" / f"{source}.cu"), "-o", str(cubin)]
    names = kernels(source)
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        name, *values = re.search(rf"({'|'.join(names)})(?:ILi(\d+)E(?:Lb(\d)E)?)?", part.split("'", 1)[0]).group(1, 2, 3)
        rows.append({
            "kernel": name + (f"<{', '.join(v for v in values if v)}>" if values[0] else ""), "architecture": architecture,
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", part))),
            "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
        })  # fmt: skip
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for a in ARCHITECTURES for s in SOURCES for row in compiled(s, a, Path(folder) / "out.cubin")]
    told = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", told)
    print(f"{'kernel':<22} {'architecture':<12} {'registers':>9} {'spills':>6} {'shared':>6}")
    for row in rows:
        print(f"{row['kernel']:<22} {row['architecture']:<12} {row['registers']:>9} {row['spills']:>6} {row['shared']:>6}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"nvcc": "{version[1]}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()

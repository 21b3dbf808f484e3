"""The build: instruction-set files, the choice among them, what a broken installation says, and CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ebmfast._native import core

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", *core.build_info()["flags"].split(), "-fPIC", "-fvisibility=hidden", "-c"]
MARCH = {
    "scalar": ["-march=x86-64"],
    "baseline": ["-march=x86-64"],
    "x86-64-v3": ["-march=x86-64-v3"],
    "x86-64-v4": ["-march=x86-64-v4"],
    "x86-64-v4-bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
X86 = os.uname().machine == "x86_64"


def need(*tools: str) -> list[str]:
    found = [shutil.which(tool) for tool in tools]
    if None in found:
        pytest.skip(f"needs {', '.join(tools)}")
    return found


def run(*command, check: bool = True, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | (env or {}),
        **options,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module", params=MARCH if X86 else ["scalar"])
def level(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    """The files of one instruction set, compiled as CMake does; also the levels that this CPU cannot run."""
    (compiler,) = need("g++")
    folder = tmp_path_factory.mktemp("level")
    march = MARCH[request.param] if X86 else []
    defines = ["-DEBMFAST_TABLE=table", "-DEBMFAST_CHAIN_TABLE=table", '-DEBMFAST_LEVEL="test"']
    defines += ["-DEBMFAST_SCALAR"] if request.param == "scalar" else []
    objects = {}
    for name in ("kernels", "chain_kernels"):
        objects[name] = folder / f"{name}.o"
        run(compiler, *FLAGS, *march, *defines, CSRC / f"{name}.cpp", "-o", objects[name])
    return request.param, objects


@pytest.mark.parametrize("name", ["kernels", "chain_kernels"])
def test_no_weak_symbols(level, name):
    """A weak symbol could be the copy that the linker gives to every level."""
    (nm,) = need("nm")
    lines = [line.split() for line in run(nm, "-C", level[1][name]).stdout.splitlines()]
    defined = [line for line in lines if len(line) > 2 and re.match("[0-9a-f]+$", line[0])]
    assert not [line for line in defined if line[1] in "wWvVu"]
    assert [line[2] for line in defined if line[1].isupper()] == ["ebmfast::table"]


def test_no_contraction_and_vectors_are_used(level):
    """No fused multiply-add, no call to sqrt; and the products of Philox fill the registers of the level."""
    (objdump,) = need("objdump")
    text = run(objdump, "-d", "--no-show-raw-insn", level[1]["kernels"]).stdout
    assert not re.search(r"\bv?fn?m(add|sub)", text) and "sqrtf" not in text
    if X86 and level[0] != "scalar":
        register = {"baseline": "xmm", "x86-64-v3": "ymm"}.get(level[0], "zmm")
        assert len(re.findall(rf"\bv?pmuludq .*%{register}", text)) >= 40


@pytest.mark.skipif(not X86, reason="x86 instructions")
def test_products_of_matrices_use_the_registers_of_the_level(level):
    """Fused multiply-adds on whole registers, pairs of bfloat16 where the level has them; nothing wider than the level."""
    (objdump,) = need("objdump")
    text = run(objdump, "-d", "--no-show-raw-insn", level[1]["chain_kernels"]).stdout
    fused = {register: len(re.findall(rf"\bvfmadd.*%{register}", text)) for register in ("xmm", "ymm", "zmm")}
    if level[0] in ("scalar", "baseline"):
        assert not any(fused.values()) and "%ymm" not in text
    else:
        register = "ymm" if level[0] == "x86-64-v3" else "zmm"
        assert fused[register] > 200 and fused[register] > 20 * fused["xmm"]
    assert ("vdpbf16ps" in text) == (level[0] == "x86-64-v4-bf16")
    assert "%zmm" not in text or level[0].startswith("x86-64-v4")


def test_no_stl():
    files = ("kernels.cpp", "kernels.h", "chain_kernels.cpp", "chain_kernels.h", "chain_tile.h", "chain_langevin.h",
             "chain_metropolis.h", "simd.h", "philox.h", "lane_math.h")
    allowed = {"stddef.h", "stdint.h", "immintrin.h", *files}
    for name in files:
        assert set(re.findall(r"#include [<\"](.*)[>\"]", (CSRC / name).read_text())) <= allowed, name


def import_native(**env: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", "import ebmfast._native as n; print(n.core.isa())", check=False, env=env)


@pytest.mark.parametrize("name", [name for name, supported, _ in core.levels() if supported])
def test_a_level_can_be_forced(name):
    assert import_native(EBMFAST_ISA=name).stdout.strip() == name


def test_an_unknown_level_is_an_error():
    done = import_native(EBMFAST_ISA="avx9000")
    names = ", ".join(name for name, _, _ in core.levels())
    assert done.returncode != 0
    assert f"ValueError: EBMFAST_ISA: unknown instruction set 'avx9000'; known: {names}" in done.stderr


@pytest.mark.parametrize("name", [name for name, supported, _ in core.levels() if not supported])
def test_a_level_the_cpu_lacks_is_an_error(name):
    done = import_native(EBMFAST_ISA=name)
    assert done.returncode != 0 and f"this CPU cannot run instruction set '{name}'" in done.stderr


@pytest.mark.parametrize(
    ("in_source_tree", "advice"),
    [
        (True, "hides the installed package. Build it in place with `pip install -e"),
        (False, "pip install --force-reinstall"),
    ],
)
def test_a_missing_build_says_what_to_do(tmp_path, in_source_tree, advice):
    package = tmp_path / "ebmfast"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "ebmfast" / "_native.py", package)
    if in_source_tree:
        (tmp_path / "csrc").mkdir()
    # -S -s keep an editable installation's import hook out.
    done = run(sys.executable, "-S", "-s", "-c", "import ebmfast._native", check=False, cwd=tmp_path)
    assert done.returncode != 0 and "ImportError: ebmfast's compiled part cannot be loaded" in done.stderr
    assert advice in done.stderr


def test_build_info():
    info = core.build_info()
    assert info["version"] == "0.1.0" and "-ffp-contract=off" in info["flags"] and info["compiler"]
    assert [lanes for _, _, lanes in core.levels()] == ([1, 4, 8, 16, 16] if X86 else [1])


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["step", "chain"])
def test_cuda_compiles(tmp_path, source, architecture):
    """For both architectures, without spilling registers; but one, where scratch is in global memory anyway."""
    (nvcc,) = need("nvcc")
    flags = ["-std=c++17", "--fmad=false", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-I", CSRC]
    log = run(nvcc, *flags, CSRC / "cuda" / f"{source}.cu", "-o", tmp_path / "out.cubin").stderr
    assert (tmp_path / "out.cubin").stat().st_size > 0
    assert re.search(r"Used \d+ registers", log)
    for kernel in log.split("Compiling entry function '")[1:]:
        allowed = 16 if "chain_blocksILi8ELb0E" in kernel.split("'")[0] else 0
        assert sum(map(int, re.findall(r"(\d+) bytes spill", kernel))) <= allowed, kernel

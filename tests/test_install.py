"""A wheel built from the source distribution works in a fresh environment, from any folder."""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "cmake", "csrc", "ebmfast", "kernels")


def call(*command, cwd, **env):
    command = [str(c) for c in command]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the sources, and a Python that has the wheel built from their sdist beside this one's torch."""
    for module in ("scikit_build_core", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel here needs {module}, from the extra ebmfast[test]")
    if not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None:
        pytest.skip("building a wheel here needs cmake on the PATH and a source checkout")
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")) if path.is_dir() else \
            shutil.copy(path, source / name)
    made = call(sys.executable, "-c", "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])",
                folder, cwd=source)
    assert made.returncode == 0, made.stdout + made.stderr
    (sdist,) = folder.glob("ebmfast-*.tar.gz")
    built = call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, sdist,
                 cwd=folder, EBMFAST_CUDA="OFF")
    assert built.returncode == 0, built.stdout + built.stderr
    assert call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder).returncode == 0
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("ebmfast-*.whl")
    done = call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return python, source, folder


def test_the_wheel_works_from_any_folder(fresh):
    python, _, folder = fresh
    done = call(python, "-m", "ebmfast", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    where = call(python, "-c", "import ebmfast.kernels, ebmfast; print(ebmfast.__file__)", cwd=folder)
    assert str(folder / "venv") in where.stdout, where.stdout + where.stderr
    models = call(python.parent / "ebmfast", "models", cwd=folder)
    assert models.returncode == 0 and "shape('cube')" in models.stdout, models.stdout + models.stderr


def test_the_sdist_has_what_a_build_needs_and_nothing_built(fresh):
    (sdist,) = fresh[2].glob("ebmfast-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        about = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    for needed in ("CMakeLists.txt", "LICENSE", "csrc/chain.cpp", "kernels/step.py", "ebmfast/py.typed",
                   "ebmfast/zoo/color.safetensors"):
        assert needed in names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith((".venv", "build/", "bench/results"))]
    assert "Requires-Dist: torch>=2.6" in about and "# ebmfast" in about


def test_wheels_are_configured_for_every_architecture_and_python():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheels, least = about["tool"]["cibuildwheel"], about["project"]["requires-python"].removeprefix(">=")
    pythons = wheels["build"].split()
    assert pythons[0] == f"cp{least.replace('.', '')}-*" and len(pythons) == len(set(pythons)) >= 3
    for arch in wheels["linux"]["archs"]:
        assert wheels["linux"][f"manylinux-{arch}-image"].startswith("manylinux_2_")
    assert set(wheels["linux"]["archs"]) == {"x86_64", "aarch64"}
    assert wheels["linux"]["environment"]["EBMFAST_CUDA"] == "OFF" and "python -m ebmfast" in wheels["test-command"]


def test_the_sources_shadow_a_wheel_and_say_so(fresh):
    python, source, _ = fresh
    done = call(python, "-c", "import ebmfast", cwd=source)
    assert done.returncode != 0 and "ImportError" in done.stderr and "pip install -e" in done.stderr, done.stderr

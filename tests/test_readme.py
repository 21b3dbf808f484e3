"""The Python of README and docs runs as printed, with fewer noise levels and samples where it would take long."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [code for page in PAGES if page.exists() for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
SHORTER = (("n=16", "n=1"), ("levels=16", "levels=2"), ("steps_per_level=6", "steps_per_level=1"))


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("\n")[0])
def test_code_in_the_readme_runs(code, capsys):
    for long, short in SHORTER:
        code = code.replace(long, short)
    if "torchebm" in code:
        pytest.importorskip("torchebm")
    names = {}
    exec(compile(code, "a page", "exec"), names)
    r = names.get("r")
    assert r is None or getattr(r, "x", getattr(r, "energy", None)).isfinite().all()


def test_the_readme_has_code():
    assert len(BLOCKS) >= 2

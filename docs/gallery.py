"""`python docs/gallery.py [--smoke FOLDER]`: draws docs/gallery/*.png from the bundled models and writes docs/gallery.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import ebmfast as ef
from ebmfast import images

HERE = Path(__file__).parent
SCENES = (
    ("position", "One concept", "position(-0.5, 0.5)"),
    ("and", "AND of two", "shape('cube') & color('red')"),
    ("and-four", "AND of four", "shape('sphere') & color('yellow') & position(0.4, -0.2) & size(0.8)"),
    ("or", "OR: either place", "position(-0.6, -0.4) | position(0.6, 0.4)"),
    ("or-and", "OR of two AND", "(shape('cube') & color('green')) | (shape('sphere') & color('purple'))"),
    ("not", "NOT: there, and not red", "position(0, 0) & ~color('red')"),
    ("not-nested", "NOT of an OR", "shape('cylinder') & ~(color('red') | color('blue'))"),
    ("weight", "A weight: blue, and rather a cube", "color('blue') & 0.5 * shape('cube')"),
)
PAGE = """\
# Gallery

Samples of the four bundled models (shape, color, position, size), each trained alone on rendered 32×32 scenes. The expression under
a picture is all that was asked for; `make docs` draws them again, and

    ebmfast sample "shape('cube') & color('red')" --n 6 --out grid.png

draws any other. `ebmfast models` lists what expressions can name. How often such samples are right is in the
[README](../README.md#the-bundled-models), and some here are not.
"""


# Options of a scene, and why.
OPTIONS = {"or-and": ({"branches": "draw"}, "With `branches=\"draw\"`: the branches of an OR have constants of their own, which"
                      " nobody fitted here,\nand without it all six are green cubes.\n")}


def draw(text: str, path: Path, n: int, options: dict, **schedule) -> None:
    """One row of `n` samples of the expression, in 128 colors."""
    expression, sampler = ef.zoo.recommended(ef.parse(text, ef.zoo.concepts()))
    if schedule:
        sampler = ef.Annealed.geometric(sampler.sigmas[0], sampler.sigmas[-1], **schedule)
    r = ef.sample(expression, n, (3, 32, 32), sampler, seed=0, energies=False, **options)
    images.save(images.grid([r.x], data_range=(-1, 1)).quantize(128), path, {"expression": text, "seed": "0"})


def page(folder: str = "gallery") -> str:
    """docs/gallery.md."""
    parts = []
    for name, title, text in SCENES:
        _, why = OPTIONS.get(name, ({}, ""))
        parts.append(f"## {title}\n\n![{title}]({folder}/{name}.png)\n\n```text\n{text}\n```\n" + (f"\n{why}" if why else ""))
    return "\n".join([PAGE, *parts])


def main(argv: list[str] | None = None) -> None:
    """Draw all, or with --smoke two samples of the first in few steps."""
    parser = argparse.ArgumentParser(prog="python docs/gallery.py", description=__doc__)
    parser.add_argument("--smoke", type=Path, metavar="FOLDER", help="two samples of the first scene, in few steps, there")
    folder = parser.parse_args(argv).smoke
    if folder is not None:
        draw(SCENES[0][2], folder / "one.png", 2, {}, levels=2, steps_per_level=1)
        return
    for name, _, text in SCENES:
        draw(text, HERE / "gallery" / f"{name}.png", 6, OPTIONS.get(name, ({}, ""))[0])
        print(f"{name}: {text}", flush=True)
    (HERE / "gallery.md").write_text(page())


if __name__ == "__main__":
    main()

"""Pages agree with the code: quoted messages exist, links lead somewhere, generated pages are what they are made from."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ebmfast import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def tool(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(tree):
    """Every string of a module as one text, "…" where a value is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


SOURCE = "\n".join(text for path in (ROOT / "ebmfast").rglob("*.py") for text in texts(ast.parse(path.read_text())))
HEADINGS = [text for _, text in re.findall(r"^### (`+) ?(.*?) ?\1$", (DOCS / "troubleshooting.md").read_text(), re.M)]


@pytest.mark.parametrize("message", HEADINGS)
def test_quoted_messages_exist(message):
    assert message.strip("… ") in SOURCE


def test_there_are_messages():
    assert len(HEADINGS) > 25


def anchors(text):
    """What GitHub makes of headings."""
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "bench/results/STATUS.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_rows_of_tables_have_the_cells_of_their_heads(page):
    """GitHub drops what is over; a bar within a cell is written \\|."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table.splitlines()[cells.index(max(cells))]


def test_api_pages_are_those_of_the_docstrings():
    found = {p.name: p.read_text() for p in (DOCS / "api").glob("*.md")}
    assert found == tool("api").pages(), "run `make docs`"


def test_the_gallery_is_what_its_script_draws(tmp_path):
    gallery = tool("gallery")
    assert (DOCS / "gallery.md").read_text() == gallery.page(), "run `make docs`"
    pictures = list((DOCS / "gallery").glob("*.png"))
    assert {p.stem for p in pictures} == {name for name, _, _ in gallery.SCENES}
    assert sum(p.stat().st_size for p in pictures) < 300_000
    image = pytest.importorskip("PIL.Image")
    for name, _, text in gallery.SCENES:
        with image.open(DOCS / "gallery" / f"{name}.png") as picture:
            assert picture.text["expression"] == text
    gallery.main(["--smoke", str(tmp_path)])
    assert (tmp_path / "one.png").exists()


def test_explain_prints_what_the_page_shows(capsys):
    page = (DOCS / "engines.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", page, re.S).groups()
    exec(compile(code, "a page", "exec"), {})
    assert capsys.readouterr().out == shown


def commands():
    """What pages tell users to type: lines of sh blocks, and code within text, unless it is a pattern."""
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
        inline = re.findall(r"`(ebmfast [a-z]+[^`\n]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        lines = [line for line in blocks.splitlines() if line.startswith("ebmfast ")] + inline
        yield from ((page.name, line) for line in dict.fromkeys(lines) if "..." not in line)


def test_commands_parse():
    """Options and names of commands are those of the command line; files need not exist."""
    parser, found = cli._parser(), list(commands())
    assert len(found) > 25
    for page, line in found:
        words = shlex.split(line.partition(">")[0], comments=True)[1:]
        try:
            parser.parse_args(words)
        except SystemExit as stop:
            # Text may name a command alone, whose positional arguments it does not repeat.
            assert stop.code in (0, None) or len(words) == 1, f"{page}: {line}"

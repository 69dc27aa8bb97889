"""The documents: every block of Python runs, every link leads somewhere, every message is there."""

from __future__ import annotations

import ast
import pathlib
import re
import runpy
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from papers import theory

import autodrop_ext

PACKAGE = pathlib.Path(autodrop_ext.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"

if not DOCS.exists():
    pytest.skip("the documents are not next to the installed package", allow_module_level=True)

PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *PAGES, *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("examples/*.md")}
)
EXECUTED_ELSEWHERE = {
    "integrations.md": "tests/integrations/test_recipes.py",
    "recipes.md": "tests/integrations/test_recipes.py",
}
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# ---- blocks of Python -------------------------------------------------------------------------


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None  # why it is not run


def blocks(page: pathlib.Path) -> list[Block]:
    """Those of a page; ``<!-- not run: REASON -->`` in the line above excepts one."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        before = text[: match.start()]
        excepted = NOT_RUN.search(before)
        reason = excepted[1] if excepted else None
        found.append(Block(before.count("\n") + 1, match[1], reason))
    return found


def run(page: pathlib.Path) -> list[dict[str, Any]]:
    """Run a page's blocks one after the other, with only the names that earlier ones define.

    Returns:
        The names after each block.
    """
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    after = []
    for block in blocks(page):
        if block.reason is not None:
            continue
        # Empty lines in front, so that a traceback shows the line in the page.
        exec(compile("\n" * block.line + block.code, name_of(page), "exec"), names)
        after.append(dict(names))
    return after


@pytest.fixture
def somewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for what the blocks write, and one process that is all of its group."""
    monkeypatch.chdir(tmp_path)
    random = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
@pytest.mark.usefixtures("somewhere")
def test_blocks_run(
    page: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name in EXECUTED_ELSEWHERE:
        elsewhere = EXECUTED_ELSEWHERE[page.name]
        assert page.name in (ROOT / elsewhere).read_text(), elsewhere
        pytest.skip(f"run by {elsewhere}")
    excepted = [f"line {b.line}: {b.reason}" for b in blocks(page) if b.reason is not None]
    if page.name == "distributed.md":
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            run(page)
        finally:
            torch.distributed.destroy_process_group()
        assert (tmp_path / "checkpoint").is_dir()
        return
    after = run(page)
    assert len(after) + len(excepted) == len(blocks(page))
    if page.name in ("README.md", "index.md"):
        printed = capsys.readouterr().out
        assert printed and f"```\n{printed}```" in page.read_text(encoding="utf-8")
    if page.name == "start.md":
        assert (tmp_path / "run.png").stat().st_size > 1000
    if excepted:
        pytest.skip("not run: " + "; ".join(excepted))  # the others of the page have run


def test_every_fence_has_a_language_or_none_that_is_misspelt() -> None:
    """A block marked ``py`` or ``Python`` would not be run."""
    known = {"", "python", "{toctree}", "{eval-rst}", "bash", "yaml", "json", "toml"}
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, f"{name_of(page)}: a fence is not closed"
        assert set(fences) <= known, f"{name_of(page)}: {set(fences) - known}"


# ---- links ------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(path: pathlib.Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found = set()
    for heading in re.findall(r"^#{1,3} (.*)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(kept.replace(" ", "-"))
    return found


def links(document: pathlib.Path) -> list[str]:
    text = without_code(document.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: pathlib.Path) -> None:
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue  # outside: not fetched
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{name_of(document)} points to {link}"
        assert path.is_relative_to(ROOT), f"{name_of(document)} points out of the project: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{name_of(document)} points to {link}"


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S+)$", contents, re.MULTILINE)
    patterns = [entry for entry in entries if not entry.startswith((":", "`"))]
    for page in DOCS.glob("*.md"):
        matches = [p for p in patterns if pathlib.PurePath(page.stem).match(p)]
        assert matches or page.name == "index.md", f"docs/{page.name} is in no table of contents"


def test_public_names_are_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in autodrop_ext.__all__:
        assert re.search(rf"autodrop_ext\.{name}\b", reference), name
    assert ".. automodule:: papers.theory" in reference and theory.__all__


# ---- messages ---------------------------------------------------------------------------------

LEAST_FRAGMENT = 15  # characters; less of a message could stand anywhere


def messages() -> list[tuple[str, str]]:
    """Where the package warns or raises, and the longest part of the message that is constant.

    Messages of the form ``argument: expected ..., got ...`` explain themselves; the page has one
    paragraph for all of them.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if name == "AttributeError":
                continue  # Python's own words, for a name that the package does not have
            warns = name.endswith(("warn", ".once"))
            if not warns and not (isinstance(node, ast.Raise) and name.endswith(("Error", "Exit"))):
                continue
            for argument in call.args:
                parts = fragments(argument)
                text = " ... ".join(parts)
                if ": expected" in text or text.startswith("expected"):
                    continue
                longest = max(parts, key=len, default="")
                prefix = re.fullmatch(r"\w+:", longest)  # of a message that is passed on
                if len(longest) >= LEAST_FRAGMENT and not prefix:
                    found.append((f"{name_of(path)}:{call.lineno}", longest))
    return found


def fragments(node: ast.expr) -> list[str]:
    """Constant parts of a string, an f-string, or a sum that contains some."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [" ".join(node.value.split())]
    if isinstance(node, ast.JoinedStr):
        constants = [v for v in node.values if isinstance(v, ast.Constant)]
        return [part for c in constants for part in fragments(c)]
    if isinstance(node, ast.BinOp):
        return fragments(node.left) + fragments(node.right)
    return []


def test_messages_are_in_the_troubleshooting_page() -> None:
    page = " ".join((DOCS / "troubleshooting.md").read_text(encoding="utf-8").split())
    found = messages()
    assert len(found) > 20  # the search itself works
    missing = [f"{where}: {text}" for where, text in found if text not in page]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


# ---- pictures ---------------------------------------------------------------------------------


def test_dark_pages_show_dark_pictures(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("sphinx")
    from docutils import frontend, nodes, utils

    conf = runpy.run_path(str(DOCS / "conf.py"))
    for name in ("a.png", "a-dark.png", "b.png"):
        (tmp_path / name).touch()
    settings = frontend.get_default_settings()
    settings.env = types.SimpleNamespace(docname="page", doc2path=lambda name: tmp_path / "page.md")
    document = utils.new_document("page", settings)
    uris = ("a.png", "b.png", "https://example.org/a.png")
    document.extend([nodes.image(uri=uri) for uri in uris])
    conf["DarkPictures"](document).apply()
    assert [(image["uri"], image["classes"]) for image in document.findall(nodes.image)] == [
        ("a.png", ["only-light"]),
        ("a-dark.png", ["only-dark"]),
        ("b.png", []),
        ("https://example.org/a.png", []),
    ]

"""The pages: their examples run, they hang together, and the README stays short. .ci/run builds the site itself."""

from __future__ import annotations

import contextlib
import io
import math
import re
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

import flatcore

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
TOLERANCE = 0.05
"""Relative, of a number that a page prints: networks that were trained on another processor differ in their third digit."""


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def same(shown: str, printed: str) -> bool:
    """Whether the words are the same, and each number within the tolerance."""
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (shown, printed)]
    words = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    return words[0] == words[1] and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(*numbers, strict=True))


def run(page: Path) -> int:
    """Run a page's Python blocks in order, in one namespace; a block of text is what the one before it printed."""
    printed = io.StringIO()

    def compare(example: Example) -> str | None:
        shown, said = example.parsed, printed.getvalue()
        return None if same(shown, said) else f"the page shows\n{shown}\nand this was printed\n{said}"

    sybil = Sybil([PythonCodeBlockParser(), CodeBlockParser("text", compare)], encoding="utf-8")
    document = sybil.parse(page)
    examples = list(document.examples())
    for example in examples:
        if example.region.evaluator is not compare:
            printed.seek(0)
            printed.truncate()
        with contextlib.redirect_stdout(printed):
            example.evaluate()
    return len(examples)


def examples() -> list[Any]:
    """The pages with their marks."""
    slow = {"docs/check.md": "it makes the check of three CPU targets, of which tests/test_check.py has each part"}
    pages = [ROOT / "README.md", *PAGES]
    marks = [[pytest.mark.exhaustive] if name in slow else [] for name in names(pages)]
    return [pytest.param(page, id=name, marks=m) for page, name, m in zip(pages, names(pages), marks, strict=True)]


@pytest.mark.parametrize("page", examples())
def test_the_examples_of_the_page_run(
    page: Path, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # reports and pictures that a page writes
    run(page)


def test_an_example_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    block = "```python\nprint('mean', {})\n```\n\n```text\nmean 0.50\n```\n"
    page.write_text(block.format(0.51))
    assert run(page) == 2
    for wrong in ("0.6", "'0.50'.strip(), 'x'", "-0.50", "1 / 0"):
        page.write_text(block.format(wrong))
        with pytest.raises((AssertionError, ZeroDivisionError)):
            run(page)


def test_most_of_what_is_shown_as_python_is_run() -> None:
    """A page's blocks are found: a fence that sybil did not see would be an example that nobody runs."""
    for page in PAGES:
        fences = len(re.findall(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE))
        found = list(Sybil([PythonCodeBlockParser()], encoding="utf-8").parse(page).examples())
        assert len(found) >= fences, page
    assert not [page for page in PAGES if re.search(r"skip: ", page.read_text(encoding="utf-8"))]


def test_every_page_stands_in_the_table_of_contents() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [
        line
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
        for line in tree.splitlines()
        if line and not line.startswith(":")
    ]
    pages = [str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page != DOCS / "index.md"]
    assert sorted(listed) == sorted(pages)


def test_every_committed_table_stands_among_the_results() -> None:
    included = set(re.findall(r"\.\./bench/results/([\w-]+\.md)", (DOCS / "results.md").read_text(encoding="utf-8")))
    assert included == {path.name for path in (ROOT / "bench/results").glob("*.md")}


def prose(page: Path) -> str:
    """A page without its code, shown or not."""
    return re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKING = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"))]


@pytest.mark.parametrize("page", LINKING, ids=names(LINKING))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        assert not target.startswith(("http:", "https:")), f"{target}: the pages are read without a network too"
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_every_public_name_stands_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"\.\. auto\w+:: (?:flatcore\.)?([\w.]+)", text))
    wanted = {name for name in flatcore.__all__ if name not in ("__version__", "cuda")}
    wanted |= set(flatcore.robustness.__all__) | {f"metrics.{name}" for name in flatcore.metrics.__all__}
    wanted |= {name for name, value in vars(flatcore.cuda).items() if isfunction(value) and name[0] != "_"}
    assert wanted <= documented


def test_the_readme_is_read_in_a_minute() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 90


def test_the_sites_requirements_are_those_of_its_configuration() -> None:
    """What conf.py loads stands in the extra, and no more."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^docs = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
    assert extra
    required = {re.split(r"[^\w\-]", name)[0] for name in re.findall(r'"([^"]+)"', extra[1])} - {"flatcore"}
    configuration = (DOCS / "conf.py").read_text()
    loaded = {"sphinx", *re.findall(r'"(myst_parser|sphinx_\w+)"', configuration)}
    loaded |= set(re.findall(r'^html_theme = "(\w+)"', configuration, re.MULTILINE))
    assert required == {name.replace("_", "-") for name in loaded}

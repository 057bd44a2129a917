"""The pages: their examples run, they hang together, and the README stays short. .ci/run builds the site itself."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

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
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(*numbers, strict=True)
    )


def run(page: Path) -> int:
    """Run a page's Python blocks in order, in one namespace; a block of text is what the one before it printed."""
    printed = io.StringIO()

    def compare(example: Example) -> str | None:
        shown, said = example.parsed, printed.getvalue()
        return None if same(shown, said) else f"the page shows\n{shown}\nand this was printed\n{said}"

    sybil = Sybil([PythonCodeBlockParser(), CodeBlockParser("text", compare), SkipParser()], encoding="utf-8")
    document = sybil.parse(page)
    examples = list(document.examples())
    for example in examples:
        if example.region.evaluator is not compare:
            printed.seek(0)
            printed.truncate()
        with contextlib.redirect_stdout(printed):
            example.evaluate()
    return len(examples)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=names([ROOT / "README.md", *PAGES]))
def test_the_examples_of_the_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)

"""The documentation site: sphinx-build -W -b html docs build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings of this tree, whatever is installed

import flatcore  # noqa: E402

project = "flatcore"
author = "the flatcore authors"
release = version = flatcore.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that are included begin at a level of their own
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"flatcore {release}"
html_static_path = ["_static"]
html_css_files = ["flatcore.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # what may come in is told by kind, shape and dtype, not by Any
autodoc_preserve_defaults = True
maximum_signature_line_length = 78
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
_PARAGRAPHS = ["Cost", "Distributed", "FSDP2", "Gradients", "Numerics", "Source", "States", "States, numerics"]
# Returns too: a colon in its first line is no type
napoleon_custom_sections = [*_PARAGRAPHS, "Returns"]

_HEADINGS = re.compile(rf"^({'|'.join(_PARAGRAPHS)}): (?=\S)")
_OUTSIDE = {
    r"README\.md": "index.md",
    r"CONTRIBUTING\.md": "inside.md",
    r"CHANGELOG\.md": "changelog.md",
    r"bench/README\.md": "benchmarks.md",
    r"bench/results(?:/[\w-]+\.md)?": "results.md",
}
"""Files outside of docs that pages may link to, and the page that includes each."""


def give_sections_a_body(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings say "Numerics: ..." in one paragraph; napoleon wants the body below its heading, indented."""
    inside, found = False, []
    for line in lines:
        heading = _HEADINGS.match(line)
        if heading:
            body = line[heading.end() :]
            found += ["", heading[1] + ":", "    " + body[0].upper() + body[1:]]
            inside = True
        elif inside and line.strip():
            found.append("    " + line.strip())
        else:
            inside = False
            found.append(line)
    lines[:] = found


def leave_out_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple stand in its signature and its text; "Alias for field number 0" says nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def link_inside(text: str, page: str) -> str:
    """Links to files of the repository that the site includes lead to the page that includes them."""
    up = "../" * page.count("/")
    for path, target in _OUTSIDE.items():
        text = re.sub(rf"\]\((?:\.\./)*{path}\)", f"]({up}{target})", text)
    return text


def mathml(node: nodes.Node, *, block: bool) -> str:
    """MathML of a formula: no script, no font, no network. Functions get TeX's thin space, which browsers leave out."""
    made = tex2mathml(node.astext(), as_block=block)
    return re.sub(r"<mo>&ApplyFunction;</mo>(?!\s*<mo[^>]*>\()", '<mspace width="0.1667em"></mspace>', made)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(f'<span class="math">{mathml(node, block=False)}</span>')
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula of its own; a wide one scrolls."""
    self.body.append(f'<div class="math">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Hooks."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("autodoc-process-docstring", give_sections_a_body, priority=400)  # before napoleon's 500

    def read(app: Sphinx, page: str, source: list[str]) -> None:
        source[0] = link_inside(source[0], page)

    def include(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
        source[0] = link_inside(source[0], page)

    app.connect("source-read", read)
    app.connect("include-read", include)

"""The documentation as a site: `make docs` (Sphinx, https://www.sphinx-doc.org).

The pages are Markdown that reads as well in a repository's browser. So `index.md` has no table of contents of Sphinx's;
it is made here, of the links under each of its headings. The options of each command and the functions of the package
are made from the code.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import click

from ktransfer import __version__
from ktransfer.cli import cli

HERE = Path(__file__).parent
MADE = HERE / "made"
FROM_CODE = {"commands": "Commands and their options", "python": "Functions and classes"}
FUNCTIONS = (
    "ktransfer.pretext",
    "ktransfer.cluster",
    "ktransfer.retrain",
    "ktransfer.eval",
    "ktransfer.report",
    "ktransfer.networks",
)

project, author, version, release = "ktransfer", "the ktransfer authors", __version__, __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "ktransfer"
html_show_copyright = False
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "footer_start": [],
    "footer_end": [],
    "show_toc_level": 2,
    "header_links_before_dropdown": 4,
}
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_static_path = ["static"]
html_css_files = ["wrapped.css"]


def made_from_the_code() -> None:
    """Write the pages of commands and of functions."""
    MADE.mkdir(exist_ok=True)
    context = click.Context(cli, info_name="ktransfer")
    pages = [f"# {FROM_CODE['commands']}\n\nMade from the code: what `ktransfer COMMAND --help` says.\n"]
    for name in ["", *cli.list_commands(context)]:
        command = cli.commands[name] if name else cli
        shown = click.Context(command, info_name=name or "ktransfer", parent=context if name else None)
        pages.append(f"## {name or 'ktransfer'}\n\n```text\n{command.get_help(shown)}\n```\n")
    (MADE / "commands.md").write_text("\n".join(pages), encoding="utf-8")
    pages = [f"# {FROM_CODE['python']}\n\nMade from the code: what the packages export.\n"]
    for package in FUNCTIONS:
        names = sorted(importlib.import_module(package).__all__)
        pages.append(f"## {package}\n")
        pages += [_documented(package, name) for name in names]
    (MADE / "python.md").write_text("\n".join(pages), encoding="utf-8")


def _documented(package: str, name: str) -> str:
    kind = "autodata"
    found = getattr(importlib.import_module(package), name)
    if callable(found):
        kind = "autoclass" if isinstance(found, type) else "autofunction"
    members = "\n   :members:" if kind == "autoclass" else ""
    return f"```{{eval-rst}}\n.. {kind}:: {package}.{name}{members}\n```\n"


def made_from_the_index() -> None:
    """Write a page for each section of the index: its text, and the contents that Sphinx needs."""
    index = (HERE / "index.md").read_text(encoding="utf-8")
    for heading, text in re.findall(r"^## ([^:\n]+)[^\n]*\n(.*?)(?=^## |\Z)", index, re.M | re.S):
        pages = list(dict.fromkeys(re.findall(r"^- \[[^\]]+\]\(([\w/-]+)\.md\)", text, re.M)))
        body = text.replace("](", "](../")
        if heading == "Reference":
            pages += [f"made/{name}" for name in FROM_CODE]
            body += "".join(f"- [{title}]({name}.md)\n" for name, title in FROM_CODE.items())
        if heading == "Explanation":
            pages += [f"choices/{name}" for name in sorted(path.stem for path in (HERE / "choices").glob("*.md"))]
        (MADE / f"{heading.lower()}.md").write_text(f"# {heading}\n{body}\n{contents(pages)}", encoding="utf-8")


def contents(pages: list[str]) -> str:
    """What tells Sphinx which pages stand below this one."""
    listed = "\n".join(f"/{page}" for page in pages)
    return f"```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def with_contents(_: Any, name: str, source: list[str]) -> None:
    """Append to the index the contents that Sphinx needs: its sections."""
    if name == "index":
        headings = re.findall(r"^## ([^:\n]+)", source[0], re.M)
        source[0] += "\n" + contents([f"made/{heading.lower()}" for heading in headings])


def setup(app: Any) -> None:
    """As Sphinx calls it."""
    made_from_the_code()
    made_from_the_index()
    app.connect("source-read", with_contents)
    # What scikit-learn adds to every estimator, with references into its own documentation.
    app.connect(
        "autodoc-skip-member", lambda _, __, name, *___: True if re.fullmatch(r"set_\w+_request", name) else None
    )

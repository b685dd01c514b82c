"""For the site only: the list of all public names, taken from the packages' `__all__`; pictures
that can be enlarged; module docstrings without the floor, which matters to those who write them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "deep_implicit_attention"
MARK = "<!-- names -->"


def public_names(room: str) -> list[str]:
    """What `__all__` of a room holds, without importing it."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{room} has no __all__")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with every page."""
    if MARK not in markdown:
        return markdown
    rooms = re.findall(r"^\| \[(\w+)\]\(\w+\.md\)", markdown, re.MULTILINE)
    lists = []
    for room in rooms:
        links = (
            f"[`{name}`]({room}.md#deep_implicit_attention.{room}.{name})"
            for name in sorted(public_names(room), key=str.lower)
        )
        lists.append(f"**{room}**: " + ", ".join(links))
    return markdown.replace(MARK, "\n\n".join(lists))


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with every page as HTML."""
    html = re.sub(r"<p>Floor \d: (\w)", lambda found: f"<p>{found[1].upper()}", html)
    return re.sub(
        r'(?<!">)(<img alt="[^"]*" src="([^"]*pictures/[^"]*)"[^>]*>)',
        r'<a class="enlarge" href="\2" title="Enlarge">\1</a>',
        html,
    )

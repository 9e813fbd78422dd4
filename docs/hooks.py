"""MkDocs hook: pages that stand outside docs/ become pages of the site, and links to them lead there.

On GitHub and in an editor the documents link to `../CHANGELOG.md` and the like. MkDocs knows only its own folder, and
would call each such link dead.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

OUTSIDE = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "helm/agent-shim/README.md": "project/chart.md",
    "helm/agent-shim/UPGRADING.md": "project/chart-upgrading.md",
    "README.md": "index.md",
}
"""Files of the repository, and the pages that show them. The README's place is taken by docs/index.md."""

_FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[((?:`[^`\n]*`|[^\[\]`])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, page in OUTSIDE.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite links between docs/ and the rest of the repository, and the marks of blocks that a test runs.

    A link to a file that is no page (`config/…`, `LICENSE`) becomes its text: the site does not have the file.
    """
    here = page.file.src_uri
    source = next((name for name, shown in OUTSIDE.items() if shown == here != "index.md"), f"docs/{here}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"[a-z]+:", target):
            return link[0]
        goal = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = OUTSIDE.get(goal) or (goal.removeprefix("docs/") if goal.startswith("docs/") else "")
        if not uri and (ROOT / goal).exists():
            return text
        return f"[{text}]({posixpath.relpath(uri or goal, posixpath.dirname(here) or '.')}{anchor})"

    parts = _FENCE.split(markdown.replace("```sh run\n", "```sh\n"))
    parts[::2] = [_LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)

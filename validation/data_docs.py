"""Great Expectations' data docs, made to load nothing from the network.

Its pages take their looks from five content delivery networks; here they are given a style sheet of ours,
and everything that names another host, scripts included, is removed.
"""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path
from urllib.parse import quote

_STYLE = Path(__file__).with_name("data_docs.css")
_REMOVED = (
    re.compile(r"<script\b.*?</script>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<link\b[^>]*>", re.IGNORECASE),
    re.compile(r"<img\b[^>]*>", re.IGNORECASE),
    re.compile(r"<footer\b.*?</footer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<style\b.*?</style>", re.DOTALL | re.IGNORECASE),
)
_LINK_OUT = re.compile(r"""<a\b[^>]*href=["'](?:https?:)?//[^>]*>(.*?)</a>""", re.DOTALL | re.IGNORECASE)


_BODY = re.compile(r"<body\b.*</body>", re.DOTALL | re.IGNORECASE)
_GROUPS = {"validations": "What was found", "expectations": "What was expected"}


def make_offline(docs: Path) -> None:
    """Rewrite every page below `docs`, and drop the pictures and fonts that none needs any more."""
    style = f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>"
    for page in docs.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for pattern in _REMOVED:
            text = pattern.sub("", text)
        text = _LINK_OUT.sub(r"\1", text)
        if page == docs / "index.html":  # a script would have filled it
            text = _BODY.sub(lambda _: f"<body>{_listed(docs)}</body>", text)
        page.write_text(text.replace("</head>", style, 1), encoding="utf-8")
    shutil.rmtree(docs / "static", ignore_errors=True)


def _listed(docs: Path) -> str:
    """The pages, as links, those of what was found first."""
    parts = ['<div class="container"><h1>Data docs</h1>']
    for folder, title in _GROUPS.items():
        parts.append(f"<h4>{title}</h4><ul>")
        for page in sorted((docs / folder).rglob("*.html")):
            name = page.stem.removeprefix("snapshot-")
            parts.append(f'<li><a href="{quote(page.relative_to(docs).as_posix())}">{escape(name)}</a></li>')
        parts.append("</ul>")
    return "".join([*parts, "</div>"])

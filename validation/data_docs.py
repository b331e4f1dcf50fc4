"""Great Expectations' data docs, made to load nothing from the network.

Its pages take their looks from five content delivery networks; here they are given a style sheet of ours,
and everything that names another host, scripts included, is removed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_STYLE = Path(__file__).with_name("data_docs.css")

_REMOVED = (
    re.compile(r"<script\b.*?</script>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<link\b[^>]*>", re.IGNORECASE),
    re.compile(r"<img\b[^>]*>", re.IGNORECASE),
    re.compile(r"<footer\b.*?</footer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<style\b.*?</style>", re.DOTALL | re.IGNORECASE),
)
_LINK_OUT = re.compile(r"""<a\b[^>]*href=["'](?:https?:)?//[^>]*>(.*?)</a>""", re.DOTALL | re.IGNORECASE)


def make_offline(docs: Path) -> None:
    """Rewrite every page below `docs`, and drop the pictures and fonts that none needs any more."""
    style = f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>"
    for page in docs.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for pattern in _REMOVED:
            text = pattern.sub("", text)
        text = _LINK_OUT.sub(r"\1", text)
        page.write_text(text.replace("</head>", style, 1), encoding="utf-8")
    shutil.rmtree(docs / "static", ignore_errors=True)

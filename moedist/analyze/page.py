"""The page: one HTML file with its data, its program and the charting library in it; it fetches nothing.

Texts of a corpus may hold anything. They travel compressed in base64, whose letters can end no element, and the page's
program inserts them as text, never as HTML; the page allows no script but its own.
"""

from __future__ import annotations

import html
import json
import secrets
import string
from collections.abc import Mapping
from importlib import resources
from typing import Any

from moedist.report.page import charting_library, pack


def render(result: Mapping[str, Any]) -> str:
    """The page as text, about 2 MB and its data.

    Args:
        result: what ``analysis.json`` holds.

    Raises:
        ReportError: the charting library is not installed.
    """
    files = resources.files("moedist.analyze")
    return string.Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{result['run']}, step {result['step']}"),
        nonce=secrets.token_urlsafe(16),
        style=(files / "page.css").read_text(encoding="utf-8"),
        program=(files / "page.js").read_text(encoding="utf-8"),
        library=pack(charting_library()),
        data=pack(json.dumps(result, allow_nan=False)),
    )

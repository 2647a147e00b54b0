"""The page: one HTML file with its data, its program and the charting library in it; it fetches nothing.

Texts of a corpus may hold anything. They travel compressed in base64, whose letters can end no element, and the page's
program inserts them as text, never as HTML; the page allows no script but its own.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import secrets
import string
from collections.abc import Mapping
from importlib import resources
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode


class AnalysisError(ConfigError):
    """What the environment lacks for an analysis."""

    exit_code = ExitCode.ENVIRONMENT


def render(result: Mapping[str, Any]) -> str:
    """The page as text, about 2 MB and its data.

    Args:
        result: what ``analysis.json`` holds.

    Raises:
        AnalysisError: the charting library is not installed.
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


def pack(text: str) -> str:
    """Text, compressed, in base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def charting_library() -> str:
    """Plotly's program, as its package brings it.

    Raises:
        AnalysisError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise AnalysisError("plotly", None, "is not installed", "Install it: pip install 'moedist[report]'.") from None
    return str(get_plotlyjs())

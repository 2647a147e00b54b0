"""The page of an analysis, in the frame of the report's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moedist.report.page import build_page, read_part

HERE = "moedist.analyze"


def render(result: Mapping[str, Any]) -> str:
    """The page as text, about 2 MB and its data.

    Args:
        result: what ``analysis.json`` holds.

    Raises:
        ReportError: the charting library is not installed.
    """
    title = f"{result['run']}, step {result['step']} · routing"
    return build_page(title, result, read_part("page.js", HERE), style=read_part("page.css", HERE))

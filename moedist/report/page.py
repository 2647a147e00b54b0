"""A page: one HTML file with its data, its program and the charting library in it; it fetches nothing.

The data and the library are compressed and written in base64, whose letters can end no element and begin none. The
page's program inserts text as text, never as HTML, and the page allows no script but its own.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
import secrets
import string
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

MARK = "<!-- a report of moedist -->"
"""What a page holds that may be replaced by a newer one."""


class ReportError(ConfigError):
    """What the environment lacks for a report."""

    exit_code = ExitCode.ENVIRONMENT


def render(data: Mapping[str, Any], *, refresh_s: float | None = None) -> str:
    """The page as text, about 2 MB and its data.

    Args:
        data: what it shows (`page_data`).
        refresh_s: how often it asks the server that it came from for newer data; None for a page that stays as it is.

    Raises:
        ReportError: the charting library is not installed.
    """
    program = f"const REFRESH_S = {json.dumps(refresh_s)};\n{read_part('page.js')}"
    return build_page(data["title"], data, program, mark=MARK, connect="'none'" if refresh_s is None else "'self'")


def build_page(
    title: str, data: Mapping[str, Any], program: str, *, style: str = "", mark: str = "", connect: str = "'none'"
) -> str:
    """A page as text.

    Args:
        title: plain text.
        data: what the program shows, its ``DATA``.
        program: JavaScript on top of ``parts.js``; it says ``drawn`` on the root element once it has drawn.
        style: CSS on top of ``page.css``.
        mark: an HTML comment near the beginning.
        connect: a source of the content security policy, that the program may fetch from.

    Raises:
        ReportError: the charting library is not installed.
    """
    return string.Template(read_part("page.html")).substitute(
        mark=mark,
        title=html.escape(title),
        nonce=secrets.token_urlsafe(16),
        connect=connect,
        style=read_part("page.css") + style,
        program=f"{read_part('parts.js')}\n{program}",
        library=pack(charting_library()),
        data=pack(json.dumps(data, allow_nan=False)),
    )


def read_part(name: str, package: str = "moedist.report") -> str:
    """A file of a page that lies beside a package's modules."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


def pack(text: str) -> str:
    """Text, compressed, in base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def charting_library() -> str:
    """Plotly's program, as its package brings it.

    Raises:
        ReportError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("plotly", None, "is not installed", "Install it: pip install 'moedist[report]'.") from None
    return str(get_plotlyjs())


def write_page(path: Path, page: str) -> None:
    """Writes the page, whole or not at all, in the place of an older one.

    Raises:
        ConfigError: something else is there.
        ReportError: the disk refuses.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not _is_page(path):
            raise ConfigError("--output", str(path), "is there and is no report", "Name a file that is not there yet.")
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ReportError(
            "--output", str(path), f"cannot be written ({error.strerror})", "Name a file in a folder with room."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)

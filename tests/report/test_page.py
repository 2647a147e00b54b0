from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moedist.config import ConfigError
from moedist.report import page
from moedist.report.data import page_data
from moedist.report.page import ReportError, pack, render, write_page
from moedist.report.run import read_run
from tests.report.folders import make_run

SCRIPT = "</script></title><script>alert(1)</script>"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A charting library of one line."""
    monkeypatch.setattr(page, "charting_library", lambda: "const Plotly = {};")


class Elements(HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.started: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.started.append((tag, dict(attrs)))


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script id="data" type="text/plain">(.*?)</script>', text)
    assert match is not None
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def test_nothing_of_a_run_is_read_as_html(tmp_path: Path, library: None):
    run = make_run(tmp_path / "run", name=SCRIPT, num_steps=2, comment={SCRIPT: SCRIPT})
    text = render(page_data([read_run(run)]))
    assert "alert" not in text.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert [tag for tag, _ in Elements(text).started].count("script") == 3
    told = data_of(text)["runs"][0]
    assert told["name"] == SCRIPT and told["config"][f"comment.{SCRIPT}"] == SCRIPT


def test_the_page_fetches_nothing(tmp_path: Path, library: None):
    text = render(page_data([read_run(make_run(tmp_path / "run", num_steps=2))]))
    elements = Elements(text).started
    assert not [attributes for _, attributes in elements if "src" in attributes]
    assert [attributes["href"] for _, attributes in elements if "href" in attributes] == ["data:,"]
    assert "http:" not in text and "https:" not in text
    (policy,) = [attributes["content"] for _, attributes in elements if "http-equiv" in attributes]
    assert policy is not None and "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_program_and_data_survive_packing():
    assert gzip.decompress(base64.b64decode(pack("a$b</script>é"))).decode() == "a$b</script>é"


def test_only_a_report_is_replaced(tmp_path: Path, library: None):
    path = tmp_path / "report.html"
    text = render(page_data([read_run(make_run(tmp_path / "run", num_steps=1))]))
    write_page(path, text)
    write_page(path, text)
    path.write_text("my notes")
    with pytest.raises(ConfigError, match="is there and is no report"):
        write_page(path, text)
    assert path.read_text() == "my notes" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ReportError, match="cannot be written") as caught:
        write_page(tmp_path / "nowhere" / "report.html", text)
    assert caught.value.exit_code == 4


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ReportError, match=r"pip install 'moedist\[report\]'"):
        page.charting_library()


def test_lines_that_share_a_chart_have_names():
    script = (Path(page.__file__).parent / "page.js").read_text(encoding="utf-8")
    charts = [json.loads(keys) for keys in re.findall(r"keys: (\[\[.*?\]\])", script)]
    assert len(charts) > 10
    assert all(name for keys in charts if len(keys) > 1 for _, name in keys)

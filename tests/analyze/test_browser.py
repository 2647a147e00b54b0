"""The page of a real analysis in a browser: it draws without an error, fetches nothing, and shows texts as text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.analysis_picture import TRAIN
from tests.docs.pages import ROOT
from tests.report.browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs chromium: apt-get install chromium"),
]
SCRIPT = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>\n"
PLOTS = "document.querySelectorAll('.js-plotly-plot .subplot').length"
COLOURED = "[...document.querySelectorAll('.text span')].filter((span) => span.style.background).length"


def moedist(*words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "moedist", *words], env=environment, check=True, stdout=subprocess.DEVNULL)


def choose(name: str, value: str) -> str:
    return (
        f"{{ const at = document.querySelector(`select[aria-label='{name}']`); at.value = '{value}'; "
        "at.dispatchEvent(new Event('change')); }"
    )


def test_an_analysis_of_two_texts_and_two_checkpoints(tmp_path: Path):
    pytest.importorskip("plotly")
    run = tmp_path / "run"
    few = ["train.steps=8", "train.checkpoint_every=4", "train.sequence_length=64", "train.eval_batches=4"]
    moedist("train", f"run.dir={run}", *TRAIN, *few)
    (tmp_path / "hostile.txt").write_text(200 * SCRIPT)
    corpora = {"python": ROOT / "moedist" / "analyze", "<b>hostile": tmp_path / "hostile.txt"}
    moedist("analyze", str(run), *(word for name, files in corpora.items() for word in ("--corpus", f"{name}={files}")))
    (folder,) = (run / "analysis").iterdir()
    page = (folder / "analysis.html").as_uri()
    with Browser() as browser:
        browser.open(page)
        assert browser.ask(PLOTS) == 7, "classes, pairs of experts, domains, positions; load, information, saturation"
        all_coloured = browser.ask(COLOURED)
        browser.ask("document.querySelector('.pens button').click()")
        assert 0 < browser.ask(COLOURED) < all_coloured
        browser.ask(choose("text", "<b>hostile"))
        browser.wait(f"{PLOTS} === 7")
        assert "<img src=x onerror='window" in browser.ask("document.querySelector('.texts').innerText")
        first = browser.ask("document.querySelectorAll('h2')[0].innerText")
        browser.ask(choose("layer", browser.ask("Object.keys(DATA.layers)[0]")))
        assert browser.ask("document.querySelectorAll('h2')[0].innerText") != first
        browser.wait(f"{PLOTS} === 7")
        browser.shoot(tmp_path / "page.png", clip=(0, 0, 1360, browser.ask("document.body.scrollHeight")))
        assert browser.ask("window.broken") is None and browser.ask("document.images.length") == 0
        assert browser.errors == [] and browser.requests == [page]

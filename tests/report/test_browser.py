"""The page in a browser: it draws without an error, fetches nothing, and follows a run without losing its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moedist.cli.main import main
from moedist.report.live import LiveReport, open_server
from tests.report.browser import Browser, find_browser
from tests.report.folders import make_run, make_sweep, write_row

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs chromium: apt-get install chromium"),
]
PLOTS = "[...document.querySelectorAll('.card:not([hidden]) .js-plotly-plot .main-svg')].length"
STEP = "document.querySelector('input[type=range] + output').textContent"
SCRIPT = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


@pytest.fixture
def browser() -> Iterator[Browser]:
    pytest.importorskip("plotly")
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
def test_one_run(tmp_path: Path, browser: Browser, dark: bool):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").as_uri()
    browser.open(page, dark=dark)
    assert browser.ask(PLOTS) >= 15
    assert browser.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert browser.ask(STEP) == "step 40"
    browser.ask("{ const at = document.querySelector('input[type=range]'); at.value = 9; at.oninput; "
                "at.dispatchEvent(new Event('input')); }")  # fmt: skip
    browser.wait(f"{STEP} === 'step 10'")
    shown = browser.ask("[...document.querySelectorAll('.js-plotly-plot')].find((plot) => plot.data[0]?.type === "
                        "'heatmap').data[0].z.flat().reduce((a, b) => a + b)")  # fmt: skip
    assert shown == pytest.approx(4 * 8), "load / mean load adds up to E in every layer"
    assert browser.errors == [] and browser.requests == [page]


def test_many_layers_of_many_experts(tmp_path: Path, browser: Browser):
    run = make_run(tmp_path / "run", num_steps=60, num_layers=48, num_experts=128)
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 8e6
    browser.open((run / "report.html").as_uri())
    shape = browser.ask("(({ z }) => [z.length, z[0].length])([...document.querySelectorAll('.js-plotly-plot')]"
                        ".find((plot) => plot.data[0]?.type === 'heatmap').data[0])")  # fmt: skip
    assert shape == [48, 128] and browser.errors == []


def test_names_and_values_are_text(tmp_path: Path, browser: Browser):
    run = make_run(tmp_path / "run", name=SCRIPT, seed_of=SCRIPT, ended="bug", message=SCRIPT)
    other = make_run(tmp_path / "other", name=f"{SCRIPT}2", seed_of="${x} %{y}")
    assert main(["report", str(run), str(other), "--output", str(tmp_path / "page.html")]) == 0
    browser.open((tmp_path / "page.html").as_uri())
    said = browser.ask("document.body.innerText")
    assert said.count(SCRIPT) >= 4 and "${x} %{y}" in said
    assert browser.ask("window.broken") is None and browser.ask("document.images.length") == 0
    assert browser.errors == [] and len(browser.requests) == 1


def test_a_sweep_has_parallel_coordinates(tmp_path: Path, browser: Browser):
    sweep = make_sweep(tmp_path / "sweep")
    assert main(["report", str(sweep)]) == 0
    browser.open((sweep / "report.html").as_uri())
    drawn = browser.ask(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap((plot) => plot.data)"
        ".find((trace) => trace.type === 'parcoords').dimensions.map(({ label }) => label)"
    )
    assert drawn[0] == "router.top_k" and "held-out loss" in drawn
    assert "no job of it ran" in browser.ask("document.body.innerText")
    assert browser.errors == []


@pytest.mark.parametrize("kind", ["no rows", "no experts", "old", "one row"])
def test_pages_of_little(tmp_path: Path, browser: Browser, kind: str):
    run = make_run(
        tmp_path / "run",
        num_steps={"no rows": 0, "one row": 1}.get(kind, 5),
        num_layers=0 if kind == "no experts" else 2,
        ended=None if kind == "no rows" else "done",
    )
    if kind == "old":
        (run / "experts.bin").unlink()
    assert main(["report", str(run)]) == 0
    browser.open((run / "report.html").as_uri())
    assert browser.ask("document.querySelectorAll('.note').length") == (
        0 if kind == "one row" else 2 if kind == "no rows" else 1
    )
    assert browser.errors == []


def test_it_follows_a_run_and_keeps_the_place(tmp_path: Path, browser: Browser):
    run = make_run(tmp_path / "run", num_steps=5, ended=None)
    server = open_server(LiveReport([run]), 0, 0.1)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    load_LE = np.full((4, 8), 512)
    try:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        assert browser.ask(STEP) == "step 5"
        write_row(run, 6, load_LE, 1.0)
        browser.wait(f"{STEP} === 'step 6'")  # at the newest step it goes with the run
        browser.ask("{ const at = document.querySelector('input[type=range]'); at.value = 2; "
                    "at.dispatchEvent(new Event('input')); }")  # fmt: skip
        write_row(run, 7, load_LE, 1.0)
        browser.wait("DATA.runs[0].step === 7")
        assert browser.ask(STEP) == "step 3"
        assert browser.errors == [] and {url.rpartition("/")[0] for url in browser.requests} == {
            f"http://127.0.0.1:{server.server_address[1]}"
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

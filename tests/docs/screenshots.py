"""The pictures of the documentation: of ``FOLDER/runs/first``, with what its terminal said in ``FOLDER/terminal.txt``.

python -m tests.docs.screenshots FOLDER
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from moedist.cli.main import main
from tests.docs.pages import ROOT
from tests.report.browser import Browser

PICTURES = ROOT / "docs" / "pictures"
RUN = Path("runs/first")
COLUMNS = 116
HEAD, TAIL = 4, 15
"""Lines of a training's output that are shown."""
STYLE = "<style>body { margin: 0; padding: 18px 22px; font-size: 15px } pre { margin: 0; line-height: 1.4 }</style>"


def shoot_report(browser: Browser, folder: Path) -> None:
    """The page's upper part, on a light ground, and on a dark one at an early step."""
    run = folder / RUN
    with contextlib.chdir(folder):
        main(["report", str(RUN)])
    browser.open((run / "report.html").as_uri(), width=1280, height=1290)
    browser.shoot(PICTURES / "report.png")
    browser.open((run / "report.html").as_uri(), width=1280, height=760, dark=True)
    browser.ask(
        "{ const at = document.querySelector('input[type=range]'); at.value = 1; at.dispatchEvent(new Event('input'));"
        " document.querySelector('input[type=range]').closest('section').scrollIntoView(); scrollBy(0, -110); }"
    )
    browser.shoot(PICTURES / "experts.png")


def shoot_terminal(browser: Browser, folder: Path) -> None:
    """The first and last lines of the training, and the list of runs."""
    said = (folder / "terminal.txt").read_text().replace(f"{folder}/", "").splitlines()
    shown = ["$ moedist train experiment=tiny_cpu run.dir=runs/first", *said[:HEAD], "...", *said[-TAIL:]]
    listed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(listed):
        main(["runs"])
    shown += ["", "$ moedist runs", *listed.getvalue().splitlines()]
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in shown:
        console.print(Text.from_ansi(line, style="bold" if line.startswith("$") else ""))
    page = folder / "terminal.html"
    page.write_text(console.export_html(theme=MONOKAI, inline_styles=True).replace("</head>", f"{STYLE}</head>"))
    browser.call("Emulation.setDeviceMetricsOverride", width=1120, height=100, deviceScaleFactor=1, mobile=False)
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait("document.readyState === 'complete' && document.querySelector('pre') !== null")
    height = browser.ask("document.body.getBoundingClientRect().height")
    browser.shoot(PICTURES / "terminal.png", clip=(0, 0, 1120, height))


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    source = Path(sys.argv[1]).absolute()
    with Browser() as opened:
        shoot_report(opened, source)
        shoot_terminal(opened, source)
    for picture in sorted(PICTURES.glob("*.png")):
        print(f"{picture.relative_to(ROOT)}  {picture.stat().st_size / 1000:.0f} kB")

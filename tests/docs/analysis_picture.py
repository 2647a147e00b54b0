"""The picture of docs/analyze.md: trains a small run below a folder, analyzes it and opens the page in Chromium.

python -m tests.docs.analysis_picture FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.docs.pages import ROOT

PICTURE = ROOT / "docs" / "pictures" / "analysis.png"
TRAIN = [
    "launch.nproc=1",
    "launch.threads=1",
    "mesh.ep=1",
    "model.dim=32",
    "train.steps=120",
    "train.micro_batch=2",
    "train.sequence_length=128",
    "train.eval_every=null",
    "train.eval_batches=40",
    "train.checkpoint_every=30",
    "checkpoint.keep=null",
    "log.sinks.wandb.mode=disabled",
]
CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
]


def shoot(page: Path, picture: Path, width: int = 1280, height: int = 1560) -> None:
    """The upper part of a page."""
    with tempfile.TemporaryDirectory() as profile:
        size = f"--window-size={width},{height}"
        to = [f"--screenshot={picture}", f"--user-data-dir={profile}", page.as_uri()]
        subprocess.run([*CHROMIUM, size, *to], check=True, timeout=300)


def main(folder: Path) -> None:
    """Trains, analyzes, and writes the picture."""
    run = folder / "run"
    command = [sys.executable, "-m", "moedist"]
    if not run.exists():
        subprocess.run([*command, "train", f"run.dir={run}", *TRAIN], check=True)
    texts = {"python": ROOT / "moedist" / "data", "prose": f"{ROOT / 'README.md'},{ROOT / 'docs'}/*.md"}
    corpora = [word for name, files in texts.items() for word in ("--corpus", f"{name}={files}")]
    subprocess.run([*command, "analyze", str(run), *corpora], check=True)
    PICTURE.parent.mkdir(exist_ok=True)
    shoot(max((run / "analysis").iterdir()) / "analysis.html", PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

"""Runs of the real command in real processes: started, signalled, read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.rows import of_no_clock as without_clock

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "tests" / "plugin" / "src"

TINY = (
    "experiment=null",
    "plugins=[outside]",
    "log/sink=[console,jsonl,wandb,gate]",
    "data=synthetic",
    "data.vocab_size=64",
    "data.num_tokens=20000",
    "data.document_length=40",
    "model.dim=16",
    "model.layers.num_layers=2",
    "model.layers.first_dense=1",
    "moe.experts.hidden_dim=16",
    "mesh.device=cpu",
    "mesh.ep=2",
    "launch.nproc=2",
    "launch.threads=1",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "train.steps=40",
    "train.log_every=2",
    "train.eval_every=20",
    "train.eval_batches=4",
    "train.checkpoint_every=6",
    "train.clip_norm=0.5",
    "train.schedule.warmup_steps=5",
    "seed=3",
)
"""Two ranks, two blocks, 64 positions a step."""


@dataclasses.dataclass
class Command:
    """A ``moedist`` command that runs; ``folder`` is its run's."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self, limit_s: float = 400.0) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=limit_s)
        return self.process.returncode, out, err

    def reached(self) -> None:
        """Waits until the run stands at its gate."""
        self._wait_for(lambda: (self.folder / "gate_reached").exists())

    def open_gate(self) -> None:
        """Lets it go on."""
        (self.folder / "gate_open").touch()

    def told(self, words: str) -> None:
        """Waits until the launcher's log holds ``words``."""
        log = self.folder / "logs" / "launcher.log"
        self._wait_for(lambda: words in log.read_text(errors="replace"))

    def pid_of(self, rank: int) -> int:
        """The process of a rank."""
        return int(json.loads((self.folder / "logs" / f"heartbeat_{rank}.json").read_text())["pid"])

    def _wait_for(self, condition: Callable[[], object], limit_s: float = 300.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.process.communicate()}")
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)


def start(folder: Path, *arguments: str, gate: int | None = None, before: Sequence[Path] = ()) -> Command:
    """``moedist <arguments>`` as a user without a W&B key.

    Args:
        gate: the step at which it waits.
        before: folders of modules that come before all others.
    """
    for mark in ("gate_reached", "gate_open"):
        (folder / mark).unlink(missing_ok=True)
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "OUTSIDE_"))}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(map(str, [*before, ROOT, PLUGINS])),
        "HOME": str(home),
        "NETRC": str(home / ".netrc"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "no_proxy": "127.0.0.1",
    }
    if gate is not None:
        environment["OUTSIDE_GATE"] = str(gate)
    process = subprocess.Popen(
        [sys.executable, "-m", "moedist", *arguments],
        cwd=folder.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return Command(process, folder)


def train(folder: Path, *overrides: str, gate: int | None = None) -> Command:
    """``moedist train`` of the tiny run in ``folder``."""
    return start(folder, "train", *TINY, f"run.dir={folder}", *overrides, gate=gate)


def of_no_clock(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Rows by step, without what a clock or the process decides; of a step done twice the last."""
    return {row["train/step"]: without_clock(row) for row in rows}


def processes_of(folder: Path) -> list[int]:
    """Processes that have the run folder on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found

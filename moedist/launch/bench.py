"""Measures a layer on ranks of this machine (`moedist.bench.program`), or in this process where one will do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from moedist.bench.program import Question, answer
from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.launch.outcome import last_line
from moedist.launch.start import plan_ranks, run_ranks
from moedist.mesh import Mesh
from moedist.mesh.mesh import choose_device
from moedist.train.config import LaunchConfig

QUESTION, ANSWER = "question.json", "answer.json"
PROGRAM = "moedist.bench"


class RanksFailedError(ConfigError):
    """A rank did not come to its end."""

    exit_code = ExitCode.RANK_FAILED


def ask(question: Question, nproc: int) -> dict[str, Any]:
    """The answer, from ``nproc`` ranks with their share of the cores.

    Raises:
        ConfigError: it cannot be measured so.
        RanksFailedError: a rank failed; its log stays.
    """
    launch = LaunchConfig(nproc=nproc)
    device = choose_device(question.device, 0, nproc)
    question.check(device.type, nproc)
    if nproc == 1:
        return answer(question, Mesh.alone(device))
    folder = Path(tempfile.mkdtemp(prefix="moedist-bench-"))
    (folder / QUESTION).write_text(json.dumps(dataclasses.asdict(question)), encoding="utf-8")
    ranks = plan_ranks(launch, question.device)
    status = run_ranks(ranks, launch, folder, [PROGRAM, str(folder)], terminal=sys.stderr)
    if status.exit_code != 0 or not (folder / ANSWER).is_file():
        said = status.message if status.rank is None else f"{status.message} ({last_line(folder, status.rank)})"
        raise RanksFailedError("--nproc", nproc, f"ranks failed: {said}", f"See {folder / 'logs'}.")
    found: dict[str, Any] = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return found


def read_question(path: Path) -> Question:
    """What the parent has written."""
    values = json.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Question(**(values | lists))

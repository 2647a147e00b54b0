"""One rank of ``moedist bench`` as torchrun starts it. Stands on the floor of `moedist.cli`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from moedist.bench.program import Question, answer
from moedist.launch.bench import ANSWER, QUESTION, read_question
from moedist.launch.process import die_with_parent
from moedist.mesh import MeshConfig, close_mesh, join_mesh
from moedist.train.rank_log import redirect_output

LIMIT_S = 300.0
"""Seconds that a rank may wait for another: the slowest contender's round on a busy machine is shorter."""


def main() -> int:
    """Measures together with the other ranks; rank 0 leaves `ANSWER`. Returns the exit code."""
    die_with_parent()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    redirect_output(folder, rank)
    question: Question = read_question(folder / QUESTION)
    try:
        mesh = join_mesh(MeshConfig(ep=int(os.environ["WORLD_SIZE"]), device=question.device, timeout_s=LIMIT_S))
        found = answer(question, mesh)
        if mesh.dp.rank == 0:
            (folder / ANSWER).write_text(json.dumps(found), encoding="utf-8")
    finally:
        close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rank program with a stub for the training: ``python -m tests.launch.rank_program SKEW_S [arguments]``.

The stub notes what each rank was given. Rank 1 starts SKEW_S seconds late.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

from moedist.config import to_mapping
from moedist.mesh import Mesh
from moedist.train.config import RunConfig


def run_rank(config: RunConfig, run_dir: Path, mesh: Mesh, terminal: Any = None) -> int:
    print("said by a rank")
    given = {
        "config": to_mapping(config),
        "run_dir": str(run_dir),
        "ep": mesh.ep.size,
        "terminal": terminal is not None,
    }
    (run_dir / f"given_{mesh.dp.rank}.json").write_text(json.dumps(given))
    return 0


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        time.sleep(float(sys.argv[1]))
    stub = types.ModuleType("moedist.train.run")
    stub.run_rank, stub.eval_rank = run_rank, None  # type: ignore[attr-defined]
    sys.modules[stub.__name__] = stub
    from moedist.train.__main__ import main

    sys.exit(main(sys.argv[2:]))

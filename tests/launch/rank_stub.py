"""What a rank does in tests of the launcher: ``python -m tests.launch.rank_stub ACTION FOLDER``. Imports no torch."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from moedist.launch.process import die_with_parent
from moedist.train.rank_log import redirect_output
from moedist.train.status import write_status


def main(action: str, folder: Path) -> int:
    rank = int(os.environ["RANK"])
    die_with_parent()
    terminal = redirect_output(folder, rank)
    if terminal is not None:
        print("rank 0 speaks to the terminal", file=terminal)
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "MASTER_ADDR")
    print(" ".join(f"{name}={os.environ[name]}" for name in names))
    if action == "end":
        return 0
    if action == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_leave(number: int, frame: FrameType | None) -> None:
        if rank == 0:
            write_status(folder, "preempted", "Saved.", step=3)
        os._exit(75)

    handlers = {"save": save_and_leave, "stay": signal.SIG_IGN, "die": signal.SIG_DFL}
    signal.signal(signal.SIGTERM, handlers[action])
    (folder / f"ready_{rank}").write_text(str(os.getpid()))
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))

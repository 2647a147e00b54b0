"""One rank of ``moedist doctor`` as torchrun starts it. Stands on the floor of `moedist.cli`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from moedist.doctor.ranks import check_rank
from moedist.launch.process import die_with_parent
from moedist.mesh import MeshConfig
from moedist.train.rank_log import redirect_output


def main() -> int:
    """Checks this rank; returns its exit code."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="moedist.doctor")
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("timeout_s", type=float)
    args = parser.parse_args()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # its time-out as an error here, not as an abort elsewhere
    redirect_output(args.folder, int(os.environ["RANK"]))
    return check_rank(MeshConfig(device=args.device, timeout_s=args.timeout_s), args.folder)


if __name__ == "__main__":
    sys.exit(main())

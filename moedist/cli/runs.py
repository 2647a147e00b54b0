"""``moedist runs``: the runs of a folder, how they stand, their last figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  # the runs below runs/
  moedist runs

  # those of a sweep, for a script
  moedist runs runs/sweep --json

states:
  running   a process holds the run's folder
  done      it has done all its steps
  stopped   it was told to stop and has saved
  failed    it ended with an error: moedist report RUN says which
  stale     nobody holds it and it left no status, as after a kill
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "runs",
        help="list runs with their state and last figures",
        description="Lists the runs below a folder with their state and last figures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="where to look (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def main(args: argparse.Namespace) -> int:
    """Lists; returns the exit code."""
    from moedist.report.listing import facts, find_runs, table

    runs = find_runs(args.folder)
    if args.json:
        print(json.dumps({"exit_code": 0, "runs": [facts(run) for run in runs]}))
    elif runs:
        print("\n".join(table(runs, args.folder)))
    else:
        print(f"No run below {args.folder}.")
    return 0

"""``moedist report``: runs as an HTML page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedist.config import require

EXAMPLES = """\
examples:
  # one run: writes runs/first/report.html, which opens in any browser and needs no network
  moedist report runs/first

  # several runs side by side
  moedist report runs/first runs/second --output compare.html

  # all runs of a sweep: writes runs/sweep/report.html
  moedist report runs/sweep

  # a run that trains: a page on this machine that follows it, until Ctrl-C
  moedist report --watch runs/first
"""
NAME = "report.html"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="show runs as an HTML page",
        description="Shows runs as one HTML page: losses, throughput, drops, and the load of every layer and expert.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder or a sweep's")
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help=f"the page to write; left out: {NAME} in RUN, or of several runs in this folder",
    )
    parser.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date")
    parser.add_argument("--port", type=int, default=0, help="for --watch; left out: any that is free")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks, for --watch (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def main(args: argparse.Namespace) -> int:
    """Writes or serves the page; returns the exit code."""
    if args.watch:
        return watch(args.runs, args.port, args.every)
    path = args.output or (args.runs[0] / NAME if len(args.runs) == 1 else Path(NAME))
    num_runs = write(args.runs, path)
    if args.json:
        print(json.dumps({"exit_code": 0, "output": str(path), "runs": num_runs}))
    else:
        print(f"Wrote {path}: {num_runs} run{'s' if num_runs != 1 else ''}, {path.stat().st_size / 1e6:.1f} MB.")
    return 0


def write(folders: Sequence[Path], path: Path) -> int:
    """Writes the page of some runs and sweeps; returns how many runs are on it."""
    from moedist.report.data import page_data
    from moedist.report.page import render, write_page
    from moedist.report.run import read_run
    from moedist.report.sweep import expand

    paths, sweeps = expand(folders)
    write_page(path, render(page_data([read_run(folder) for folder in paths], sweeps)))
    return len(paths)


def watch(folders: Sequence[Path], port: int, every_s: float) -> int:
    """Serves the page until Ctrl-C."""
    from moedist.report.live import LiveReport, serve
    from moedist.report.page import charting_library

    require(every_s > 0, "--every", every_s, "is no time", "Set a number of seconds.")
    report = LiveReport(folders)
    report.data()
    charting_library()
    serve(report, port, every_s, lambda url: print(f"{url}  follows the run until Ctrl-C.", flush=True))
    return 0

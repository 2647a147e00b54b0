"""``moedist bench``: measures what parts of a run cost on this machine."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  # what a record of every step costs, all metrics and sinks of the default recipe
  moedist bench logging

  # of a larger step, as JSON
  moedist bench logging --pairs 50 --json train.micro_batch=16 model.dim=128
"""
LOGGING = """\
Trains in one process, with and without a record of the step in turns, and prints the median of the pairs' ratios: the
cost of all metrics at train.log_every=1. W&B writes to files. A spread above 20 % is said: such a figure means nothing.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure what parts of a run cost",
        description="Measures what parts of a run cost on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    logging = benches.add_parser(
        "logging",
        help="the cost of all metrics of a step",
        description=LOGGING,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    logging.add_argument("overrides", nargs="*", metavar="key=value", help="parts and values, as of `moedist train`")
    logging.add_argument("--pairs", type=int, default=30, help="pairs of steps (default: 30)")
    logging.add_argument("--json", action="store_true", help="one JSON object on standard output")
    logging.set_defaults(measure=measure_logging)
    return parser


def main(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    return int(args.measure(args))


def measure_logging(args: argparse.Namespace) -> int:
    """``moedist bench logging``."""
    import dataclasses

    import torch

    from moedist.bench.logging import QUOTABLE, measure_logging
    from moedist.config import require
    from moedist.launch.compose import compose

    require(args.pairs >= 4, "--pairs", args.pairs, "are too few for a spread", "Take 4 or more.")
    config = compose(["launch.nproc=1", "mesh.ep=1", *args.overrides, "log.sinks.wandb.mode=offline"]).config
    on_cuda = config.mesh.device != "cpu" and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        cost = measure_logging(config, Path(folder), args.pairs, torch.device("cuda" if on_cuda else "cpu"))
    if args.json:
        print(json.dumps(dataclasses.asdict(cost) | {"quotable": cost.quotable}))
        return 0
    print(f"step    {1e3 * cost.plain_s:.1f} ms without a record ({cost.device}, {cost.ranks} rank)")
    print(f"record  {cost.cost:+.2%} of a step, quartiles {cost.spread:.1%} apart, {cost.pairs} pairs")
    if not cost.quotable:
        print(f"not to be quoted: the spread is above {QUOTABLE:.0%}; measure again on a quiet machine")
    return 0

"""``moedist analyze``: what the routers of a checkpoint have learned."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moedist.cli.train import report

EXAMPLES = """\
examples:
  # the newest checkpoint of a run on its held-out part, compared with the run's other checkpoints
  moedist analyze runs/first

  # a certain one
  moedist analyze runs/first/checkpoints/step_00000200

  # on texts of several domains
  moedist analyze runs/first --corpus 'python=src/**/*.py' --corpus 'prose=docs/*.md,README.md'

  # on all of the held-out part, on two ranks, for a script
  moedist analyze runs/first train.eval_batches=null launch.nproc=2 --json

It writes analysis.html, which opens in any browser and needs no network, and analysis.json into a new folder below
<run>/analysis. As `moedist eval` it is dropless, and reads train.eval_batches micro-steps of each text.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "analyze",
        help="show what a checkpoint's routers have learned",
        description="Shows which tokens each expert of a checkpoint takes, with which other experts, and since when.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN", help="a checkpoint's or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what shall differ from the trained run")
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=FILES",
        help="a text by name: files, globs and folders with commas between them; again for another domain",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; the rest on the other")
    return parser


def main(args: argparse.Namespace) -> int:
    """Analyzes; returns the exit code."""
    from moedist.launch.analysis import plan_analysis, validate_analysis
    from moedist.launch.folder import choose_folder, claim_folder
    from moedist.launch.node_groups import follow_nodes
    from moedist.launch.start import run_ranks
    from moedist.launch.validate import validate_evaluation
    from moedist.report.page import charting_library

    charting_library()
    analysis = plan_analysis(args.checkpoint, args.corpus, args.overrides)
    ranks, composed = analysis.ranks, follow_nodes(analysis.composed, analysis.ranks.nproc)
    config, mapping = composed.config, composed.mapping
    validate_evaluation(config, mapping, ranks.world_size)
    validate_analysis(analysis)
    if args.dry_run:
        facts = {
            "checkpoint": str(analysis.checkpoint),
            "compared with": ", ".join(path.name for path in analysis.others) or "none",
            "corpora": ", ".join(analysis.corpora) or f"held-out part of data={config.data.kind}",
            "folder": str(choose_folder(config.run)),
            "ranks": ranks.world_size,
            "ep": config.mesh.ep,
        }
        print(json.dumps(facts) if args.json else "\n".join(f"{key:<14} {value}" for key, value in facts.items()))
        return 0
    claim = claim_folder(config.run, mapping)
    try:
        request = analysis.write_request(claim.path)
        target = ["moedist.train", str(claim.path / "config.yaml"), "--analyze", str(request)]
        terminal = sys.stderr if args.json else None
        status = run_ranks(ranks, config.launch, claim.path, target, lock=claim.lock, terminal=terminal)
    finally:
        claim.release()
    report(status, claim.path, 1, as_json=args.json, command="analyze")
    return status.exit_code

"""``moedist eval``: the held-out loss of a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moedist.cli.train import report

EXAMPLES = """\
examples:
  # the newest checkpoint of a run
  moedist eval runs/first

  # a certain one, on all of the held-out part, on two ranks, for a script
  moedist eval runs/first/checkpoints/step_00000200 train.eval_batches=null launch.nproc=2 --json

  # on other text of the same tokens
  moedist eval runs/first data=text 'data.files=other/*.txt' run.allow_changes=[data]

The finished model is measured dropless, whatever its capacity factor was; moe.capacity.factor=1.25 sets a limit.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="measure a checkpoint",
        description="Measures a checkpoint on the held-out part, dropless.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN", help="a checkpoint's or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what shall differ from the trained run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; the rest on the other")
    return parser


def main(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    from moedist.launch.evaluation import plan_evaluation
    from moedist.launch.folder import choose_folder, claim_folder
    from moedist.launch.node_groups import follow_nodes
    from moedist.launch.start import run_ranks
    from moedist.launch.validate import validate_evaluation

    plan = plan_evaluation(args.checkpoint, args.overrides)
    ranks, composed = plan.ranks, follow_nodes(plan.composed, plan.ranks.nproc)
    config, mapping = composed.config, composed.mapping
    validate_evaluation(config, mapping, ranks.world_size)
    if args.dry_run:
        facts = {
            "checkpoint": str(plan.checkpoint),
            "folder": str(choose_folder(config.run)),
            "ranks": ranks.world_size,
            "ep": config.mesh.ep,
            "data": config.data.kind,
        }
        print(json.dumps(facts) if args.json else "\n".join(f"{key:<12} {value}" for key, value in facts.items()))
        return 0
    claim = claim_folder(config.run, mapping)
    try:
        target = ["moedist.train", str(claim.path / "config.yaml"), "--eval", str(plan.checkpoint)]
        terminal = sys.stderr if args.json else None
        status = run_ranks(ranks, config.launch, claim.path, target, lock=claim.lock, terminal=terminal)
    finally:
        claim.release()
    report(status, claim.path, 1, as_json=args.json, command="eval")
    return status.exit_code

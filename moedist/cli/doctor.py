"""``moedist doctor``: checks of a configuration on this machine."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedist.config import ConfigError

if TYPE_CHECKING:
    from moedist.launch.compose import Composed

EXAMPLES = """\
examples:
  # does the default recipe compute on ranks what one device computes? in under a minute, on this machine
  moedist doctor parity

  # the same for a configuration of your own: parts and values as of `moedist train`
  moedist doctor parity experiment=olmoe_1b_7b moe/dispatch=padded plugins=[my_package] moe/router=mine

  # for a run that exists
  moedist doctor parity runs/first --json
"""
PARITY = """\
Runs one optimizer step of a smaller copy of a configuration on ranks of this machine, runs the same global batch on one
device (its capacity groups one after the other, gradients added up, local bank, experts in a loop), and compares the
loss, the norm and every parameter's gradient. Kept: router, capacity, dispatch, experts' number, balance, accumulation,
activation checkpointing, engine. What was made smaller is said. Exit code 0: equal; 5: a difference, or a failed rank.
"""
NUM_WORST = 5


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check a configuration on this machine",
        description="Checks a configuration on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checks = parser.add_subparsers(dest="check", metavar="CHECK", required=True)
    parity = checks.add_parser(
        "parity",
        help="gradients on ranks against one device",
        description=PARITY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parity.add_argument("overrides", nargs="*", metavar="RUN | key=value", help="a run's folder; parts and values")
    parity.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def main(args: argparse.Namespace) -> int:
    """Checks; returns the exit code."""
    begin = time.monotonic()
    from moedist.cli.train import report
    from moedist.launch.parity import plan_parity, run_parity

    plan = plan_parity(configuration(args.overrides))
    result = run_parity(plan)
    if result.comparison is None:
        report(result.status, result.run_dir, 1, as_json=args.json, command="doctor")
        return result.status.exit_code or 5
    found = result.comparison
    seconds = time.monotonic() - begin
    if args.json:
        print(json.dumps({**found, "changes": plan.changes, "ranks": plan.ranks.world_size, "seconds": seconds}))
    else:
        print("\n".join(describe(found, plan.changes)))
        print(f"took       {seconds:.0f} s")
    return 0 if found["good"] else 5


def configuration(arguments: list[str]) -> Composed:
    """What the command line names: a run's own configuration or a composed one, with overrides."""
    from moedist.launch.compose import compose, compose_onto
    from moedist.launch.saved import CONFIG, read_mapping

    if not arguments or "=" in arguments[0] or arguments[0].startswith("~"):
        return compose(arguments)
    folder = Path(arguments[0]).expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError("RUN", arguments[0], "is no run folder", "Name one that holds a config.yaml, or key=value.")
    return compose_onto(read_mapping(folder / CONFIG), arguments[1:])


def describe(found: dict[str, Any], changes: tuple[str, ...]) -> list[str]:
    """The comparison as lines for people, the worst parameters last."""
    lines = [f"{'smaller' if index == 0 else '':<10} {change}" for index, change in enumerate(changes)]
    lines.append(f"{'data':<10} {found['data']}")
    for name, value in found["numbers"].items():
        difference = abs(value["ranks"] - value["one_device"])
        lines.append(f"{name:<10} {value['ranks']:.6f}, differs by {difference:.1e}  {verdict(value['good'])}")
    pairs = found["pairs"]
    lines.append(
        f"{'pairs':<10} {pairs['asked']} asked, {pairs['kept']} kept, expert by expert  {verdict(pairs['good'])}"
    )
    rows = [("parameter", "layout", "max|g|", "max|g - g'|", "limit", "")]
    for one in found["parameters"][:NUM_WORST]:
        sizes = (f"{one[key]:.1e}" for key in ("largest", "difference", "limit"))
        rows.append((one["name"], one["layout"], *sizes, verdict(one["good"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *table, ""]
    wrong = sum(not one["good"] for one in found["parameters"])
    limit = f"{found['tolerance']:.0e} x max|g| ({found['precision']})"
    if found["good"]:
        return [*lines, f"equal: all {len(found['parameters'])} gradients, within {limit}"]
    if not wrong:
        return [*lines, "UNEQUAL: the gradients agree, the numbers above do not"]
    lines.append(f"UNEQUAL: {wrong} of {len(found['parameters'])} gradients, beyond {limit}")
    return [*lines, f"look first at {found['last_wrong']}: the nearest to the loss, earlier layers inherit its fault"]


def verdict(good: bool) -> str:
    """In a word."""
    return "equal" if good else "UNEQUAL"

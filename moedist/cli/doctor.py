"""``moedist doctor``: checks of a machine, of its ranks and of a configuration."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

if TYPE_CHECKING:
    from moedist.doctor.finding import Finding
    from moedist.launch.compose import Composed

EXAMPLES = """\
examples:
  # is this machine fit for the default recipe? the machine itself, then its ranks against each other
  moedist doctor

  # before a run on several nodes, the same command on each: what every node offers, who is missing, which link is slow
  moedist doctor launch.nproc=8 launch.nnodes=2 launch.rendezvous=10.0.0.1:29400 mesh.timeout_s=60

  # one of the two alone, for a script
  moedist doctor machine --json
  moedist doctor ranks --nproc 4 mesh.device=cpu

  # does a configuration compute on ranks what one device computes? in under a minute, on this machine
  moedist doctor parity
  moedist doctor parity experiment=olmoe_1b_7b moe/dispatch=padded plugins=[my_package] moe/router=mine
  moedist doctor parity runs/first --json
"""
DESCRIPTION = """\
Checks a machine, its ranks, or a configuration. Without a word: the machine, then the ranks.

machine  versions, cores and threads, memory, shared and locked memory, open files, disk, network, W&B, GPUs. Nothing is
         started.
ranks    starts the ranks of a run, on all nodes that give the command, and measures them: who came last, who computes
         slowest, barrier, all-reduce, all-to-all even and uneven, the bandwidth of every pair. A rank that does not
         come within mesh.timeout_s seconds, or hangs, is named.
parity   runs one optimizer step of a smaller copy of a configuration on ranks of this machine, runs the same global
         batch on one device (its capacity groups one after the other, gradients added up, local bank, experts in a
         loop), and compares the loss, the norm and every parameter's gradient. Kept: router, capacity, dispatch,
         experts' number, balance, accumulation, activation checkpointing, engine. What was made smaller is said.

exit codes: 0 nothing that keeps a run from going well, 2 configuration, 4 a problem of the machine or its links, or
nodes that do not meet, 5 a rank is missing or failed, or gradients differ
"""
NUM_WORST = 5
CHECKS = ("machine", "ranks", "parity")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check a machine, its ranks or a configuration",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="machine | ranks | parity | RUN | key=value",
        help="what to check (left out: machine and ranks); a run's folder; parts and values as of `moedist train`",
    )
    parser.set_defaults(words=CHECKS)
    parser.add_argument("--nproc", type=int, metavar="N", help="the same as launch.nproc=N")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; the rest on the other")
    return parser


def main(args: argparse.Namespace) -> int:
    """Checks; returns the exit code."""
    words = [*args.overrides, *([] if args.nproc is None else [f"launch.nproc={args.nproc}"])]
    check = words.pop(0) if words and words[0] in CHECKS else None
    composed = configuration(words)
    if check == "parity":
        return check_parity(composed, as_json=args.json)
    return check_environment(composed, machine=check != "ranks", ranks=check != "machine", as_json=args.json)


def check_environment(composed: Composed, *, machine: bool, ranks: bool, as_json: bool) -> int:
    """Looks at this machine and at the ranks that a run would start; shows what was found as it is found."""
    import dataclasses

    from moedist.doctor.finding import worst
    from moedist.launch.examine import examine
    from moedist.launch.rank_check import check_ranks
    from moedist.launch.start import plan_ranks

    config = composed.config
    config.launch.check_start()
    planned = plan_ranks(config.launch, config.mesh.device)
    found: list[Finding] = []

    def show(findings: list[Finding]) -> None:
        found.extend(findings)
        if not as_json:
            print("\n".join(line for finding in findings for line in describe_finding(finding)), flush=True)

    if machine:
        show(examine(config, planned))
    exit_code, measured = 0, None
    if ranks:
        checked = check_ranks(planned, config.launch, config.mesh)
        show(checked.findings)
        exit_code, measured = checked.exit_code, checked.measured
    if exit_code == 0 and worst(found) == "problem":
        exit_code = ExitCode.ENVIRONMENT
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"exit_code": exit_code, "findings": listed, "measured": measured}))
    else:
        levels = [finding.level for finding in found]
        print("\n" + ", ".join(f"{name} {levels.count(name)}" for name in ("problem", "warning", "ok")))
    return exit_code


def describe_finding(finding: Finding) -> list[str]:
    """A finding as lines for people: how it is, what, and what to do."""
    lines = [f"{finding.level:<8} {finding.check:<19} {finding.text}"]
    return [*lines, f"{'':<28} -> {finding.remedy}"] if finding.remedy else lines


def check_parity(composed: Composed, *, as_json: bool) -> int:
    """Compares gradients on ranks with one device's."""
    begin = time.monotonic()
    from moedist.cli.train import report
    from moedist.launch.parity import plan_parity, run_parity

    plan = plan_parity(composed)
    result = run_parity(plan)
    if result.comparison is None:
        report(result.status, result.run_dir, 1, as_json=as_json, command="doctor")
        return result.status.exit_code or ExitCode.RANK_FAILED
    found = result.comparison
    seconds = time.monotonic() - begin
    if as_json:
        print(json.dumps({**found, "changes": plan.changes, "ranks": plan.ranks.world_size, "seconds": seconds}))
    else:
        print("\n".join(describe(found, plan.changes)))
        print(f"took       {seconds:.0f} s")
    return ExitCode.DONE if found["good"] else ExitCode.RANK_FAILED


def configuration(arguments: list[str]) -> Composed:
    """What the command line names: a run's own configuration or a composed one, with overrides."""
    from moedist.launch.compose import compose, compose_onto
    from moedist.launch.saved import CONFIG, read_mapping

    if not arguments or "=" in arguments[0] or arguments[0].startswith("~"):
        return compose(arguments)
    folder = Path(arguments[0]).expanduser()
    if not (folder / CONFIG).is_file():
        remedy = f"Name one that holds a {CONFIG}, key=value, or what to check: {', '.join(CHECKS)}."
        raise ConfigError("RUN", arguments[0], "is no run folder", remedy)
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

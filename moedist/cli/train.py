"""``moedist train``: composes a run, checks it, makes its folder and starts its ranks."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedist.config import ConfigError, require

if TYPE_CHECKING:
    from moedist.launch.compose import Composed
    from moedist.launch.start import Ranks
    from moedist.train.status import Status

EXAMPLES = """\
examples:
  # the recipe tiny_cpu, on four ranks of this machine
  moedist train

  # a recipe, a folder, and single values; `moedist train --cfg job` lists all keys
  moedist train experiment=tiny_cpu run.dir=runs/first launch.nproc=4 mesh.ep=2 train.steps=20 seed=1

  # other parts: a choice is a file of conf/, picked with a slash; a named part is taken away with ~
  moedist train moe/dispatch=padded moe/balance=[switch] data=text 'data.files=corpus/*.txt'
  moedist train '~moe.balance.z_loss'

  # go on after a preemption or a crash
  moedist train run.dir=runs/first run.resume=auto

  # a sweep: six runs, a folder for each below runs/capacity, a table at the end; the same command goes on with it
  moedist train -m run.dir=runs/capacity run.resume=auto moe.capacity.factor=1.0,1.25,2.0 moe/router=topk,noisy

  # what would run, for a script; what ranks of a cluster would hold, on a laptop
  moedist train --dry-run --json mesh.ep=4
  moedist train --dry-run launch.nnodes=128 launch.nproc=8 mesh.ep=64 moe.num_experts=64

A group and its key: moe/router=topk picks the file conf/moe/router/topk.yaml, moe.router.top_k=4 sets a value in it.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a model",
        description="Composes a configuration, checks it, makes the run folder and starts the ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parts and values of the configuration")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration, every key, and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, build some of the ranks without starting them, say what they hold, and stop",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; the rest on the other")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="a sweep: one run for each combination of values (key=a,b,c)"
    )
    return parser


def refuse_multirun(overrides: list[str]) -> ConfigError:
    """The error for ``-m`` below torchrun: what to do instead."""
    command = shlex.join(["moedist", "train", "-m", *overrides])
    return ConfigError(
        "--multirun", True, "needs a process that starts the ranks of each job", f"Run it without torchrun: {command}"
    )


def main(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    if args.multirun:
        return sweep(args)
    from moedist.launch.compose import compose, compose_yaml

    if args.cfg:
        from omegaconf import OmegaConf

        job = compose_yaml(args.overrides)
        print(json.dumps(OmegaConf.to_container(job)) if args.json else OmegaConf.to_yaml(job), end="")
        return 0

    from moedist.launch.folder import claim_folder
    from moedist.launch.node_groups import follow_nodes
    from moedist.launch.start import plan_ranks, run_ranks
    from moedist.launch.validate import validate

    composed = compose(args.overrides)
    ranks = plan_ranks(composed.config.launch, composed.config.mesh.device)
    composed = follow_nodes(composed, ranks.nproc)
    config = composed.config
    if args.dry_run:
        return show_dry_run(composed, ranks, as_json=args.json)
    validate(config, composed.mapping, ranks.world_size)  # the ranks open the data themselves
    terminal = sys.stderr if args.json else None
    if ranks.nnodes > 1:
        run_dir = shared_folder(config.run.dir)
        status = run_ranks(ranks, config.launch, run_dir, ["moedist.train", *args.overrides], terminal=terminal)
    else:
        claim = claim_folder(config.run, composed.mapping)
        run_dir = claim.path
        for line in claim.changes:
            print(f"moedist train: changed since the earlier start: {line}", file=sys.stderr)
        try:
            target = ["moedist.train", str(run_dir / "config.yaml")]
            status = run_ranks(ranks, config.launch, run_dir, target, lock=claim.lock, terminal=terminal)
        finally:
            claim.release()
    report(status, run_dir, ranks.nnodes, as_json=args.json, command="train")
    return status.exit_code


def sweep(args: argparse.Namespace) -> int:
    """Runs a sweep; returns its exit code."""
    from moedist.launch.sweep.sweep import run_sweep

    for flag in ("cfg", "dry_run"):
        require(
            not getattr(args, flag),
            f"--{flag.replace('_', '-')}",
            getattr(args, flag),
            "shows one run, and -m makes many",
            "Leave -m out, and give each key one value.",
        )
    terminal = sys.stderr if args.json else sys.stdout
    record = run_sweep(args.overrides, say=lambda line: print(f"moedist train: {line}", file=terminal, flush=True))
    print("", *record.table(), f"record: {record.path}", sep="\n", file=terminal)
    if args.json:
        print(json.dumps(record.as_mapping()))
    return record.exit_code


def shared_folder(folder: str | None) -> Path:
    """The folder of a run on several nodes, which all of them must name.

    Raises:
        ConfigError: it is not named.
    """
    if folder is None:
        raise ConfigError(
            "run.dir", None, "names no folder that several nodes share", "Set run.dir, the same on every node."
        )
    return Path(folder).expanduser().absolute()


def show_dry_run(composed: Composed, ranks: Ranks, *, as_json: bool) -> int:
    """Builds some of the ranks without starting them and says what they would be."""
    import dataclasses

    from moedist.launch.folder import choose_folder
    from moedist.launch.validate import validate_dry_run
    from moedist.train.dry_run import describe, dry_run

    config = composed.config
    data = validate_dry_run(config, composed.mapping, ranks.world_size)
    accumulation = config.train.accumulation(ranks.world_size)
    facts = {
        "name": config.run.name,
        "folder": str(choose_folder(config.run)),
        "ranks": ranks.world_size,
        "nodes": ranks.nnodes,
        "threads": ranks.threads,
        "ep": config.mesh.ep,
        "edp": ranks.world_size // config.mesh.ep,
        "steps": config.train.steps,
        "accumulation": accumulation,
        "tokens_step": accumulation * ranks.world_size * config.train.micro_batch * config.train.sequence_length,
        "resume": config.run.resume,
        "data": data.describe(),
    }
    plan = dry_run(config, data.vocab_size, ranks.world_size)
    if as_json:
        print(json.dumps({**facts, "built": dataclasses.asdict(plan)}))
    else:
        print("\n".join([*(f"{key:<12} {value}" for key, value in facts.items()), "", *describe(plan)]))
    return 0


def report(status: Status, run_dir: Path, nnodes: int, *, as_json: bool, command: str) -> None:
    """Says how the ranks ended: for a script as JSON, for people what failed, where to look and what to do."""
    import dataclasses

    from moedist.launch.outcome import launcher_log, rank_log, tail

    if as_json:
        print(json.dumps({"run_dir": str(run_dir), **dataclasses.asdict(status)}))
    if status.exit_code == 0:
        return
    log = launcher_log(run_dir, nnodes) if status.rank is None else rank_log(run_dir, status.rank)
    say = [f"moedist {command}: ended with {status.reason}: {status.message}"]
    if status.reason not in ("preempted", "config"):
        say += [f"  the end of {log}:", *(f"    {line}" for line in tail(log))]
    if status.last_good_checkpoint is not None:
        say.append(f"  last good checkpoint: {status.last_good_checkpoint}")
    if status.what_to_do:
        say.append(f"  what to do: {status.what_to_do}")
    print("\n".join(say), file=sys.stderr)

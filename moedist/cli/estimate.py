"""``moedist estimate``: parameters, memory, traffic and time of a run that nobody starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moedist.estimate.cluster import Cluster
    from moedist.estimate.estimate import Estimate
    from moedist.estimate.search import Found
    from moedist.train.config import RunConfig

EXAMPLES = """\
examples:
  # a recipe on the ranks that it asks for, H100s; for a script
  moedist estimate experiment=qwen3_30b_a3b
  moedist estimate experiment=mixtral_8x7b --json

  # other ranks, another device, what 1e12 tokens take and cost at 2.5 an hour and device
  moedist estimate experiment=olmoe_1b_7b mesh.ep=8 --ranks 16 --cluster h200 --tokens 1e12 --price 2.5

  # the fastest layouts for 64 devices
  moedist estimate experiment=qwen3_30b_a3b --ranks 64 --search

  # the shape of a Hugging Face model; a table of clusters of your own; routing as a run has recorded it
  moedist estimate --hf model/config.json mesh.ep=8 mesh.fsdp=64 --ranks 64
  moedist estimate experiment=olmoe_1b_7b --clusters mine.yaml --cluster ours
  moedist estimate experiment=tiny_cpu --trace runs/first

  # the closed form of memory against one step on tensors without storage, counted by torch
  moedist estimate model.dim=1024 moe.num_experts=16 train.micro_batch=16 --fake-run

How the figures are made: docs/estimate.md. They hold for even routing unless --trace says how rows lie.

exit codes: 0 fits, 2 configuration, 3 does not fit
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "estimate",
        help="say what a run needs, without starting it",
        description="Says what a run needs and how fast it could be, in seconds, without GPU and without ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parts and values of the configuration")
    parser.add_argument("--hf", type=Path, metavar="CONFIG_JSON", help="take the model from a Hugging Face config.json")
    parser.add_argument("--ranks", type=int, metavar="N", help="devices; left out: launch.nproc x launch.nnodes")
    parser.add_argument("--cluster", metavar="NAME", help="an entry of the table (default: h100, or laptop on a CPU)")
    parser.add_argument("--clusters", type=Path, metavar="YAML", help="entries of your own, on top of moedist's")
    parser.add_argument("--tokens", type=float, metavar="N", help="budget; left out: train.steps x the global batch")
    parser.add_argument("--price", type=float, metavar="P", help="of a device and hour, in your currency")
    parser.add_argument(
        "--trace", type=Path, metavar="RUN", help="recorded routing (log.trace), instead of even routing"
    )
    parser.add_argument("--search", action="store_true", help="try every layout that train accepts, and rank them")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts that --search shows (default: 10)")
    parser.add_argument("--fake-run", action="store_true", help="count the memory of one step on fake tensors too")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def main(args: argparse.Namespace) -> int:
    """Estimates; returns the exit code."""
    from moedist.estimate.cluster import choose_cluster, read_clusters
    from moedist.estimate.estimate import estimate
    from moedist.estimate.search import search
    from moedist.estimate.shape import Layout, ranks_of, shape_of
    from moedist.estimate.traffic import read_spreads
    from moedist.interop.hf_config import hf_overrides
    from moedist.launch.compose import compose
    from moedist.launch.node_groups import follow_nodes
    from moedist.launch.validate import accepts, validate_estimate, vocab_size_of

    check_flags(args)
    composed = compose([*([] if args.hf is None else hf_overrides(args.hf)), *args.overrides])
    default = "h100" if composed.config.mesh.device == "cuda" else "laptop"
    cluster = choose_cluster(read_clusters(args.clusters), args.cluster or default)
    config = follow_nodes(composed, composed.config.launch.nproc or cluster.ranks_per_node).config
    world = args.ranks or ranks_of(config, cluster.ranks_per_node)
    cluster = on_nodes(cluster, config, args.ranks)
    if args.search:
        found = search(config, vocab_size_of(config), world, cluster, accepts)
        return show_search(found, args)
    vocab_size = validate_estimate(config, world)
    spreads = None
    if args.trace is not None:
        layout = Layout.of(config, world, cluster.device)
        spreads = read_spreads(args.trace, shape_of(config, vocab_size), layout, cluster.ranks_per_node)
    return show(estimate(config, vocab_size, world, cluster, spreads=spreads), config, args)


def check_flags(args: argparse.Namespace) -> None:
    """Refuses numbers that are none, and flags that would change nothing.

    Raises:
        ConfigError: of the first one.
    """
    from moedist.config import require

    require(args.ranks is None or args.ranks >= 1, "--ranks", args.ranks, "is no number of ranks", "Give 1 or more.")
    require(args.top >= 1, "--top", args.top, "shows nothing", "Give 1 or more.")
    for name, at_least_0 in {"tokens": False, "price": True}.items():
        number = getattr(args, name)
        good = number is None or 0 < number < math.inf or (at_least_0 and number == 0)
        require(good, f"--{name}", number, "is no amount", "Give a number above 0.")
    for name in ("trace", "fake_run", "tokens", "price"):
        given = getattr(args, name)
        require(
            not (args.search and given not in (None, False)),
            f"--{name.replace('_', '-')}",
            given if isinstance(given, (bool, float)) else str(given),
            "says nothing of all layouts of --search",
            "Search first, then estimate the layout that you choose.",
        )


def on_nodes(cluster: Cluster, config: RunConfig, ranks: int | None) -> Cluster:
    """The cluster with nodes of as many ranks as the run puts on them: ``mesh.ranks_per_node``, or ``launch.nproc``
    where that is fewer than its devices and ``--ranks`` does not say otherwise."""
    started = config.launch.nproc if ranks is None else None
    number = config.mesh.ranks_per_node or min(started or cluster.ranks_per_node, cluster.ranks_per_node)
    return dataclasses.replace(cluster, ranks_per_node=number)


def compare_fake_run(found: Estimate, config: RunConfig) -> dict[str, Any]:
    """What one step on fakes holds, as ``fake_run``, and the closed form of the same: even routing, on a CPU."""
    from moedist.estimate.estimate import estimate
    from moedist.estimate.fake_run import fake_run

    vocab_size, world = found.shape.vocab_size, found.layout.world
    cluster = dataclasses.replace(found.cluster, device="cpu")
    closed = estimate(config, vocab_size, world, cluster, shape=found.shape).memory.peak
    return {**dataclasses.asdict(fake_run(config, vocab_size, world)), "closed_form": closed}


def show(found: Estimate, config: RunConfig, args: argparse.Namespace) -> int:
    """Says one estimate; returns the exit code."""
    from moedist.estimate.describe import budget, describe
    from moedist.estimate.estimate import as_mapping, what_to_change
    from moedist.launch.validate import accepts

    tokens = float(config.train.steps * found.tokens_per_step) if args.tokens is None else args.tokens
    spent = budget(found, tokens, found.cluster.price_per_hour if args.price is None else args.price)
    remedy = None if found.fits else what_to_change(config, found, accepts)
    fake = compare_fake_run(found, config) if args.fake_run else None
    if args.json:
        more = {
            "budget": dataclasses.asdict(spent),
            "change": remedy,
            "fake_run": fake,
        }
        print(json.dumps({**as_mapping(found), **more}))
        return 0 if found.fits else 3
    print("\n".join(describe(found)))
    print(spent.describe())
    if fake is not None:
        peak, apart = fake["peak"] / 2**30, fake["closed_form"] / fake["peak"] - 1
        print(f"fake run       {peak:.2f} GiB of live tensors at most; the closed form of a CPU is {apart:+.1%} off")
    if found.fits:
        return 0
    print(f"moedist estimate: does not fit: {found.memory.peak / 2**30:.2f} GiB per rank", file=sys.stderr)
    if remedy is None:
        print("  no change of layout on these ranks helps: take more ranks, or --search", file=sys.stderr)
    else:
        print(f"  it fits with {' '.join(remedy)}", file=sys.stderr)
    return 3


def show_search(found: Sequence[Found], args: argparse.Namespace) -> int:
    """Says the best layouts; returns the exit code."""
    from moedist.config import ConfigError
    from moedist.estimate.describe import describe_search
    from moedist.estimate.estimate import as_mapping

    if not found:
        raise ConfigError("--ranks", args.ranks, "has no layout that train accepts", "Try a multiple of mesh.ep.")
    best = found[: args.top]
    if args.json:
        listed = [{"overrides": one.overrides, **as_mapping(one.estimate)} for one in best]
        print(json.dumps({"layouts": len(found), "fit": sum(one.estimate.fits for one in found), "best": listed}))
    else:
        fit = sum(one.estimate.fits for one in found)
        print("\n".join([f"{len(found)} layouts that train accepts, {fit} fit", "", *describe_search(best)]))
    return 0 if best[0].estimate.fits else 3

"""``moedist bench``: measures a layer, its exchange, a step, a run, and what parts of it cost on this machine."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  # one MoE layer on four ranks against DeepSpeed's; ratio_to_deepspeed is ours over theirs, median
  moedist bench layer --config cpu --peer deepspeed --nproc 4 --json

  # against everybody who is installed, under three routings, nothing dropped; with a picture
  moedist bench layer --config cpu,cpu_many --routing all --capacity-factor none --plot layer.html

  # what more experts cost; what moving rows costs
  moedist bench scaling --config cpu_many
  moedist bench exchange --config cpu_many --nproc 4

  # a whole training step of a configuration in one process, phase by phase, with a trace for Perfetto
  moedist bench step --profile step.json train.micro_batch=8

  # the default recipe against the same model dense, in turns: tokens/s, and loss at equal tokens, FLOPs and seconds
  moedist bench dense --steps 400

  # what a record of every step costs, all metrics and sinks of the default recipe; of a larger step, as JSON
  moedist bench logging
  moedist bench logging --pairs 50 --json train.micro_batch=16 model.dim=128
"""
LAYER = """\
Runs one MoE layer forward and backward: ours, its twins, the experts' bare matrix products, and other people's layers
that are installed, all in every round, and prints medians and the medians of the rounds' ratios. First it measures what
the machine reaches on a large matrix product and a large copy: from these comes F2, the floor that shares are of
(docs/benchmarks.md). Routing is forced by adding the same offset to every router's logits. A figure whose spread
(distance of quartiles over median) is above 20 % is not to be quoted.
"""
SCALING = """\
Runs our layer with 8, 16, ... 256 experts at the same work per token, all in every round, and prints time over F2 of
each; growth is that of the last over that of the first. The optimizer's step is timed apart.
"""
EXCHANGE = """\
Moves rows to their experts and back, forward and backward, without experts in between, with each dispatcher, in turns
with four bare all-to-alls of as many bytes.
"""
STEP = """\
Trains in one process and prints the median step, its phases, tokens per second and the share of the measured peak; a
profile holds three further steps. Ranks of a real run are recorded by log.phases.
"""
DENSE = """\
Trains a configuration and the same model with dense layers as wide as the experts that a token meets, from step 0, a
step of one and a step of the other on the same data, in one process with the whole batch of the recipe's ranks. Prints
the median of the steps' ratios, and both held-out losses at equal tokens, equal active FLOPs and equal seconds.
"""
LOGGING = """\
Trains in one process, with and without a record of the step in turns, and prints the median of the pairs' ratios: the
cost of all metrics at train.log_every=1. W&B writes to files. A spread above 20 % is said: such a figure means nothing.
"""
ROUTINGS = ("balanced", "zipf", "one_empty")  # of moedist.bench.trial, which this must not import for its help


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure a layer, and what parts of a run cost",
        description="Measures a layer against others, its exchange, and what parts of a run cost on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        bench: argparse.ArgumentParser = benches.add_parser(
            name,
            help=summary,
            description=description,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        bench.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return bench

    layer = add("layer", "a MoE layer against its floor and other people's layers", LAYER)
    layer.add_argument("--peer", metavar="NAME,...", help="whom to compare with (default: everybody, and our twins)")
    layer.add_argument("--plot", type=Path, metavar="FILE", help="draw the answer as an HTML page (needs plotly)")
    scaling = add("scaling", "what more experts cost at the same work", SCALING)
    exchange = add("exchange", "what moving rows costs", EXCHANGE)
    for bench in (layer, scaling, exchange):
        bench.add_argument("--config", default="all", metavar="NAME,...", help="shapes (default: all of this device)")
        bench.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks, over which experts are spread")
        bench.add_argument("--rounds", type=int, default=15, metavar="N", help="that count (default: 15)")
        bench.add_argument("--capacity-factor", default="1.0", metavar="F", help="or none (default: 1.0)")
        bench.add_argument("--top-k", type=int, metavar="K", help="in place of the shape's")
        bench.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="to compute on")
        bench.set_defaults(measure=measure_layer, routing="balanced", peer=None, plot=None)
    for bench in (layer, exchange):
        names = f"{', '.join(ROUTINGS)} or all (default: balanced)"
        bench.add_argument("--routing", default="balanced", metavar="NAME,...", help=names)
    step = add("step", "a whole training step, phase by phase", STEP)
    step.add_argument("--steps", type=int, default=20, help="that count (default: 20)")
    step.add_argument("--profile", type=Path, metavar="FILE", help="write a trace of three further steps")
    step.set_defaults(measure=measure_step)
    dense = add("dense", "a run against the same model dense", DENSE)
    dense.add_argument("--steps", type=int, default=400, help="of each (default: 400)")
    dense.add_argument("--evaluations", type=int, default=8, metavar="N", help="of each (default: 8)")
    dense.set_defaults(measure=measure_dense)
    logging = add("logging", "the cost of all metrics of a step", LOGGING)
    for bench in (step, dense, logging):
        bench.add_argument("overrides", nargs="*", metavar="key=value", help="parts and values, as of `moedist train`")
    logging.add_argument("--pairs", type=int, default=30, help="pairs of steps (default: 30)")
    logging.set_defaults(measure=measure_logging)
    return parser


def main(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    return int(args.measure(args))


def measure_layer(args: argparse.Namespace) -> int:
    """``moedist bench layer``, ``scaling`` and ``exchange``."""
    from moedist.bench.plot import write_plot
    from moedist.bench.program import Question
    from moedist.bench.trial import choose_patterns
    from moedist.config import ConfigError
    from moedist.launch.bench import ask

    try:
        factor = None if args.capacity_factor == "none" else float(args.capacity_factor)
    except ValueError:
        remedy = "Set it above 0, or to none for dropless."
        raise ConfigError("--capacity-factor", args.capacity_factor, "is no number", remedy) from None
    question = Question(
        what=args.bench,
        shapes=args.config,
        patterns=choose_patterns(args.routing),
        factor=factor,
        top_k=args.top_k,
        peers=None if args.peer is None else tuple(args.peer.split(",")),
        rounds=args.rounds,
        device=args.device,
    )
    found = ask(question, args.nproc)
    print(json.dumps(found) if args.json else "\n".join(describe(found)))
    if args.plot is not None:
        write_plot(args.plot, found)
    return 0


def describe(found: Mapping[str, Any]) -> list[str]:
    """An answer as lines for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"machine    {found['device']}; {found['ranks']} ranks x {found['threads']} threads; load "
        f"{found['load_before']:.1f} before, {found['load_after']:.1f} after",
        f"versions   {versions}",
    ]
    tables = {"layer": layer_table, "scaling": scaling_table, "exchange": exchange_table}
    for case in found["cases"]:
        factor = "dropless" if case["capacity_factor"] is None else f"capacity factor {case['capacity_factor']:g}"
        lines += ["", f"{case['config']}, {case['routing']}, {factor}, {case['rounds']} rounds"]
        lines += tables[found["bench"]](case)
    if not found["quotable"]:
        lines += ["", "figures marked ! are not to be quoted: their spread is above 20 %; measure on a quiet machine"]
    return lines


def layer_table(case: Mapping[str, Any]) -> list[str]:
    """A line per contender."""
    ceilings, floor = case["ceilings"], case["floor"]
    lines = [
        f"  a rank reaches {1e3 * ceilings['matmul_tflops']:.1f} GFLOP/s, {ceilings['copy_gb_per_s']:.1f} GB/s; "
        f"F2 {floor['f2_ms']:.2f} ms, F3 {floor['f3_ms']:.2f} ms, exchange {floor['exchange_mb']:.1f} MB",
        f"  rows per expert: largest {case['rows_per_expert_max_over_mean']:.2f} x mean, {case['dropped']:.1%} dropped",
    ]
    rows = [("", "ms", "spread", "GFLOP/s", "of F2", "ours/this", "spread", "saved/least", "exchange ms")]
    for entry in case["contenders"]:
        exchange = "" if entry["exchange_ms"] is None else f"{entry['exchange_ms']:.2f}"
        rows.append(
            (
                entry["name"],
                f"{entry['ms']:.2f}",
                f"{entry['spread']:.0%}",
                f"{1e3 * entry['tflops']:.1f}",
                f"{entry['share_of_f2']:.0%}",
                f"{entry['ours_over_this']:.3f}{mark(entry['quotable'])}",
                f"{entry['ratio_spread']:.0%}",
                f"{entry['saved_over_least']:.2f}",
                exchange,
            )
        )
    spread = case["ratio_to_products_spread"]
    ratio = f"{case['ratio_to_products']:.3f}{mark(case['products_quotable'])}"
    rows.append(("bare products", f"{case['products_ms']:.2f}", "", "", "", ratio, f"{spread:.0%}", "", ""))
    return lines + table(rows) + [f"  skipped: {name} {reason}" for name, reason in case["skipped"].items()]


def scaling_table(case: Mapping[str, Any]) -> list[str]:
    """A line per number of experts."""
    rows = [("experts", "ms", "spread", "F2 ms", "ms / F2", "optimizer ms")]
    for size in case["sizes"]:
        keys = ("ms", "f2_ms", "over_f2", "optimizer_ms")
        ms, f2_ms, over_f2, optimizer_ms = (f"{size[key]:.2f}" for key in keys)
        rows.append((str(size["num_experts"]), ms, f"{size['spread']:.0%}", f2_ms, over_f2, optimizer_ms))
    growth = f"  growth {case['growth']:.2f}{mark(case['quotable'])}, spread {case['growth_spread']:.0%}"
    return [*table(rows), growth]


def exchange_table(case: Mapping[str, Any]) -> list[str]:
    """A line per dispatcher."""
    rows = [("", "ms", "spread", "over bare", "spread", "in exchanges ms", "sent MB", "error", "of gradient")]
    for entry in case["contenders"]:
        rows.append(
            (
                entry["name"],
                f"{entry['ms']:.2f}",
                f"{entry['spread']:.0%}",
                f"{entry['over_bare']:.2f}{mark(entry['quotable'])}",
                f"{entry['ratio_spread']:.0%}",
                f"{entry['exchange_ms']:.2f}",
                f"{entry['sent_mb']:.1f}",
                f"{entry['error']:.1e}",
                f"{entry['gradient_error']:.1e}",
            )
        )
    bare = f"{case['bare_ms']:.2f}"
    return table([*rows, ("bare", bare, "", "", "", bare, f"{case['bare_mb']:.1f}", "", "")])


def mark(quotable: bool) -> str:
    """Behind a figure."""
    return "" if quotable else " !"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def measure_step(args: argparse.Namespace) -> int:
    """``moedist bench step``."""
    import torch

    from moedist.bench.program import describe_machine
    from moedist.bench.step import measure_step
    from moedist.config import require
    from moedist.launch.compose import compose
    from moedist.mesh import Mesh
    from moedist.mesh.mesh import choose_device

    require(args.steps >= 4, "--steps", args.steps, "are too few for a spread", "Take 4 or more.")
    config = compose(["launch.nproc=1", "mesh.ep=1", *args.overrides]).config
    device: torch.device = choose_device(config.mesh.device, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_step(config, Path(folder), args.steps, device, args.profile)
    if args.json:
        print(json.dumps(describe_machine(Mesh.alone(device)) | found))
        return 0
    step_ms = f"{found['step_ms']:.1f} ms{mark(found['quotable'])}"
    print(f"step    {step_ms}, spread {found['spread']:.0%}; {found['routing']} routing")
    print(f"speed   {found['tokens_per_s']:,.0f} tokens/s, {found['gflop_per_s']:.1f} GFLOP/s, MFU {found['mfu']:.0%}")
    for phase, milliseconds in found["phases_ms"].items():
        print(f"  {phase:<12} {milliseconds:8.1f} ms")
    print(f"memory  {found['peak_gib']:.2f} GiB at its peak")
    if args.profile is not None:
        print(f"trace   {args.profile}, for Perfetto or chrome://tracing")
    return 0


def measure_dense(args: argparse.Namespace) -> int:
    """``moedist bench dense``."""
    import dataclasses

    from moedist.bench.program import describe_machine
    from moedist.bench.step import WARM_UP, compare_with_dense
    from moedist.config import require
    from moedist.launch.compose import compose
    from moedist.launch.start import plan_ranks
    from moedist.mesh import Mesh
    from moedist.mesh.mesh import choose_device

    least = WARM_UP + 4
    require(args.steps >= least, "--steps", args.steps, "are too few for a spread", f"Take {least} or more.")
    require(args.evaluations >= 1, "--evaluations", args.evaluations, "measures nothing", "Set it to 1 or more.")
    config = compose(args.overrides).config
    ranks = plan_ranks(config.launch, config.mesh.device).world_size
    train = dataclasses.replace(config.train, micro_batch=config.train.micro_batch * ranks, steps=args.steps)
    config = dataclasses.replace(config, train=train, mesh=dataclasses.replace(config.mesh, ep=1, fsdp=None))
    device = choose_device(config.mesh.device, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        found = compare_with_dense(config, Path(folder), args.steps, args.evaluations, device)
    if args.json:
        print(json.dumps(describe_machine(Mesh.alone(device)) | found))
        return 0
    speed, total, active = (found[key] for key in ("tokens_per_s", "total_parameters", "active_parameters"))
    rows = [("", "parameters", "active", "tokens/s")]
    rows += [(side, f"{total[side]:,}", f"{active[side]:,}", f"{speed[side]:,.0f}") for side in ("moe", "dense")]
    print("\n".join(table(rows)))
    over, routing = found["tokens_per_s_over_dense"], found["routing"]
    print(f"tokens/s over dense  {over:.2f}{mark(found['quotable'])}, spread {found['spread']:.0%}, {routing} routing")
    for what, losses in found["loss"].items():
        print(f"held-out loss at {losses['at']:.4g} {what:<8} moe {losses['moe']:.4f}  dense {losses['dense']:.4f}")
    return 0


def measure_logging(args: argparse.Namespace) -> int:
    """``moedist bench logging``."""
    import dataclasses

    import torch

    from moedist.bench.logging import measure_logging
    from moedist.bench.rounds import QUOTABLE
    from moedist.config import require
    from moedist.launch.compose import compose
    from moedist.launch.start import plan_ranks

    require(args.pairs >= 4, "--pairs", args.pairs, "are too few for a spread", "Take 4 or more.")
    config = compose(["launch.nproc=1", "mesh.ep=1", *args.overrides, "log.sinks.wandb.mode=offline"]).config
    on_cuda = config.mesh.device != "cpu" and torch.cuda.is_available()
    # One of the recipe's ranks, with its share of the cores: on all of them its steps would be shorter than any run's.
    threads = plan_ranks(compose(args.overrides).config.launch, config.mesh.device).threads
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        cost = measure_logging(config, Path(folder), args.pairs, torch.device("cuda" if on_cuda else "cpu"))
    if args.json:
        print(json.dumps(dataclasses.asdict(cost) | {"quotable": cost.quotable}))
        return 0
    where = f"{cost.device}, {cost.ranks} rank, {threads} thread{'s' * (threads > 1)}"
    print(f"step    {1e3 * cost.plain_s:.1f} ms without a record ({where})")
    print(f"record  {cost.cost:+.2%} of a step, quartiles {cost.spread:.1%} apart, {cost.pairs} pairs")
    if not cost.quotable:
        print(f"not to be quoted: the spread is above {QUOTABLE:.0%}; measure again on a quiet machine")
    return 0

"""``moedist checkpoint``: looks at checkpoints, verifies them, writes them anew in other forms."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

if TYPE_CHECKING:
    from moedist.train.checkpoint.summary import Summary

EXAMPLES = """\
examples:
  # what is in a run's newest checkpoint; every tensor; where its configuration differs from another's
  moedist checkpoint inspect runs/first
  moedist checkpoint inspect runs/first/checkpoints/step_00000400 --tensors
  moedist checkpoint inspect runs/first --compare runs/second

  # are all of its files as they were written? of a run folder: all of its checkpoints
  moedist checkpoint verify runs/first

  # the same checkpoint as one file, to go on from with run.resume=archive/step_400
  moedist checkpoint reshard runs/first archive/step_400 --files 1

  # the model alone, as safetensors
  moedist checkpoint consolidate runs/first exported --max-shard-size 2GB

  # what DeepSpeed's engine saved of a model with its own MoE layer, experts stacked by global id
  moedist checkpoint import-deepspeed deepspeed_run imported

No command needs a GPU, other processes or the layout that wrote the checkpoint, and none overwrites anything.

exit codes: 0 done, 2 bad input or a damaged checkpoint, 4 disk or environment
"""

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class OutputError(ConfigError):
    """An output that the disk refuses."""

    exit_code = ExitCode.ENVIRONMENT


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "checkpoint",
        help="inspect, verify, reshard or export a checkpoint",
        description="Looks at checkpoints, verifies them, and writes them anew in other forms.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(
        name: str,
        function: Callable[[argparse.Namespace], int],
        text: str,
        source: str = "a checkpoint's or a run's folder",
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=examples_of(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=source)
        added.add_argument("--json", action="store_true", help="one JSON object on standard output")
        added.set_defaults(act=function)
        return added

    inspected = action("inspect", inspect, "say what a checkpoint holds, from its manifest and index")
    inspected.add_argument("--tensors", action="store_true", help="list every tensor, none folded")
    inspected.add_argument(
        "--compare", type=Path, metavar="OTHER", help="a checkpoint, run folder or config.yaml whose keys may differ"
    )
    action("verify", verify, "read every byte and compare it with the manifest")
    resharded = action("reshard", reshard, "write a checkpoint anew over another number of files")
    resharded.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that does not exist yet")
    resharded.add_argument("--files", type=int, required=True, metavar="N", help="how many files of about one size")
    exported = action("consolidate", consolidate, "write the model of a checkpoint as one set of safetensors files")
    imported = action(
        "import-deepspeed",
        import_deepspeed,
        "write what DeepSpeed's engine saved of its own MoE layers as safetensors files",
        source="the folder that it saved to, or one tag's folder in it",
    )
    imported.add_argument(
        "--keep-names", action="store_true", help="of MoE layers too; left out: moedist's where they fit"
    )
    for writer in (exported, imported):
        writer.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that does not exist yet")
        writer.add_argument(
            "--max-shard-size", default="5GB", metavar="SIZE", help="of one file, such as 500MB (default: 5GB)"
        )
    return parser


def examples_of(action: str) -> str:
    """Those of one action."""
    blocks = [block for block in EXAMPLES.partition("\n")[2].split("\n\n") if f"moedist checkpoint {action} " in block]
    return "examples:\n" + "\n\n".join(blocks)


def main(args: argparse.Namespace) -> int:
    """Does one action; returns the exit code."""
    from moedist.train.checkpoint import CheckpointError, DiskError

    try:
        return int(args.act(args))
    except DiskError as error:
        raise OutputError(
            "OUTPUT", str(args.output), f"cannot be written: {error}", "Name a folder on a disk with room."
        ) from error
    except CheckpointError as error:
        raise ConfigError(
            "CHECKPOINT", str(args.checkpoint), f"cannot be used: {error}", "Restore it from a copy, or name another."
        ) from error


def inspect(args: argparse.Namespace) -> int:
    """Says what a checkpoint holds."""
    from moedist.launch.evaluation import find_checkpoint
    from moedist.train.checkpoint.summary import summarize

    summary = summarize(find_checkpoint(args.checkpoint))
    changes = None if args.compare is None else compare(summary, args.compare)
    if args.json:
        print(json.dumps(summary.as_mapping() | ({} if changes is None else {"differences": changes})))
        return 0
    print("\n".join(render(summary, every=args.tensors)))
    if changes is not None:
        print(f"\n{len(changes)} keys differ from {args.compare}")
        for key, (here, there) in changes.items():
            print(f"  {key}: {here!r} here, {there!r} there")
    return 0


def compare(summary: Summary, other: Path) -> dict[str, tuple[Any, Any]]:
    """Keys of the configuration that differ: value here, value there; None where there is no such key."""
    from moedist.launch.evaluation import find_checkpoint
    from moedist.launch.saved import CONFIG, read_mapping
    from moedist.train.checkpoint import read_meta
    from moedist.train.identity import flatten

    if other.is_file():
        mapping = read_mapping(other)
    elif (other / CONFIG).is_file():
        mapping = read_mapping(other / CONFIG)
    else:
        mapping = dict(read_meta(find_checkpoint(other)).get("config", {}))
    here, there = flatten(summary.meta.get("config", {})), flatten(mapping)
    keys = [key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key)]
    return {key: (here.get(key), there.get(key)) for key in keys}


def render(summary: Summary, *, every: bool) -> Iterator[str]:
    """What people see of a checkpoint, line by line."""
    from moedist.train.checkpoint.summary import dtype_name, fold

    meta = summary.meta
    layout = dict(meta.get("layout", {}))
    world = layout.pop("world", summary.num_ranks)
    how = ", ".join(f"{key} {value}" for key, value in layout.items() if value is not None)
    facts = {
        "checkpoint": str(summary.path),
        "step": f"{summary.step:,}",
        "tokens": f"{meta['tokens']:,}" if "tokens" in meta else None,
        "next sample": f"{meta['next_sample']:,}" if "next_sample" in meta else None,
        "run id": meta.get("run_id"),
        "written by": f"{world} rank{'s' if world != 1 else ''}{f' ({how})' if how else ''}; any layout reads it",
        "on disk": f"{size(summary.num_bytes)} in {summary.num_files} files",
    }
    yield from (f"{name:<12}  {value}" for name, value in facts.items() if value is not None)
    yield ""
    rows = [("part", "tensors", "elements", "bytes")]
    rows += [(p.name, f"{p.num_tensors:,}", f"{p.num_elements:,}", size(p.num_bytes)) for p in summary.parts]
    totals = [sum(getattr(p, f"num_{what}") for p in summary.parts) for what in ("tensors", "elements", "bytes")]
    rows.append(("total", f"{totals[0]:,}", f"{totals[1]:,}", size(totals[2])))
    yield from table(rows, numbers=(1, 2, 3))
    yield ""
    if every:
        listed = [(tensor.name, [tensor]) for tensor in summary.tensors]
    else:
        listed = fold(tensor for tensor in summary.tensors if tensor.part == "model")
    named = [("tensor", "shape", "dtype", "bytes", "")]
    for name, group in listed:
        first = group[0]
        times = f"x {len(group)}" if len(group) > 1 else ""
        named.append((name, str(list(first.shape)), dtype_name(first), size(first.num_bytes), times))
    yield from table(named, numbers=(3,))


def table(rows: Sequence[tuple[str, ...]], numbers: Collection[int]) -> Iterator[str]:
    """Rows in columns; those that hold ``numbers`` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        yield "  ".join(cells).rstrip()


def verify(args: argparse.Namespace) -> int:
    """Reads every byte of a checkpoint, or of all checkpoints of a run."""
    from moedist.launch.evaluation import find_checkpoint
    from moedist.train.checkpoint.manifest import find_damage, read_manifest, step_of

    inside = [path for below in ("", "checkpoints") for path in (args.checkpoint / below).glob("step_*")]
    paths = sorted({path.absolute() for path in inside if step_of(path) is not None}, key=lambda path: path.name)
    found = {}
    for path in paths or [find_checkpoint(args.checkpoint)]:
        found[path] = find_damage(path)
        if not args.json:
            if found[path]:
                print(f"damaged  {path}", *(f"         {line}" for line in found[path]), sep="\n", flush=True)
            else:
                files = read_manifest(path).files.values()
                print(f"sound    {path}  {len(files)} files, {size(sum(file.size for file in files))}", flush=True)
    damaged = [path for path in found if found[path]]
    if args.json:
        listed = [{"path": str(path), "damage": lines} for path, lines in found.items()]
        print(json.dumps({"exit_code": 2 if damaged else 0, "checkpoints": listed}))
    elif damaged:
        remedy = "Restore it from a copy; run.resume=auto passes it over."
        print(f"moedist checkpoint: {len(damaged)} of {len(found)} checkpoints damaged. {remedy}", file=sys.stderr)
    return 2 if damaged else 0


def reshard(args: argparse.Namespace) -> int:
    """Writes a checkpoint anew over another number of files."""
    from moedist.launch.evaluation import find_checkpoint
    from moedist.train.checkpoint.reshard import reshard

    if args.files < 1:
        raise ConfigError("--files", args.files, "is no number of files", "Set it to 1 or more.")
    manifest = reshard(find_checkpoint(args.checkpoint), args.output, args.files)
    total = sum(seal.size for seal in manifest.files.values())
    say(args, files=len(manifest.files), num_bytes=total, hint=f"Go on from it: run.resume={args.output}")
    return 0


def consolidate(args: argparse.Namespace) -> int:
    """Writes the model alone."""
    from moedist.launch.evaluation import find_checkpoint
    from moedist.train.checkpoint.consolidate import consolidate

    max_bytes = parse_size("--max-shard-size", args.max_shard_size)
    files = consolidate(find_checkpoint(args.checkpoint), args.output, max_bytes)
    total = sum(path.stat().st_size for path in files)
    say(args, files=len(files), num_bytes=total, hint="Experts are stacked along the first dim, by global id.")
    return 0


def import_deepspeed(args: argparse.Namespace) -> int:
    """Writes the weights of a DeepSpeed checkpoint."""
    from moedist.interop.deepspeed_moe import import_deepspeed

    max_bytes = parse_size("--max-shard-size", args.max_shard_size)
    files, kept = import_deepspeed(args.checkpoint, args.output, max_bytes, rename=not args.keep_names)
    total = sum(path.stat().st_size for path in files)
    names = f"DeepSpeed's names kept: {', '.join(kept)}." if kept else "MoE layers have moedist's names."
    say(args, files=len(files), num_bytes=total, hint=f"Experts are stacked by global id. {names}")
    return 0


def say(args: argparse.Namespace, files: int, num_bytes: int, hint: str) -> None:
    """What was written."""
    if args.json:
        print(json.dumps({"output": str(args.output), "files": files, "num_bytes": num_bytes}))
    else:
        print(f"Wrote {args.output}: {files} file{'s' if files != 1 else ''}, {size(num_bytes)}. {hint}")


def parse_size(key: str, text: str) -> int:
    """Bytes of ``500MB``.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1:
        raise ConfigError(key, text, "is no size", "Write it as 5GB, 500MB or a number of bytes.")
    return number


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"

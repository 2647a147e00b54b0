"""One rank: ``python -m moedist.train`` as torchrun starts it. Stands on the floor of `moedist.cli`.

Three ways in:

- ``<run>/config.yaml`` (what `moedist train` starts): the folder is there and this process reads its configuration;
- ``key=value ...`` below torchrun: global rank 0 composes, checks and makes the folder, the others get it from there;
- ``key=value ...`` without torchrun: the same as ``moedist train key=value ...``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import moedist
from moedist.cli.main import main as run_command
from moedist.cli.main import refuse
from moedist.cli.train import refuse_multirun
from moedist.config import ConfigError

if TYPE_CHECKING:
    from moedist.analyze.program import Request
    from moedist.mesh import Axis

MEETING_S = 600.0
"""Seconds that ranks wait for rank 0's configuration: it may read much data first."""


def main(argv: Sequence[str]) -> int:
    """Runs this rank; returns its exit code."""
    if "LOCAL_RANK" not in os.environ:
        return run_command(["train", *argv])
    from moedist.launch.process import die_with_parent

    die_with_parent()
    if any(argument in ("-m", "--multirun") for argument in argv):
        if int(os.environ["RANK"]) == 0:
            refuse("train", refuse_multirun([argument for argument in argv if not argument.startswith("-")]))
        return 2
    if argv and argv[0].endswith(".yaml") and "=" not in argv[0]:
        return run_saved(argv)
    return run_composed(argv)


def run_saved(argv: Sequence[str]) -> int:
    """Runs the configuration of a folder that the parent made."""
    parser = argparse.ArgumentParser(prog="moedist.train")
    parser.add_argument("config", type=Path)
    parser.add_argument("--eval", type=Path, help="measure this checkpoint instead of training")
    parser.add_argument("--analyze", type=Path, help="analyze what this file asks for instead of training")
    parser.add_argument("--parity", action="store_true", help="compare one step's gradients with one device's")
    args = parser.parse_args(argv)
    run_dir = args.config.parent.absolute()
    terminal = _redirect(run_dir)
    from moedist.launch.saved import decode_saved, read_mapping

    try:
        mapping = read_mapping(args.config)
        config = decode_saved(mapping)
        request = None if args.analyze is None else _read_request(args.analyze, mapping)
    except ConfigError as error:
        return _end_refused(run_dir, error)
    return _run(config, run_dir, terminal, checkpoint=args.eval, request=request, parity=args.parity)


def _read_request(path: Path, mapping: Mapping[str, Any]) -> Request:
    """What `moedist analyze` asks for."""
    from moedist.analyze.program import Request
    from moedist.launch.analysis import decode_corpora

    asked = json.loads(path.read_text(encoding="utf-8"))
    others = tuple(map(Path, asked["others"]))
    return Request(Path(asked["checkpoint"]), others, decode_corpora(mapping, asked["corpora"]))


def run_composed(overrides: Sequence[str]) -> int:
    """Runs what the command line says: rank 0 decides, all hear of it, and all end alike where it cannot be."""
    import torch
    import torch.distributed as dist

    from moedist.launch.saved import decode_saved
    from moedist.mesh import Axis, close_mesh
    from moedist.mesh.collectives import broadcast_json
    from moedist.mesh.restart import restarted

    # Both backends: join_mesh adopts this group, and which device the ranks use is not known yet.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=MEETING_S))
    try:
        group = dist.distributed_c10d._get_default_group()
        everyone = Axis("dp", dist.get_world_size(), dist.get_rank(), group.group_name)
        cpu = torch.device("cpu")
        again, strangers = restarted(everyone, cpu), _strangers(overrides, everyone)
        decision = _decide(overrides, everyone.size, again, strangers) if everyone.rank == 0 else None
        decision = broadcast_json(decision, everyone, cpu)
        if "exit_code" in decision:
            if os.environ["LOCAL_RANK"] == "0":  # each node's launcher has its own log
                print(decision["said"], file=sys.stderr)
            return int(decision["exit_code"])
        run_dir = Path(decision["run_dir"])
        return _run(decode_saved(decision["mapping"]), run_dir, _redirect(run_dir))
    finally:
        close_mesh()


def _strangers(overrides: Sequence[str], everyone: Axis) -> list[int]:
    """Ranks that were given other arguments than rank 0, or run another moedist. Called by all ranks.

    How a node starts its ranks (``launch``) is its own affair.
    """
    import torch

    from moedist.mesh.collectives import all_gather

    given = [moedist.__version__, *(text for text in overrides if not text.startswith("launch."))]
    digest = torch.tensor(list(hashlib.sha256(json.dumps(given).encode()).digest()), dtype=torch.uint8)
    digests = all_gather(digest, everyone)
    return (digests != digests[0]).any(dim=1).nonzero().flatten().tolist()


def _decide(
    overrides: Sequence[str], world_size: int, again: bool = False, strangers: Sequence[int] = ()
) -> dict[str, Any]:
    """Rank 0's part: the run's folder and configuration, or the exit code that all ranks leave with.

    Args:
        again: the launcher has started the ranks again, so the folder is theirs already.
        strangers: ranks that do not run the same.
    """
    from moedist.launch.compose import compose
    from moedist.launch.folder import claim_folder
    from moedist.launch.node_groups import follow_nodes
    from moedist.launch.validate import validate

    try:
        if strangers:
            raise ConfigError(
                "ranks",
                list(strangers),
                "were given other arguments than rank 0, or run another version of moedist",
                "Run the same line and the same moedist on every node; launch.* alone may differ.",
            )
        composed = follow_nodes(compose(overrides), int(os.environ["LOCAL_WORLD_SIZE"]))
        config = composed.config
        if again:
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="auto"))
        validate(config, composed.mapping, world_size)
        claim = claim_folder(config.run, composed.mapping)  # locked until this process ends
    except ConfigError as error:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            exit_code = refuse("train", error)
        return {"exit_code": exit_code, "said": said.getvalue().rstrip()}
    except BaseException:
        # the others must not wait for a configuration that never comes
        return {"exit_code": 1, "said": traceback.format_exc()}
    return {"mapping": composed.mapping, "run_dir": str(claim.path)}


def _run(
    config: Any,
    run_dir: Path,
    terminal: TextIO | None,
    checkpoint: Path | None = None,
    request: Request | None = None,
    parity: bool = False,
) -> int:
    from moedist.mesh import close_mesh, join_mesh
    from moedist.train.run import eval_rank, run_rank

    try:
        mesh = join_mesh(config.mesh)
        if checkpoint is not None:
            return eval_rank(config, run_dir, mesh, checkpoint, terminal)
        if request is not None:
            from moedist.analyze.program import analyze_rank

            return analyze_rank(config, run_dir, mesh, request, terminal)
        if parity:
            from moedist.doctor.parity import check_rank

            return check_rank(config, run_dir, mesh)
        return run_rank(config, run_dir, mesh, terminal)
    except ConfigError as error:
        return _end_refused(run_dir, error)
    finally:
        close_mesh()


def _redirect(run_dir: Path) -> TextIO | None:
    from moedist.train.rank_log import redirect_output

    return redirect_output(run_dir, int(os.environ["RANK"]))


def _end_refused(run_dir: Path, error: ConfigError) -> int:
    """Notes a configuration that only a rank could find wrong."""
    from moedist.train.status import write_status

    exit_code = refuse("train", error)
    if int(os.environ["RANK"]) == 0:
        write_status(run_dir, "config", str(error), exit_code=exit_code, what_to_do=error.remedy)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Checks that n ranks equal one device, for a user's configuration on this machine: shrinks it and runs one step."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from moedist.config import ConfigErrors
from moedist.doctor.parity import RESULT
from moedist.doctor.shrink import VOCAB_SIZE, Layout, shrink, shrink_layout, with_synthetic_data
from moedist.launch.compose import Composed, compose_onto
from moedist.launch.saved import CONFIG, write_config
from moedist.launch.start import Ranks, plan_ranks, run_ranks
from moedist.launch.validate import Data, validate, validate_elsewhere
from moedist.train.status import Status

CPU_RANKS = 4


@dataclasses.dataclass(frozen=True)
class ParityPlan:
    """What to run.

    Attributes:
        composed: the shrunk configuration.
        ranks: of it.
        changes: what differs from the user's, as lines for people.
    """

    composed: Composed
    ranks: Ranks
    changes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """How it came out.

    Attributes:
        status: of the ranks.
        run_dir: their folder; gone where all went well.
        comparison: what `moedist.doctor.parity.compare` gives; None where ranks failed before.
    """

    status: Status
    run_dir: Path
    comparison: dict[str, Any] | None


def plan_parity(composed: Composed) -> ParityPlan:
    """Shrinks a run to this machine.

    In fp64, or in fp32 where the engine knows no fp64. On the run's GPUs where there are two or more, else on the CPU.

    Raises:
        ConfigErrors: the user's configuration cannot run on the ranks it names.
    """
    mapping = {**composed.mapping, "run": {**composed.mapping["run"], "dir": None, "resume": "never"}}
    config = compose_onto(mapping).config
    wanted = plan_ranks(config.launch, config.mesh.device).world_size
    data = validate_elsewhere(config, mapping, wanted)
    device, limit = choose_ranks(config.mesh.device)
    nodes = config.ranks_per_node(wanted)
    layout = shrink_layout(Layout(wanted, config.mesh.ep, config.mesh.fsdp, nodes), limit)
    accumulation = config.train.accumulation(wanted)
    for precision in ("fp64", "fp32"):
        small = shrink(mapping, layout, device=device, precision=precision, accumulation=accumulation)
        if (reason := why_synthetic(data)) is not None:
            small = with_synthetic_data(small, data.vocab_size, reason)
        shrunk = compose_onto(small.mapping)
        try:
            validate(shrunk.config, shrunk.mapping, layout.world_size)
        except ConfigErrors as errors:
            if precision == "fp64" and {error.key for error in errors.errors} == {"train.precision"}:
                continue
            raise
        break
    ranks = plan_ranks(shrunk.config.launch, shrunk.config.mesh.device)
    before = f"ranks: {wanted} -> {layout.world_size} of {device}, mesh.ep {config.mesh.ep} -> {layout.ep}"
    return ParityPlan(shrunk, ranks, (before, *small.changes))


def choose_ranks(device: str) -> tuple[str, int]:
    """The device to check on, and how many ranks it can carry."""
    import torch

    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    return ("cuda", num_gpus) if num_gpus > 1 else ("cpu", max(2, min(CPU_RANKS, os.cpu_count() or 1)))


def why_synthetic(data: Data) -> str | None:
    """Why the check cannot read the run's own data; None where it can."""
    if data.source is None:
        return data.describe()
    return f"the data has {data.vocab_size}" if data.vocab_size > VOCAB_SIZE else None


def run_parity(plan: ParityPlan) -> ParityResult:
    """Runs the step on ranks and on one device, in a folder that is kept only where ranks fail."""
    run_dir = Path(tempfile.mkdtemp(prefix="moedist-parity-"))
    (run_dir / "logs").mkdir()
    write_config(run_dir / CONFIG, plan.composed.mapping)
    target = ["moedist.train", str(run_dir / CONFIG), "--parity"]
    status = run_ranks(plan.ranks, plan.composed.config.launch, run_dir, target, terminal=sys.stderr)
    result = run_dir / RESULT
    if status.exit_code != 0 or not result.is_file():
        return ParityResult(status, run_dir, None)
    comparison: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    shutil.rmtree(run_dir)
    return ParityResult(status, run_dir, comparison)

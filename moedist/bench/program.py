"""A measurement as ranks get it: asked for as plain values, answered as plain values."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from typing import Any, Literal

import torch

import moedist
from moedist.bench.exchange import measure_exchanges
from moedist.bench.layer import measure_layers
from moedist.bench.peer.find import choose_peers
from moedist.bench.scaling import measure_scaling
from moedist.bench.shapes import choose_shapes
from moedist.bench.trial import Pattern
from moedist.config import require
from moedist.mesh import Mesh

What = Literal["layer", "scaling", "exchange"]
PACKAGES = ("numpy", "deepspeed", "transformers", "megablocks", "scattermoe", "sonic-moe", "triton")


@dataclasses.dataclass(frozen=True)
class Question:
    """What to measure, of one layer.

    Attributes:
        what: `moedist.bench.layer`, `moedist.bench.scaling` or `moedist.bench.exchange`.
        shapes: names (`moedist.bench.shapes`) with commas between, or ``all``.
        patterns: forced routings, one case each.
        factor: capacity factor of all contenders that know one; None for dropless.
        top_k: in place of the shape's.
        peers: contenders beside ours; None for all.
        rounds: how often each contender runs.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    what: What
    shapes: str
    patterns: tuple[Pattern, ...] = ("balanced",)
    factor: float | None = 1.0
    top_k: int | None = None
    peers: tuple[str, ...] | None = None
    rounds: int = 15
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self, device_type: str, ranks: int) -> None:
        """Raises `ConfigError` where it cannot be measured so, before a rank starts."""
        require(self.rounds >= 4, "--rounds", self.rounds, "are too few for a spread", "Take 4 or more.")
        require(
            self.factor is None or self.factor > 0,
            "--capacity-factor",
            self.factor,
            "leaves no room for any pair",
            "Set it above 0, or to none for dropless.",
        )
        require(
            self.what != "exchange" or ranks > 1,
            "--nproc",
            ranks,
            "has nobody to exchange with",
            "Set it to 2 or more.",
        )
        choose_peers(self.peers)
        for shape in choose_shapes(self.shapes, device_type, self.top_k):
            require(
                shape.num_experts % ranks == 0,
                "--nproc",
                ranks,
                f"does not divide the {shape.num_experts} experts of {shape.name}",
                "Set it to a divisor.",
            )
            require(
                "one_empty" not in self.patterns or shape.top_k < shape.num_experts,
                "--routing",
                "one_empty",
                f"leaves {shape.num_experts - 1} experts for {shape.top_k} per token",
                "Leave it out, or set --top-k lower.",
            )


def answer(question: Question, mesh: Mesh) -> dict[str, Any]:
    """Measures; called on all ranks. The answer of rank 0 counts."""
    shapes = choose_shapes(question.shapes, mesh.device.type, question.top_k)
    load = os.getloadavg()[0]
    if question.what == "layer":
        peers = choose_peers(question.peers)
        cases = measure_layers(shapes, question.patterns, question.factor, peers, question.rounds, mesh)
    elif question.what == "scaling":
        cases = measure_scaling(shapes, question.factor, question.rounds, mesh)
    else:
        cases = measure_exchanges(shapes, question.patterns, question.factor, question.rounds, mesh)
    return {
        "bench": question.what,
        **describe_machine(mesh),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "quotable": all(case["quotable"] for case in cases),
        # Of the first case, so that a script that measures one need not look for it.
        **{key: value for key, value in cases[0].items() if key.startswith("ratio_to_") or key == "routing"},
        "cases": cases,
    }


def describe_machine(mesh: Mesh) -> dict[str, Any]:
    """Where and with what figures were found."""
    versions = {"moedist": moedist.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_cuda = mesh.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(mesh.device) if on_cuda else f"{processor()}, {os.cpu_count()} cores",
        "ranks": mesh.dp.size,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name as the kernel knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()

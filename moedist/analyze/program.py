"""One rank of an analysis, from its configuration to its exit code."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from moedist.analyze.measure import Routers, layer_sizes
from moedist.analyze.page import render
from moedist.analyze.result import FORMAT, corpus_result, domains, saturation
from moedist.analyze.vocabulary import read_vocabulary
from moedist.data.check import open_data
from moedist.data.contract import DataConfig
from moedist.mesh import Mesh
from moedist.mesh.slow import slow_axis
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig
from moedist.train.ending import Ending
from moedist.train.run import check_same_data, make_watchdog
from moedist.train.trainer import WATCHDOG_MARGIN_S

RESULT, PAGE = "analysis.json", "analysis.html"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to analyze.

    Attributes:
        checkpoint: whose routing.
        others: checkpoints of the same run to compare it with.
        corpora: texts by name; empty for the held-out part of the run's own data.
    """

    checkpoint: Path
    others: tuple[Path, ...]
    corpora: Mapping[str, DataConfig]


def analyze_rank(config: RunConfig, run_dir: Path, mesh: Mesh, request: Request, terminal: TextIO | None = None) -> int:
    """Analyzes a checkpoint; called on every rank. Returns the exit code.

    Rank 0 writes ``analysis.json`` and ``analysis.html`` into ``run_dir`` and lines to the terminal.
    """
    slow_s = config.mesh.save_timeout_s + WATCHDOG_MARGIN_S
    with make_watchdog(config, run_dir, mesh) as watchdog, Ending(run_dir, mesh) as end:
        watchdog.enter("data", 0, slow_s)
        own = open_data(config.data)
        sources = {name: open_data(data) for name, data in request.corpora.items()} or {"held-out": own}
        watchdog.enter("load", 0, slow_s)
        model = build_model(config, own.vocab_size, mesh).model
        store = CheckpointStore(request.checkpoint.parent, slow_axis(mesh, config.mesh.save_timeout_s))
        meta = store.load(request.checkpoint, {"model": model.state_dict()})
        if not request.corpora:
            check_same_data(meta, own, config)
        step = meta["step"]
        routers = Routers(model, sources, config, mesh, beat=lambda: watchdog.enter("eval", step))
        counts, choices = routers.count(step, keep=bool(request.others))
        shared = {}
        for path in request.others:
            watchdog.enter("load", step, slow_s)
            other = store.load(path, {"model": model.state_dict()})["step"]
            shared[other] = routers.count_shared(other, choices)
        if mesh.dp.rank == 0:
            watchdog.enter("write", step, slow_s)
            sizes = layer_sizes(model)
            num_tokens = sum(corpus.num_tokens for corpus in counts.values())
            vocabulary = read_vocabulary(config.data, own)
            result = {
                "format": FORMAT,
                "run": config.run.name,
                "checkpoint": str(request.checkpoint),
                "step": step,
                "layers": {str(block): {"experts": E, "top_k": K} for block, (E, K) in sizes.items()},
                "corpora": {name: corpus_result(corpus, vocabulary) for name, corpus in counts.items()},
                "described": {name: source.describe() for name, source in sources.items()},
                "domains": domains(counts),
                "saturation": saturation(shared, num_tokens, {block: K for block, (_, K) in sizes.items()}),
            }
            write(result, run_dir)
            print("\n".join(summary(result, run_dir)), file=terminal or sys.stdout)
        end.at("done", f"Step {step}: analyzed.")
    return end.exit_code


def write(result: Mapping[str, Any], folder: Path) -> None:
    """The result as JSON and as a page, in a folder of its own."""
    text = json.dumps(result, allow_nan=False)
    (folder / RESULT).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render(result), encoding="utf-8")


def summary(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What the terminal shows."""
    lines = []
    for name, corpus in result["corpora"].items():
        lines.append(f"step {result['step']}  {name}: {corpus['tokens']} tokens; how much of the choice of experts")
        for block, layer in corpus["layers"].items():
            entropy = max(layer["expert_entropy"], 1e-9)
            token, chance, kind = (
                f"{layer[key] / entropy:.1%}"
                for key in ("token_information", "token_information_bias", "class_information")
            )
            lines.append(f"  layer {block:>2}  is the token's: {token} (chance: {chance}); its class's: {kind}")
    for step, layers in result["saturation"].items():
        mean = sum(layers.values()) / max(len(layers), 1)
        lines.append(f"router saturation with step {step}: {mean:.1%} of a token's experts, mean over layers")
    return [*lines, f"{folder / PAGE}", f"{folder / RESULT}"]

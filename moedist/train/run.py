"""One rank of a run, from its configuration to its exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from moedist.data.check import open_data
from moedist.data.contract import Source
from moedist.data.yardstick import bigram_cross_entropy
from moedist.log.run_log import RunLog
from moedist.log.sink.contract import RunInfo
from moedist.mesh import Mesh
from moedist.mesh.collectives import broadcast_json
from moedist.mesh.restart import restarted
from moedist.mesh.slow import slow_axis
from moedist.model.attention.mixture import AttentionMixture
from moedist.moe.kernels.device import pairs_note
from moedist.moe.layer import experts_notes, routing_label
from moedist.moe.routed import RoutedLayer
from moedist.moe.token_choice import group_notes
from moedist.train.build import MATMUL_DTYPES, SpreadModel, build_model
from moedist.train.checkpoint import CheckpointError, CheckpointStore, read_meta
from moedist.train.config import RunConfig, TrainConfig
from moedist.train.ending import DataChangedError, Ending
from moedist.train.environment import describe_environment
from moedist.train.evaluate import evaluate
from moedist.train.identity import Identity, identify
from moedist.train.signals import StopRequest
from moedist.train.status import clear_status
from moedist.train.trainer import WATCHDOG_MARGIN_S, Progress, Trainer
from moedist.train.watchdog import Watchdog

CHECKPOINTS = "checkpoints"
TRACES = "traces"
ENVIRONMENT = "environment.json"


def run_rank(config: RunConfig, run_dir: Path, mesh: Mesh, terminal: TextIO | None = None) -> int:
    """Trains; called on every rank once the mesh stands. Returns the exit code; `status.json` says how it came.

    Args:
        config: decoded, the same on every rank.
        run_dir: the run folder, which exists and is this run's.
        mesh: who the ranks are.
        terminal: where people look, on global rank 0; None for this process's stdout.
    """
    if mesh.dp.rank == 0:
        clear_status(run_dir)
    slow_s = config.mesh.save_timeout_s + WATCHDOG_MARGIN_S
    with StopRequest() as stop, make_watchdog(config, run_dir, mesh) as watchdog, Ending(run_dir, mesh) as end:
        watchdog.enter("data", 0, slow_s)
        source = open_data(config.data)
        watchdog.enter("build", 0, slow_s)
        torch.manual_seed(config.seed)
        spread = build_model(config, source.vocab_size, mesh)
        store = CheckpointStore(
            run_dir / CHECKPOINTS, slow_axis(mesh, config.mesh.save_timeout_s), config.checkpoint.keep
        )
        store.prepare()
        found = find_checkpoint(config, store, restarted(mesh.dp, mesh.device))
        who = choose_identity(found, run_dir, mesh)
        progress = Progress(who.run_id, who.group_id, who.began_step)
        meta = {
            "config": written_config(run_dir),
            "data_fingerprint": source.fingerprint,
            "layout": {
                "world": mesh.dp.size,
                "ep": mesh.ep.size,
                "fsdp": config.mesh.fsdp,
                "device": mesh.device.type,
                "engine": config.engine.kind,
            },
        }
        trainer = Trainer(config, mesh, source, spread, store, stop, watchdog, progress, meta, run_dir / TRACES)
        with contextlib.closing(trainer.engine):
            end.progress = progress
            if found is not None:
                check_same_data(trainer.load(found), source, config)
            end.log = log = open_log(config, run_dir, mesh, progress, terminal)
            greet(log, config, source, spread, mesh, found)
            introduce_engine(log, trainer, run_dir)
            if trainer.run(log):
                summarize(log, trainer, run_dir)
                end.at("done", f"All {config.train.steps} steps done.")
            else:
                end.at("preempted", f"Asked to stop after step {progress.step}; saved.")
    return end.exit_code


def eval_rank(config: RunConfig, run_dir: Path, mesh: Mesh, checkpoint: Path, terminal: TextIO | None = None) -> int:
    """Measures a checkpoint on the held-out part; called on every rank. Returns the exit code.

    Rank 0 writes the result to ``eval.json`` in ``run_dir`` and a line to the terminal.
    """
    slow_s = config.mesh.save_timeout_s + WATCHDOG_MARGIN_S
    with make_watchdog(config, run_dir, mesh) as watchdog, Ending(run_dir, mesh) as end:
        watchdog.enter("data", 0, slow_s)
        source = open_data(config.data)
        watchdog.enter("load", 0, slow_s)
        model = build_model(config, source.vocab_size, mesh).model
        store = CheckpointStore(checkpoint.parent, slow_axis(mesh, config.mesh.save_timeout_s))
        meta = store.load(checkpoint, {"model": model.state_dict()})
        check_same_data(meta, source, config)
        loss = evaluate(model, source, config, mesh, meta["step"], beat=lambda: watchdog.enter("eval", meta["step"]))
        label = routing_label(model)
        note = f"  [{label}]" if label is not None else ""
        if mesh.dp.rank == 0:
            result = {"train/step": meta["step"], "eval/loss": loss, "checkpoint": str(checkpoint)}
            result |= {"moe/routing": label} if label is not None else {}
            (run_dir / "eval.json").write_text(json.dumps(result) + "\n")
            print(f"step {meta['step']}  held-out loss {loss:.4f} nats per token{note}", file=terminal or sys.stdout)
        end.at("done", f"Step {meta['step']}: held-out loss {loss:.4f} nats per token{note}.")
    return end.exit_code


def written_config(run_dir: Path) -> Mapping[str, Any]:
    """The configuration as the run folder holds it, values from the environment unresolved: what may be shown."""
    written: Mapping[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return written


def make_watchdog(config: RunConfig, run_dir: Path, mesh: Mesh) -> Watchdog:
    """Watches over this rank; heartbeats go to ``<run>/logs``."""
    return Watchdog(run_dir / "logs", mesh.dp.rank, config.mesh.timeout_s + WATCHDOG_MARGIN_S)


def find_checkpoint(config: RunConfig, store: CheckpointStore, again: bool = False) -> Path | None:
    """The checkpoint to go on from; None for a fresh start. Called by all ranks.

    Args:
        again: a group of ranks that the launcher has started again goes on from the run's own newest checkpoint,
            whatever ``run.resume`` says.
    """
    own = store.newest() if again or config.run.resume == "auto" else None
    if own is not None or config.run.resume in ("never", "auto"):
        return own
    path = Path(config.run.resume).expanduser()
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if path.name == CHECKPOINTS:
        newest = CheckpointStore(path, store.axis).newest()
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint to resume from")
        return newest
    store.verify(path)
    return path.absolute()


def choose_identity(found: Path | None, run_dir: Path, mesh: Mesh) -> Identity:
    """Who the run is, the same on all ranks."""
    own = found is not None and found.parent == (run_dir / CHECKPOINTS).absolute()
    meta = None if found is None else read_meta(found)
    identity = dataclasses.asdict(identify(meta, own, written_config(run_dir)))
    return Identity(**broadcast_json(identity, mesh.dp, mesh.device))


def check_same_data(meta: Mapping[str, Any], source: Source, config: RunConfig) -> None:
    """A data position means something in the corpus that it was counted in, only.

    Raises:
        DataChangedError: the corpus has changed and ``run.allow_changes`` does not list ``data``.
    """
    if meta["data_fingerprint"] != source.fingerprint and "data" not in config.run.allow_changes:
        raise DataChangedError(
            f"the corpus has changed since the checkpoint was written: its fingerprint was "
            f"{meta['data_fingerprint'][:12]} and is {source.fingerprint[:12]} now ({source.describe()}). Restore the "
            f"corpus, or go on with the new one by run.allow_changes=[data]."
        )


def open_log(config: RunConfig, run_dir: Path, mesh: Mesh, progress: Progress, terminal: TextIO | None) -> RunLog:
    """The sinks of the run, on global rank 0."""
    info = RunInfo(
        directory=run_dir,
        name=config.run.name,
        run_id=progress.run_id,
        group_id=progress.group_id,
        began_step=progress.began_step,
        resumed_step=progress.step,
        config=written_config(run_dir),
        environment=describe_environment(mesh),
        num_steps=config.train.steps,
        device=f"{mesh.dp.size} x {mesh.device.type}",
        max_scalar_keys=config.log.max_scalar_keys,
        terminal=terminal or sys.stdout,
    )
    if mesh.dp.rank == 0:
        (run_dir / ENVIRONMENT).write_text(json.dumps(info.environment, indent=2) + "\n", encoding="utf-8")
    return RunLog(config.log, info, mesh.dp.rank)


def greet(log: RunLog, config: RunConfig, source: Source, spread: SpreadModel, mesh: Mesh, found: Path | None) -> None:
    """What a user wants to know before the first step."""
    if mesh.dp.rank != 0:
        return
    train, size = config.train, spread.size
    tokens = train.accumulation(mesh.dp.size) * mesh.dp.size * train.micro_batch * train.sequence_length
    log.say(
        f"model  {size.total / 1e6:.2f} M parameters, {size.active / 1e6:.2f} M active; "
        f"{spread.flops_per_token / 1e6:.1f} MFLOP per token"
    )
    num_nodes = None if mesh.ep.nodes is None else mesh.ep.nodes.across.size
    over_nodes = f" over {num_nodes} nodes" if num_nodes is not None and num_nodes > 1 else ""
    log.say(
        f"ranks  {mesh.dp.size} x {mesh.device.type}: expert parallel {mesh.ep.size}{over_nodes}, expert data parallel "
        f"{mesh.edp.size}; {tokens} tokens per step"
    )
    log.say(f"data   {source.describe()}")
    yardstick = bigram_cross_entropy(source)
    if yardstick is not None:
        log.say(f"yardstick  held-out loss of a smoothed byte-bigram model: {yardstick:.4f} nats per byte")
    limits = [module.config.capacity for module in spread.model.modules() if isinstance(module, RoutedLayer)]
    for policy, group in dict.fromkeys((limit.drop_policy, limit.group) for limit in limits if not limit.causal):
        log.say(
            f"note   drop_policy {policy} in groups of a {group}: a later token can evict an earlier one in training; "
            f"generation and `moedist eval` drop nothing"
        )
    moe = config.moe
    per_token = moe.router.experts_per_token(moe.num_experts)
    note = moe.dispatch.note(moe.num_experts, per_token, moe.capacity.dropless, mesh.ep)
    if note is not None:
        log.say(f"note   {note}")
    if (note := pairs_note(mesh.device)) is not None:
        log.say(f"note   {note}")
    for line in experts_notes(spread.model, mesh.device, MATMUL_DTYPES[train.precision]):
        log.say(f"note   {line}")
    for line in group_notes(spread.model, num_nodes):
        log.say(f"note   {line}")
    mixtures = [module for module in spread.model.modules() if isinstance(module, AttentionMixture)]
    for line in dict.fromkeys(mixture.note for mixture in mixtures if mixture.note is not None):
        log.say(f"note   {line}")
    if (label := routing_label(spread.model)) is not None:
        log.say(f"note   {label} routing: the numbers of this run are not a trained model's")
    if found is not None:
        log.say(f"resume {found}")
        if (note := batch_note(train, read_meta(found)["layout"]["world"], mesh.dp.size)) is not None:
            log.say(f"note   {note}")


def batch_note(train: TrainConfig, earlier_ranks: int, ranks: int) -> str | None:
    """What a resume on another number of ranks changes where nothing says the global batch; None where it stays."""
    if train.global_batch_tokens is not None or ranks == earlier_ranks:
        return None
    tokens, earlier_tokens = (number * train.micro_batch * train.sequence_length for number in (ranks, earlier_ranks))
    return (
        f"{tokens} tokens per step, and {earlier_tokens} on the {earlier_ranks} ranks that wrote the checkpoint; "
        f"train.global_batch_tokens={earlier_tokens} with run.allow_changes=[train.global_batch_tokens] keeps the batch"
    )


def introduce_engine(log: RunLog, trainer: Trainer, run_dir: Path) -> None:
    """Says what a user should know of the engine, and keeps what it runs with beside the configuration."""
    if trainer.mesh.dp.rank != 0:
        return
    kind, settings = trainer.config.engine.kind, trainer.engine.settings()
    for note in trainer.engine.notes():
        log.say(f"{kind}  {note}")
    if settings is not None:
        (run_dir / f"{kind}.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def summarize(log: RunLog, trainer: Trainer, run_dir: Path) -> None:
    """The last lines of a run that is done."""
    record = trainer.last_record
    rows = {
        "train loss": ("train/loss", "{:.4f} nats per token"),
        "held-out loss": ("eval/loss", "{:.4f} nats per token"),
        "drop rate": ("moe/drop_rate", "{:.2%}"),
        "MaxVio": ("moe/max_vio", "{:.2f}"),
        "dead experts": ("moe/dead_experts", "{}"),
        "throughput": ("train/tokens_per_s", "{:,.0f} tokens/s"),
        "routing": ("moe/routing", "{}"),
    }
    for title, (key, form) in rows.items():
        if record.get(key) is not None:
            log.say(f"{title:<14} {form.format(record[key])}")
    log.say(f"{'run folder':<14} {run_dir}")

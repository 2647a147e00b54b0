"""Run folders as training leaves them, made without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moedist.launch.sweep.record import JobRecord, State
from moedist.log.run_files import EXPERTS, METRICS, append_frame
from moedist.train.status import Reason, write_status

CONFIG = {
    "seed": 0,
    "run": {"name": "first"},
    "mesh": {"ep": 2},
    "model": {"dim": 64, "layers": {"num_layers": 4}},
    "moe": {"num_experts": 8, "capacity": {"factor": 1.25}, "router": {"kind": "topk", "top_k": 2}},
    "train": {"steps": 40},
}


def make_run(
    folder: Path,
    *,
    name: str = "first",
    num_steps: int = 40,
    num_layers: int = 4,
    num_experts: int = 8,
    ended: Reason | None = "done",
    message: str = "",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A run that balances as it goes, with a row and a frame for every step; ``num_layers=0`` for none with experts."""
    folder.mkdir(parents=True)
    mapping = {**CONFIG, **config, "run": {"name": name}}
    (folder / "config.yaml").write_text(yaml.safe_dump(mapping))
    (folder / "environment.json").write_text(json.dumps({"moedist": "0.1.0", "packages": {"torch": "2.13.0"}}))
    random = np.random.default_rng(seed)
    for step in range(1, num_steps + 1):
        skew = 2.0 * np.exp(-3 * step / num_steps)
        logits_LE = skew * np.random.default_rng(7).normal(size=(num_layers, num_experts))
        share_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(1, keepdims=True) if num_layers else logits_LE
        load_LE = np.stack([random.multinomial(4096, share_E) for share_E in share_LE]) if num_layers else None
        write_row(folder, step, load_LE, step / num_steps, seed)
    if ended is not None:
        write_status(folder, ended, message or f"All {num_steps} steps done.", step=num_steps)
    return folder


def write_row(folder: Path, step: int, load_LE: np.ndarray | None, progress: float, seed: int = 0, **more: Any) -> None:
    """A row of ``metrics.jsonl`` and, of a model with experts, a frame of ``experts.bin``."""
    row: dict[str, Any] = {
        "train/step": step,
        "train/loss": 1.7 + 0.02 * seed + 4 * np.exp(-5 * progress) + 0.05 * np.sin(step),
        "train/tokens": 2048 * step,
        "train/tokens_per_s": 8900.0 - 100 * seed + 400 * np.cos(step),
        "train/grad_norm": 0.4 + 2 * np.exp(-8 * progress),
        "train/mfu": 0.061,
        "train/data_wait": 0.01,
        "time/compute": 0.2,
        "time/exchange": 0.05 + 0.01 * np.cos(step),
        "time/optimizer": 0.02,
        "time/data": 0.003,
        "time/other": 0.001,
        "train/lr_router": 0.003 * (1 - progress),
        "train/lr_experts": 0.003 * (1 - progress),
    }
    if step % 10 == 0:
        row["eval/loss"] = row["train/loss"] + 0.08
    if load_LE is not None:
        kept_LE = np.minimum(load_LE, int(1.25 * load_LE.sum(1)[0] / load_LE.shape[1]))
        vio_L = load_LE.max(1) / load_LE.mean(1) - 1
        row |= {
            "moe/drop_rate": float(1 - kept_LE.sum() / load_LE.sum()),
            "moe/max_vio": float(vio_L.max()),
            "moe/dead_experts": int((load_LE == 0).sum()),
            "moe/load_entropy": 0.8 + 0.2 * progress,
            "moe/router_entropy": 0.95 - 0.3 * progress,
            "moe/balance_loss": 1 + float(vio_L.mean()) / 10,
            "moe/z_loss": 5.0 + progress,
            "moe/layers/block": list(range(len(load_LE))),
            "moe/layers/max_vio": vio_L.tolist(),
            "moe/layers/drop_rate": (1 - kept_LE.sum(1) / load_LE.sum(1)).tolist(),
        }
        arrays = {"load": load_LE, "kept": kept_LE, "weight_norm": np.full(load_LE.shape, 3.0, np.float32)}
        append_frame(folder / EXPERTS, step, range(len(load_LE)), arrays)
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps({**row, **more}) + "\n")


def make_sweep(folder: Path, num_jobs: int = 4) -> Path:
    """A sweep over ``moe.router.top_k``, all of whose runs have one name; its last job was refused."""
    jobs = []
    for number in range(num_jobs):
        name = f"{number:03d}"
        moe = {**CONFIG["moe"], "router": {"kind": "topk", "top_k": number + 1}}
        make_run(folder / name, num_steps=10, seed=number, name="tiny_cpu", moe=moe)
        jobs.append(_job(number, "COMPLETED", "All 10 steps done."))
    jobs.append(_job(num_jobs, "FAILED", "no job of it ran"))
    fields = {"sweep_dir": str(folder), "overrides": [], "objectives": [{"eval/loss": 1.0}], "exit_code": 2}
    (folder / "sweep.json").write_text(json.dumps({**fields, "jobs": jobs}))
    return folder


def _job(number: int, state: State, message: str) -> dict[str, Any]:
    record = JobRecord(number, [f"moe.router.top_k={number + 1}"], str(number), f"{number:03d}", state, message=message)
    return dataclasses.asdict(record)

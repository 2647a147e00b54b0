"""What a tracker's file says is what the ranks did: every number of the experts, worked out from their routing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moedist.launch.compose import compose
from moedist.launch.folder import claim_folder
from moedist.log.config import LogConfig
from moedist.log.dashboard import plan_dashboard, row_of_run
from moedist.log.run_log import RunLog
from moedist.log.sink.contract import RunInfo
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.wandb import WandbConfig
from moedist.mesh import Mesh
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.layer import MoE
from moedist.train.run import run_rank
from tests.parity import counted_bytes
from tests.ranks import Here
from tests.rows import flat, read_rows
from tests.train.test_parity import BARE, steps_loader
from tests.train.tiny import LENGTH, ROWS, changed, make_trainer, no_measuring

WORLD, ACCUMULATION, EXPERTS, TOP_K, RATE = 4, 4, 8, 2, 0.01
CONFIG = changed(
    BARE,
    moe={
        "balance": {
            "switch": SwitchConfig(0.3, "sequence"),
            "z_loss": ZLossConfig(0.1),
            "bias": BiasConfig(rate=RATE),
        }
    },
    train={"activation_checkpointing": "full", "global_batch_tokens": WORLD * ACCUMULATION * ROWS * LENGTH},
)
OFFLINE = WandbConfig(mode="offline")
SINKS = {"jsonl": JsonlConfig(), "wandb": OFFLINE}
CONFIG = dataclasses.replace(CONFIG, log=LogConfig(dead_window=1, max_scalar_keys=400, sinks=SINKS))


def one_step(here: Here, folder: str) -> dict[str, Any]:
    """A step of a padded batch at EP = 4, logged; returns what this rank saw of it."""
    mesh = here.mesh_of(WORLD)
    trainer = make_trainer(CONFIG, CONFIG.data.open(), mesh)
    layers = [module for module in trainer.model.modules() if isinstance(module, MoE)]
    heard: dict[int, list[tuple[Any, Any]]] = {layer.layer: [] for layer in layers}
    plans: dict[int, list[Any]] = {layer.layer: [] for layer in layers}
    for layer in layers:
        layer.router.register_forward_hook(
            lambda _, args, routing, block=layer.layer: heard[block].append((routing, args[1]))
        )
        layer.bank.register_forward_pre_hook(lambda _, args, block=layer.layer: plans[block].append(args[1]))
    norms: dict[str, dict[int, Tensor]] = {}

    def keep_norms(*_: object) -> None:
        for name, of in (("weight_norm", lambda p: p), ("grad_norm", lambda p: p.grad)):
            norms[name] = {
                layer.layer: torch.stack(
                    [of(p).full_tensor().flatten(1).square().sum(1) for p in layer.bank.experts.parameters()]
                )
                .sum(0)
                .sqrt()
                for layer in layers
            }

    trainer.engine.optimizer.register_step_pre_hook(keep_norms)
    info = RunInfo(
        directory=Path(folder),
        name="tiny",
        run_id="abcd1234",
        group_id="abcd1234",
        resumed_step=0,
        config={},
        environment={},
        num_steps=20,
        device="4 x cpu",
        max_scalar_keys=CONFIG.log.max_scalar_keys,
        terminal=io.StringIO(),
    )
    log = RunLog(CONFIG.log, info, here.rank)
    loader = steps_loader(WORLD, ACCUMULATION, here.rank, ROWS, WORLD * ACCUMULATION * ROWS)
    with counted_bytes() as sent, arriving_bytes() as arrived:
        assert trainer.step(loader)
    trainer.record(log, evaluated=False)
    log.close("done")
    micro = {
        block: [
            {
                "valid_T": ctx.valid_T,
                "probs_TE": routing.probs_TE.detach(),
                "logits_TE": routing.logits_TE.detach(),
                "asked_TK": routing.expert_N.view(-1, TOP_K),
                "stays_TK": (plan.slot_N >= 0).view(-1, TOP_K),
            }
            for (routing, ctx), plan in zip(heard[block], plans[block], strict=True)
        ]
        for block in heard
    }
    return {"micro": micro, "sent": sum(sent), "arrived": sum(arrived), "norms": norms}


@contextlib.contextmanager
def arriving_bytes() -> Iterator[list[int]]:
    """Bytes that come to this rank by all-to-all, from itself too, call by call."""
    arrived: list[int] = []
    real = dist.all_to_all_single

    def counting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrived.append(output.untyped_storage().nbytes())
        return real(output, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield arrived


def entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp_min(1e-300).log()).sum(-1) / math.log(EXPERTS)


def vio(load_E: Tensor) -> float:
    return (load_E.max() / load_E.double().mean() - 1).item()


def of_layer(micro_batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A layer's numbers from the micro-batches of all ranks, by the formulas of docs/metrics.md."""
    load_E, kept_E, room = torch.zeros(EXPERTS), torch.zeros(EXPERTS), 0
    vios, switch, z_loss, entropies, tops = [], 0.0, [], [], []
    for seen in micro_batches:
        valid_T, probs_TE = seen["valid_T"], seen["probs_TE"]
        num_valid = int(valid_T.sum())
        asked_TE = torch.nn.functional.one_hot(seen["asked_TK"], EXPERTS).sum(1) * valid_T[:, None]
        kept_TE = (torch.nn.functional.one_hot(seen["asked_TK"], EXPERTS) * seen["stays_TK"][..., None]).sum(1)
        load_E, kept_E = load_E + asked_TE.sum(0), kept_E + kept_TE.sum(0)
        room += EXPERTS * min(num_valid, max(1, math.ceil(num_valid * TOP_K / EXPERTS)))
        if num_valid:
            vios.append(vio(asked_TE.sum(0)))
        for asked, probs, valid in zip(
            asked_TE.split(LENGTH), probs_TE.split(LENGTH), valid_T.split(LENGTH), strict=True
        ):
            if valid.any():  # a mean over sequences, weighted by their tokens
                share_E, mean_E = asked.sum(0) / asked.sum(), probs[valid].mean(0)
                switch += EXPERTS * (share_E * mean_E).sum().item() * int(valid.sum())
        z_loss += seen["logits_TE"][valid_T].logsumexp(1).square().tolist()
        entropies += entropy(probs_TE[valid_T]).tolist()
        tops += probs_TE[valid_T].max(1).values.tolist()
    num_tokens = len(z_loss)
    bias_E = RATE * torch.sign(load_E.mean() - load_E)
    return {
        "load": load_E.long().tolist(),
        "kept": kept_E.long().tolist(),
        "drop_rate": 1 - (kept_E.sum() / load_E.sum()).item(),
        "dropped_full": int(load_E.sum() - kept_E.sum()),
        "dropped_exhausted": 0,
        "dropped_barred": 0,
        "capacity_used": kept_E.sum().item() / room,
        "room": room,
        "max_vio": vio(load_E),
        "max_vio_micro": sum(vios) / len(vios),
        "load_cv": (load_E.std(correction=0) / load_E.mean()).item(),
        "load_entropy": entropy(load_E.double() / load_E.sum()).item(),
        "dead_experts": int((load_E == 0).sum()),
        "balance_loss": switch / num_tokens,
        "z_loss": sum(z_loss) / num_tokens,
        "router_entropy": sum(entropies) / num_tokens,
        "top_probability": sum(tops) / num_tokens,
        "bias_drift": (bias_E.max() - bias_E.min()).item(),
    }


def expected_keys(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Every key of the experts, from what the ranks saw."""
    blocks = sorted(by_rank[0]["micro"])
    layers = {block: of_layer([seen for rank in by_rank for seen in rank["micro"][block]]) for block in blocks}
    rooms = sum(layer.pop("room") for layer in layers.values())
    found: dict[str, Any] = {}
    for block, layer in layers.items():
        for name, norm_of in by_rank[0]["norms"].items():
            layer[f"expert_{name}"] = norm_of[block].square().mean().sqrt().item()
            values_E = norm_of[block].tolist()
            found |= {f"moe/layer_{block:02d}/expert_{e:03d}/{name}": value for e, value in enumerate(values_E)}
        for name in ("load", "kept"):
            found |= {f"moe/layer_{block:02d}/expert_{e:03d}/{name}": n for e, n in enumerate(layer[name])}
            found[f"moe/layer_{block:02d}/{name}"] = layer[name]
        dropped_E = [asked - kept for asked, kept in zip(layer["load"], layer["kept"], strict=True)]
        for reason, each_E in (("full", dropped_E), ("exhausted", [0] * EXPERTS), ("barred", [0] * EXPERTS)):
            found |= {f"moe/layer_{block:02d}/expert_{e:03d}/dropped_{reason}": n for e, n in enumerate(each_E)}
        found |= {f"moe/layer_{block:02d}/{k}": v for k, v in layer.items() if k not in ("load", "kept")}
    column = {name: [layer[name] for layer in layers.values()] for name in layers[blocks[0]]}
    loads, keeps = (sum(map(sum, column[name])) for name in ("load", "kept"))
    for name in ("balance_loss", "z_loss", "router_entropy", "top_probability", "load_entropy", "load_cv"):
        found[f"moe/{name}"] = sum(column[name]) / len(blocks)
    for name in ("max_vio", "max_vio_micro", "bias_drift"):
        found[f"moe/{name}"] = max(column[name])
    for name in ("dead_experts", "dropped_full", "dropped_exhausted", "dropped_barred"):
        found[f"moe/{name}"] = sum(column[name])
    for name in ("expert_weight_norm", "expert_grad_norm"):
        found[f"moe/{name}"] = math.sqrt(sum(value**2 for value in column[name]) / len(blocks))
    found |= {"moe/drop_rate": 1 - keeps / loads, "moe/capacity_used": keeps / rooms}
    found["moe/balance_loss_scaled"] = 0.3 * sum(column["balance_loss"])
    found["moe/z_loss_scaled"] = 0.1 * sum(column["z_loss"])
    found["moe/exchange_bytes"] = sum(rank["sent"] for rank in by_rank)
    arrived = [rank["arrived"] for rank in by_rank]
    found["moe/exchange_imbalance"] = max(arrived) / (sum(arrived) / WORLD) - 1
    return found


def wandb_row(folder: Path) -> dict[str, Any]:
    """The one row of a run's ``.wandb`` file, read by W&B's own reader."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]
    (row,) = [row for row in rows if "train/step" in row]
    return row


@pytest.mark.pitfall("12")
def test_the_tracker_holds_what_the_ranks_did(ranks, tmp_path: Path):
    """Accumulation 4, recomputation, EP = 4, padding, drops, a bias: every key of the experts."""
    by_rank = ranks(WORLD).run(one_step, str(tmp_path))
    expected, row = expected_keys(by_rank), wandb_row(tmp_path)
    assert expected["moe/drop_rate"] > 0.1 and expected["moe/dropped_full"] > 0
    for key, value in expected.items():
        if isinstance(value, list):
            assert row[f"{key}.values"] == value, key
        else:
            assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert expected["moe/exchange_imbalance"] > 0
    assert {key.partition(".")[0] for key in row if key.startswith("moe/")} <= expected.keys(), "none is left out"
    (file_row,) = read_rows(tmp_path)
    written = {key for key in flat(file_row) if key != "moe/layers/block"}
    assert written <= {key.partition(".")[0] for key in row}, "metrics.jsonl has no number that the tracker lacks"
    parts = [row[f"time/{part}"] for part in ("data", "compute", "exchange", "optimizer", "other")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(row["time/step"]) and row["time/exchange"] > 0
    planned = plan_dashboard(row_of_run(tmp_path, CONFIG.log.max_scalar_keys), [])
    named = {key for section in planned for panel in section.panels for key in panel.keys}
    tracked = {key.partition(".")[0] for key in row}
    assert named <= tracked and len(named) > 60, "every key that a panel of the dashboard names is there"


def test_no_secret_is_in_any_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All loggers on; secrets where users keep them: in the environment, and in the configuration by reference."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PLANTED"):
        monkeypatch.setenv(name, "canary-0123456789")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackio"))
    composed = compose(
        [
            "experiment=null", "data=synthetic", "log/sink=[jsonl,wandb,tensorboard,trackio]", "train.steps=2",
            "log.sinks.wandb.mode=offline", "log.sinks.wandb.tags=['${oc.env:PLANTED}']", "model.dim=16",
            f"run.dir={tmp_path / 'run'}", "model.layers.num_layers=2", "train.log_every=1", "train.eval_every=null",
        ]
    )  # fmt: skip
    quiet = dataclasses.replace(composed.config, log=LogConfig(sinks={**composed.config.log.sinks, "wandb": OFFLINE}))
    claim = claim_folder(composed.config.run, composed.mapping)
    try:
        with no_measuring():
            assert run_rank(quiet, claim.path, Mesh.alone(), io.StringIO()) == 0
    finally:
        claim.release()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"metrics.jsonl", "experts.bin", "environment.json", "config.yaml"}
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    assert [path for path in files if b"canary" in path.read_bytes()] == []
    assert "${oc.env:PLANTED}" in (tmp_path / "run" / "config.yaml").read_text()

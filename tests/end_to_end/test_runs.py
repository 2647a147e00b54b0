"""The main job in real processes: what a run leaves behind, and what signals and kills do to it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from moedist.data.loader import Loader
from moedist.launch.saved import decode_saved, read_mapping
from moedist.mesh import Axis, Mesh
from moedist.model.contract import StepContext
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore, read_meta
from moedist.train.checkpoint.manifest import folder_name, verify
from tests.end_to_end.runs import PLUGINS, of_no_clock, processes_of, start, train
from tests.rows import read_rows

EXPERTS, TOP_K, TOKENS_STEP, STEPS = 8, 2, 64, 40
OUTSIDE = (
    "model=scaled",
    "model/attention=mean",
    "moe/router=hashed",
    "moe/dispatch=counted",
    "moe/bank=halved",
    "log/sink=[jsonl,gate]",
)


@dataclasses.dataclass
class End:
    """How one command ended: its exit code, output, and the status file as it was then."""

    exit_code: int
    out: str
    err: str
    status: dict[str, Any]


@dataclasses.dataclass
class Story:
    """A folder and what happened in it, in order."""

    folder: Path
    ends: list[End]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder)


def ended(command: Any) -> End:
    exit_code, out, err = command.wait()
    path = command.folder / "status.json"
    return End(exit_code, out, err, json.loads(path.read_text()) if path.exists() else {})


def uninterrupted(folder: Path) -> Story:
    """A run to its end, then its evaluation on the whole held-out part."""
    story = Story(folder, [ended(train(folder))])
    story.ends.append(ended(start(folder, "eval", str(folder), "--json", "train.eval_batches=null", "launch.nproc=2")))
    return story


def stopped_and_killed(folder: Path) -> Story:
    """SIGTERM after step 10 or so; on again, rank 1 killed after step 20; on again, to the end. Saves in the
    background."""
    background = "checkpoint.background=true"
    first = train(folder, background, gate=10)
    first.reached()
    first.process.send_signal(signal.SIGTERM)
    first.told("SIGTERM")
    first.open_gate()
    ends = [ended(first)]
    second = train(folder, background, "run.resume=auto", gate=24)
    second.reached()
    os.kill(second.pid_of(1), signal.SIGKILL)
    second.open_gate()
    ends.append(ended(second))
    return Story(folder, [*ends, ended(train(folder, background, "run.resume=auto"))])


def interrupted(folder: Path) -> Story:
    """A run of choices that all live outside moedist; Ctrl-C after step 4 or so."""
    command = train(folder, *OUTSIDE, gate=4)
    command.reached()
    command.process.send_signal(signal.SIGINT)
    command.told("SIGTERM")
    command.open_gate()
    return Story(folder, [ended(command)])


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two at a time: each start costs seconds of imports."""
    with ThreadPoolExecutor(2) as pool:
        tellers = (stopped_and_killed, uninterrupted)
        futures = {teller.__name__: pool.submit(teller, tmp_path_factory.mktemp("story") / "run") for teller in tellers}
    yield futures
    for future in futures.values():
        if future.exception() is None:
            assert processes_of(future.result().folder) == []


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process reads the runs' configurations, which name choices of the plug-in package."""
    monkeypatch.syspath_prepend(str(PLUGINS))


@pytest.fixture
def whole(stories) -> Story:
    return stories["uninterrupted"].result()


@pytest.fixture
def chain(stories) -> Story:
    return stories["stopped_and_killed"].result()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return interrupted(tmp_path_factory.mktemp("story") / "run")


def test_a_run_leaves_its_folder(whole: Story):
    end, folder = whole.ends[0], whole.folder
    assert end.exit_code == 0, end.err
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "experts.bin", "checkpoints", "wandb",
        "logs", "status.json",
    }  # fmt: skip
    assert {path.name for path in (folder / "logs").iterdir()} >= {"rank_0.log", "rank_1.log", "launcher.log"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest", folder_name(36), folder_name(40),
    ]  # fmt: skip
    assert (folder / "checkpoints" / "latest").read_text().strip() == folder_name(40)
    assert verify(folder / "checkpoints" / folder_name(40)).step == 40
    config = decode_saved(read_mapping(folder / "config.yaml"))
    assert (config.seed, config.train.steps, config.mesh.ep, config.plugins) == (3, 40, 2, ("outside",))


def test_its_status(whole: Story):
    status = whole.ends[0].status
    assert (status["reason"], status["exit_code"], status["step"]) == ("done", 0, STEPS)
    assert status["last_good_checkpoint"] == str(whole.folder / "checkpoints" / folder_name(40))


def test_what_it_says(whole: Story):
    said = whole.ends[0].out
    for words in ("held-out loss", "tok/s", "MaxVio", "drop", "ETA", f"run folder     {whole.folder}"):
        assert words in said
    assert "W&B: offline" in said and "Traceback" not in said + whole.ends[0].err


def test_metrics_hold_the_documented_keys(whole: Story):
    rows = whole.rows
    assert [row["train/step"] for row in rows] == list(range(2, STEPS + 1, 2))
    columns = {
        "balance_loss", "z_loss", "drop_rate", "capacity_used", "max_vio", "max_vio_micro", "load_cv", "load_entropy",
        "router_entropy", "top_probability", "dead_experts", "dropped_full", "dropped_exhausted", "dropped_barred",
        "expert_weight_norm", "expert_grad_norm",
    }  # fmt: skip
    documented = {
        "train/step", "train/loss", "train/tokens", "train/tokens_per_s", "train/grad_norm", "train/memory_gib",
        "train/lr_router", "train/lr_experts", "train/lr_other", "train/mfu", "train/tflops", "train/data_wait",
        "time/step", "time/data", "time/compute", "time/exchange", "time/optimizer", "time/other",
        "time/compute_imbalance", "moe/exchange_bytes", "moe/exchange_imbalance",
        "moe/balance_loss_scaled", "moe/z_loss_scaled", "moe/layers/block",
        *(f"moe/{name}" for name in columns), *(f"moe/layer_01/{name}" for name in columns),
        *(f"moe/layer_01/{name}" for name in ("load", "kept")),
    }  # fmt: skip
    for row in rows:
        assert set(row) == documented | ({"eval/loss"} if row["train/step"] in (20, 40) else set())


def test_metrics_agree_with_the_loads(whole: Story):
    limit = 2 * 10  # of 2 ranks with 32 tokens each: ceil(1.25 * 32 * 2 / 8)
    assert sum(row["moe/drop_rate"] for row in whole.rows) > 0
    for row in whole.rows:
        load, kept = row["moe/layer_01/load"], row["moe/layer_01/kept"]
        assert len(load) == len(kept) == EXPERTS and sum(load) == TOKENS_STEP * TOP_K
        assert all(stays <= min(asks, limit) for stays, asks in zip(kept, load, strict=True))
        assert row["moe/dropped_full"] == sum(load) - sum(kept)
        assert row["moe/drop_rate"] == pytest.approx(1 - sum(kept) / sum(load), abs=1e-12)
        assert (
            row["moe/max_vio"]
            == pytest.approx(row["moe/layer_01/max_vio"], rel=1e-5)
            == pytest.approx(max(load) * EXPERTS / sum(load) - 1)
        )
        assert row["train/tokens"] == row["train/step"] * TOKENS_STEP
        assert row["train/lr_experts"] <= 5e-4 and row["train/grad_norm"] > 0 and row["train/tokens_per_s"] > 0
    assert whole.rows[-1]["train/loss"] < whole.rows[0]["train/loss"]


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """All records of a run folder of W&B, read by its own reader."""
    (path,) = run.glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """Those of them that hold a step's numbers."""
    rows = [record["history"]["item"] for record in wandb_records(run) if record["type"] == "history"]
    return [row for row in rows if "train/step" in row]


def test_the_offline_wandb_file_holds_them_too(whole: Story):
    (path,) = whole.folder.glob("wandb/offline-run-*")
    records = wandb_records(path)
    history = {row["train/step"]: row for row in wandb_rows(path)}
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["run_id"] == read_meta(whole.folder / "checkpoints" / folder_name(40))["run_id"]
    for row in whole.rows:
        stored = history[row["train/step"]]
        for key, value in row.items():
            if key == "moe/layers/block":
                continue
            if isinstance(value, list):
                assert stored[f"{key}.values"] == value
                assert [
                    stored[f"moe/layer_01/expert_{e:03d}/{key.rpartition('/')[2]}"] for e in range(EXPERTS)
                ] == value
            else:
                assert stored[key] == pytest.approx(value, rel=1e-5 if key.startswith("moe/layer_") else 1e-12)


def test_sigterm_saves_and_says_so(chain: Story):
    end = chain.ends[0]
    assert end.exit_code == 75, end.err
    assert (end.status["reason"], end.status["exit_code"]) == ("preempted", 75)
    step = end.status["step"]
    assert 10 <= step < STEPS
    assert end.status["last_good_checkpoint"].endswith(folder_name(step))
    assert "run.resume=auto" in end.err


def test_a_killed_rank_is_named(chain: Story):
    end = chain.ends[1]
    assert end.exit_code == 5, end.err
    assert (end.status["reason"], end.status["rank"]) == ("peer_lost", 1)
    assert "Rank 1 was ended by SIGKILL" in end.status["message"] and "SIGKILL" in end.err
    assert end.status["last_good_checkpoint"].endswith(folder_name(24 if "step_00000024" in end.err else 18))
    assert "run.resume=auto" in end.status["what_to_do"]


def test_the_run_goes_on_as_if_nothing_had_happened(chain: Story, whole: Story):
    """Preempted, killed, resumed twice: bit for bit the numbers of the uninterrupted run."""
    assert chain.ends[2].exit_code == 0, chain.ends[2].err
    assert of_no_clock(chain.rows) == of_no_clock(whole.rows)
    tracked = [row["train/step"] for path in chain.folder.glob("wandb/*run-*") for row in wandb_rows(path)]
    assert sorted(tracked) == list(range(2, STEPS + 1, 2)), "no step is lost in the tracker, and none is there twice"
    assert all(row.get("replayed") for row in chain.rows if row["train/step"] in (20, 22, 24) and "replayed" in row)
    ids = {read_meta(story.folder / "checkpoints" / folder_name(40))["run_id"] for story in (chain, whole)}
    assert len(ids) == 2


def test_a_finished_folder_is_not_taken_for_a_new_run(whole: Story):
    before = (whole.folder / "metrics.jsonl").read_bytes()
    exit_code, _, err = train(whole.folder).wait()
    assert exit_code == 2
    assert f"run.dir = '{whole.folder}'" in err and "run.resume=auto" in err
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_all(outside: Story):
    (end,) = outside.ends
    assert end.exit_code == 75, end.err
    assert end.status["reason"] == "preempted"
    assert verify(Path(end.status["last_good_checkpoint"])).step == end.status["step"] >= 4
    assert processes_of(outside.folder) == [], "no orphan"


@pytest.mark.slow
def test_choices_outside_moedist_train_at_two_ranks(outside: Story):
    """Router, dispatcher, bank, attention, model family and sink of a package that moedist knows nothing of."""
    config = read_mapping(outside.folder / "config.yaml")
    kinds = [config["model"]["kind"], config["model"]["attention"]["kind"]]
    kinds += [config["moe"][part]["kind"] for part in ("router", "dispatch", "bank")]
    assert kinds == ["scaled", "mean", "hashed", "counted", "halved"]
    assert (outside.folder / "gate_closed").read_text() == "preempted"
    assert all(sum(row["moe/layer_01/load"]) == TOKENS_STEP * TOP_K for row in outside.rows)


def held_out_loss(run: Path, step: int) -> float:
    """By hand, in one process: no capacity limit, every held-out target once."""
    config = decode_saved(read_mapping(run / "config.yaml"))
    moe = dataclasses.replace(config.moe, capacity=config.moe.capacity.without_limit())
    source = config.data.open()
    model = build_model(dataclasses.replace(config, moe=moe), source.vocab_size, Mesh.alone()).model.eval()
    path = run / "checkpoints" / folder_name(step)
    CheckpointStore(path.parent, Axis("dp")).load(path, {"model": model.state_dict()})
    total, count = 0.0, 0
    with torch.no_grad():
        for (batch,) in Loader(source, "valid", sequence_length=16, micro_batch=7):
            logits = model(batch, StepContext(0, torch.tensor(0), batch.num_tokens(), training=False)).logits_BSV
            total += cross_entropy(logits.double().flatten(0, 1), batch.target_BS.flatten(), reduction="sum").item()
            count += int(batch.num_targets())
    return total / count


def test_eval_measures_a_checkpoint_dropless(whole: Story):
    end = whole.ends[1]
    assert end.exit_code == 0, end.err
    told = json.loads(end.out)
    assert (told["reason"], told["exit_code"]) == ("done", 0)
    (path,) = whole.folder.glob("eval/*/eval.json")
    assert told["run_dir"] == str(path.parent)
    result = json.loads(path.read_text())
    assert result["train/step"] == STEPS and result["checkpoint"].endswith(folder_name(STEPS))
    assert result["eval/loss"] == pytest.approx(held_out_loss(whole.folder, STEPS), abs=1e-6)
    assert f"{result['eval/loss']:.4f}" in told["message"]
    in_training = whole.rows[-1]["eval/loss"]
    assert abs(result["eval/loss"] - in_training) > 1e-6, "training measures a part of it, under its capacity limit"

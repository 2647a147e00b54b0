"""Forced routing says so in every record, every line and every result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moedist.config import to_mapping
from moedist.launch.folder import claim_folder
from moedist.log.config import LogConfig
from moedist.log.sink.console import ConsoleConfig, eval_line, log_line
from moedist.log.sink.jsonl import JsonlConfig
from moedist.mesh import Mesh
from moedist.moe.layer import routing_label
from moedist.moe.router.forced import ForcedConfig
from moedist.train.run import eval_rank, run_rank
from tests.train.tiny import CONFIG, changed, in_folder, make_trainer

FORCED = changed(
    CONFIG,
    moe={"router": ForcedConfig(top_k=2, pattern="zipf")},
    train={"steps": 2, "eval_every": 1, "eval_batches": 1, "checkpoint_every": 2},
)
FORCED = dataclasses.replace(FORCED, log=LogConfig(sinks={"console": ConsoleConfig(), "jsonl": JsonlConfig()}))


def test_every_record_line_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = in_folder(FORCED, tmp_path / "run")
    claim = claim_folder(config.run, to_mapping(config))
    try:
        assert run_rank(config, claim.path, Mesh.alone()) == 0
        records = [json.loads(line) for line in (claim.path / "metrics.jsonl").read_text().splitlines()]
        assert len(records) == 2 and {record["moe/routing"] for record in records} == {"forced zipf"}
        said = capsys.readouterr().out.splitlines()
        steps = [line for line in said if line.startswith("step")]
        assert len(steps) == 4 and all("[forced zipf]" in line for line in steps)
        assert [line for line in said if line.startswith("note") and "forced zipf routing" in line]
        assert [line.split() for line in said if line.startswith("routing")] == [["routing", "forced", "zipf"]]
        (checkpoint,) = (claim.path / "checkpoints").glob("step_*")
        (tmp_path / "eval").mkdir()
        measured = in_folder(FORCED, tmp_path / "eval")
        assert eval_rank(measured, tmp_path / "eval", Mesh.alone(), checkpoint) == 0
        assert json.loads((tmp_path / "eval" / "eval.json").read_text())["moe/routing"] == "forced zipf"
        assert "[forced zipf]" in capsys.readouterr().out
    finally:
        claim.release()


def test_learned_routing_has_no_label():
    trainer = make_trainer(CONFIG, CONFIG.data.open(), Mesh.alone())
    assert routing_label(trainer.model) is None


def test_lines():
    record = {"train/step": 1, "train/loss": 2.0, "eval/loss": 2.0}
    labelled = record | {"moe/routing": "forced balanced"}
    for line in (log_line(labelled, 10, None), eval_line(labelled, 10)):
        assert line.endswith("  [forced balanced]")
    assert "[" not in log_line(record, 10, None) + eval_line(record, 10)

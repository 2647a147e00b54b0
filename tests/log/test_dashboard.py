from __future__ import annotations

import json

import pytest

from moedist.cli.main import main
from moedist.log.dashboard import RUN_PANELS, build_workspace, plan_dashboard, row_of_run
from moedist.log.series import Series
from moedist.log.sink.jsonl import JsonlSink
from tests.log.test_series import record_of_size

CONFIG = "log:\n  sinks:\n    wandb: {kind: wandb, project: p, entity: null}\nmoe:\n  num_experts: 8\n"


@pytest.fixture
def run(tmp_path):
    sink = JsonlSink(tmp_path, print)
    for step in (1, 2):
        sink.write(record_of_size(2, 8) | {"train/step": step, "train/loss": 1.0, "eval/loss": 1.5})
    sink.close("done")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 4), (2, 8), (48, 128)])
def test_every_panel_is_of_keys_that_the_tracker_gets(num_layers: int, num_experts: int):
    record = record_of_size(num_layers, num_experts) | {"train/loss": 1.0}
    row = Series(200).row(record)
    sections = plan_dashboard(row, ["moe.num_experts"])
    tracked = {*row.scalars, *row.tables, *row.histograms}
    named = [key for section in sections for panel in section.panels for key in panel.keys]
    assert set(named) <= tracked
    assert {key for key in tracked if "/expert_0" not in key} - set(named) <= {"train/step", "moe/routing"}
    heat = [panel for section in sections for panel in section.panels if panel.kind == "heat"]
    assert len(heat) == 2 * num_layers


def test_what_the_run_lacks_has_no_panel(run):
    names = {section.name: section for section in plan_dashboard(row_of_run(run, 200), ["moe.num_experts"])}
    assert "Throughput" not in names and [panel.title for panel in names["Loss"].panels][0] == "Loss, nats per token"
    assert names["Runs compared"].panels[0].config_keys == ("moe.num_experts",)
    assert names.keys() < {*RUN_PANELS, "Layers", "Load of experts", "Kept of experts", "Runs compared"}


def test_the_library_takes_it(run):
    pytest.importorskip("wandb_workspaces")
    sections = plan_dashboard(row_of_run(run, 20), ["moe.num_experts"])
    assert any(panel.kind == "table" for section in sections for panel in section.panels)
    workspace = build_workspace(sections, "me", "p", "view")
    spec = workspace._to_model().model_dump_json()
    assert all(json.dumps(key)[1:-1] in spec for section in sections for panel in section.panels for key in panel.keys)


def test_the_command_says_what_it_would_make_and_asks_no_network(run, capsys, monkeypatch, tmp_path):
    assert main(["dashboard", str(run), "--json"]) == 0
    assert [section["name"] for section in json.loads(capsys.readouterr().out)][:2] == ["Loss", "Balance"]
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["dashboard", str(run)]) == 4
    assert "no API key" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path / "nothing")]) == 2

from __future__ import annotations

import json

import torch

from moedist.bench.logging import LoggingCost, measure_logging
from moedist.cli.main import main
from moedist.log.run_files import read_metrics
from tests.train.tiny import CONFIG, no_measuring


def test_every_second_step_is_recorded_and_the_others_are_not(tmp_path):
    with no_measuring():
        cost = measure_logging(CONFIG, tmp_path, pairs=4, device=torch.device("cpu"))
    steps = [row["train/step"] for row in read_metrics(tmp_path)]
    assert steps == [2, 3, 6, 7, 10, 11, 14], "of seven pairs one step each, first and last in turns"
    assert cost.pairs == 4 and cost.plain_s > 0 and cost.cost > -1 and cost.spread >= 0


def test_a_noisy_figure_says_so(monkeypatch, capsys):
    for spread, quotable in ((0.1, True), (0.3, False)):
        cost = LoggingCost(pairs=8, plain_s=0.1, cost=0.015, spread=spread, ranks=1, device="cpu")
        monkeypatch.setattr("moedist.bench.logging.measure_logging", lambda *_, cost=cost: cost)
        assert main(["bench", "logging"]) == 0
        out = capsys.readouterr().out
        assert "+1.50% of a step" in out and ("not to be quoted" in out) is not quotable
        assert main(["bench", "logging", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["quotable"] is quotable

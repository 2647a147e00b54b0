from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moedist.config import ConfigErrors
from moedist.launch.decode import decode
from moedist.launch.sweep.objective import Measured, is_above, median_of_others
from moedist.launch.sweep.settings import SweepConfig

LOSS, PAIR = {"eval/loss": 1.0}, {"eval/loss": 1.0, "moe/max_vio": 0.5}


def write_rows(path: Path, *rows: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ("moe/max_vio", ({"moe/max_vio": 1.0},)),
        (PAIR, (PAIR,)),
        (["eval/loss", {"moe/max_vio": 2}], (LOSS, {"moe/max_vio": 2.0})),
    ],
)
def test_an_objective_is_a_metric_or_a_weighted_pair_or_several(objective: object, terms: tuple):
    assert decode(SweepConfig, {"objective": objective}).terms == terms


@pytest.mark.parametrize("objective", ["", [], {}, ["eval/loss", ""], ["eval/loss", {}], {"eval/loss": "much"}, 3])
def test_other_objectives_are_refused(objective: object):
    with pytest.raises(ConfigErrors) as caught:
        decode(SweepConfig, {"objective": objective})
    assert caught.value.key == "objective"


def test_pruning_needs_one_objective():
    with pytest.raises(ConfigErrors, match="cannot judge jobs by 2 objectives"):
        decode(SweepConfig, {"objective": ["eval/loss", "moe/max_vio"], "prune_after_jobs": 1})


def test_measures_are_read_as_they_come(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    measured = Measured(path, [PAIR, {"moe/max_vio": 1.0}])
    assert not measured.read() and measured.values is None, "no file yet"
    write_rows(path, {"train/step": 2, "moe/max_vio": 4.0})
    assert not measured.read() and measured.values is None, "no evaluation yet"
    write_rows(path, {"train/step": 4, "eval/loss": 3.0, "moe/max_vio": 2.0})
    with path.open("a") as file:
        file.write('{"train/step": 6, "eval/loss"')  # half a row
    assert measured.read() and measured.by_step == {4: 4.0} and measured.values == [4.0, 2.0]
    with path.open("a") as file:
        file.write(': "NaN", "moe/max_vio": 1.0}\n')
    assert measured.read() and list(measured.by_step) == [4, 6] and math.isnan(measured.by_step[6])
    write_rows(path, {"train/step": 8, "moe/max_vio": 0.5})
    assert not measured.read() and not measured.read() and measured.latest["moe/max_vio"] == 0.5


def test_median_stop_by_hand():
    others = [{10: 1.0, 20: 0.9}, {10: 3.0}, {10: 2.0}, {10: math.nan}]
    assert median_of_others({10: 2.5}, others, after_jobs=3, after_steps=0) == 2.0
    assert median_of_others({10: 2.5}, others, after_jobs=4, after_steps=0) is None, "three have measured step 10"
    assert median_of_others({10: 2.5}, others, after_jobs=3, after_steps=10) is None, "too early"
    assert median_of_others({10: 2.5, 15: 2.0}, others, after_jobs=1, after_steps=0) is None, "no other at step 15"
    assert is_above({10: 2.5, 20: 2.1}, 2.0) and is_above({10: math.nan}, 2.0)
    assert not is_above({10: 1.9, 20: 2.5}, 2.0), "its best counts"
    assert not is_above({10: 2.0}, 2.0)

"""The loop where something is in its way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moedist.config import to_mapping
from moedist.data.loader import Loader
from moedist.launch.folder import claim_folder
from moedist.mesh import Mesh
from moedist.moe.router.mlp import MLPConfig
from moedist.train.checkpoint import DiskError
from moedist.train.config import CheckpointConfig
from moedist.train.evaluate import evaluate
from moedist.train.run import eval_rank, run_rank
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, in_folder, make_trainer, no_measuring, rows_of


@pytest.mark.parametrize("on_failure", ["abort", "warn"])
def test_a_stop_that_cannot_be_saved_is_not_called_saved(on_failure: str):
    config = dataclasses.replace(
        changed(CONFIG, train={"checkpoint_every": None}), checkpoint=CheckpointConfig(on_failure=on_failure)
    )
    trainer = make_trainer(config, config.data.open(), Mesh.alone())
    trainer.stop = SimpleNamespace(requested=True)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise DiskError("no room")

    trainer.store = SimpleNamespace(save=refuse)
    log = SimpleNamespace(say=lambda line: None, write=lambda record: None)
    with no_measuring(), pytest.raises(DiskError, match="no room"):
        trainer.run(log)


def test_a_long_evaluation_shows_that_it_lives():
    """The watchdog ends a rank that does one thing for too long: every micro-step must count as a new one."""
    source = CONFIG.data.open()
    trainer = make_trainer(CONFIG, source, Mesh.alone())
    beats: list[str] = []
    trainer.watchdog = SimpleNamespace(enter=lambda phase, *_: beats.append(phase))
    loss = evaluate(trainer.model, source, CONFIG, trainer.mesh, 0, beat=lambda: trainer.enter("eval"))
    steps = Loader(source, "valid", sequence_length=LENGTH, micro_batch=ROWS)
    assert loss > 0 and len(steps) > 1 and beats == ["eval"] * len(steps)


def test_evaluations_are_where_the_schedules_are(tmp_path: Path):
    """A capacity factor and a temperature that follow the step: at their end, in a run and of its checkpoint, the
    held-out loss is that of constants."""

    def by_step(factor: float, temperature: float, final_factor: float | None, final_temperature: float | None):
        temperatures = {"temperature": temperature, "final_temperature": final_temperature, "temperature_steps": 2}
        return changed(
            CONFIG,
            capacity={"factor": factor, "final_factor": final_factor, "factor_steps": 2},
            moe={"router": MLPConfig(top_k=2, hidden_dim=8, **temperatures)},
            train={"steps": 2, "eval_every": 1, "eval_batches": 2, "checkpoint_every": 2},
        )

    config = in_folder(by_step(0.5, 4.0, 1.5, 0.25), tmp_path / "run")
    claim = claim_folder(config.run, to_mapping(config))
    try:
        with no_measuring():
            assert run_rank(config, claim.path, Mesh.alone()) == 0
    finally:
        claim.release()
    (checkpoint,) = (claim.path / "checkpoints").glob("step_*")
    losses = []
    for number, other in enumerate((config, by_step(1.5, 0.25, None, None), by_step(0.5, 4.0, None, None))):
        folder = tmp_path / f"eval_{number}"
        folder.mkdir()
        assert eval_rank(in_folder(other, folder), folder, Mesh.alone(), checkpoint) == 0
        losses.append(json.loads((folder / "eval.json").read_text())["eval/loss"])
    assert losses[0] == losses[1] == pytest.approx(rows_of(claim.path)[2]["eval/loss"], abs=1e-12)
    assert abs(losses[2] - losses[0]) > 1e-6

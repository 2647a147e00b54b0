"""The loop where something is in its way."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from moedist.data.loader import Loader
from moedist.mesh import Mesh
from moedist.train.checkpoint import DiskError
from moedist.train.config import CheckpointConfig
from moedist.train.evaluate import evaluate
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, make_trainer, no_measuring


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
    loss = evaluate(trainer.model, source, CONFIG, trainer.mesh, beat=lambda: trainer.enter("eval"))
    steps = Loader(source, "valid", sequence_length=LENGTH, micro_batch=ROWS)
    assert loss > 0 and len(steps) > 1 and beats == ["eval"] * len(steps)

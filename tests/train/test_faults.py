"""What a run survives and how it ends: numbers that are none, disks without room, checkpoints and corpora of others."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moedist.config import to_mapping
from moedist.data.loader import Loader
from moedist.launch.folder import claim_folder
from moedist.train import trainer as trainer_module
from moedist.train.checkpoint.manifest import folder_name, verify
from moedist.train.config import CheckpointConfig, RunConfig
from moedist.train.run import run_rank
from moedist.train.status import read_status
from moedist.train.trainer import Trainer
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed, in_folder, no_measuring, rows_of

STEPS = 12
SMALL = changed(CONFIG, train={"precision": "fp32", "steps": STEPS, "checkpoint_every": 3})


def train(here: Here, config: RunConfig, fault: str | None = None, at: int = 0) -> int:
    """A run as a rank sees it; ``fault`` strikes in the step after ``at``, most often on rank 1 alone."""
    with no_measuring(), plant(fault, at, here.rank) if fault else contextlib.nullcontext():
        return run_rank(config, Path(config.run.dir or ""), here.mesh_of(config.mesh.ep))


@contextlib.contextmanager
def plant(fault: str, at: int, rank: int) -> Iterator[None]:
    real_step, real_loss = Trainer.step, trainer_module.token_loss
    now: list[int] = [-1]

    def step(self: Trainer, loader: Loader) -> bool:
        now[0] = self.progress.step
        return real_step(self, loader)

    def loss(output: Any, target_BS: torch.Tensor) -> torch.Tensor:
        value = real_loss(output, target_BS)
        if now[0] == at and fault == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if now[0] == at and rank == 1 and fault in ("nan", "inf"):
            return value * float(fault)
        return value

    def create(self: FileSystem, path: Path, mode: str) -> Any:
        if now[0] == at and rank == 1 and fault == "no room":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real_create(self, path, mode)

    real_create = FileSystem.create_stream
    with (
        mock.patch.object(Trainer, "step", step),
        mock.patch.object(trainer_module, "token_loss", loss),
        mock.patch.object(FileSystem, "create_stream", create),
    ):
        yield


def run(ranks: Any, config: RunConfig, *fault: Any) -> int:
    """The exit code that both ranks agree on."""
    claim = claim_folder(config.run, to_mapping(config))
    try:
        first, second = ranks(2).run(train, config, *fault)
    finally:
        claim.release()
    assert first == second
    return first


def goes_on(ranks: Any, folder: Path, whole: Path) -> None:
    """A resume ends as the run would have without the fault."""
    assert run(ranks, in_folder(SMALL, folder, 2, "auto")) == 0
    assert rows_of(folder) == rows_of(whole)
    assert read_status(folder).reason == "done"


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(ranks, in_folder(SMALL, folder, 2)) == 0
    return folder


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_before_it_changes_the_model(ranks, whole, tmp_path: Path, number: str):
    assert run(ranks, in_folder(SMALL, tmp_path, 2), number, 7) == 5
    status = read_status(tmp_path)
    good = tmp_path / "checkpoints" / folder_name(6)
    assert (status.reason, status.exit_code, status.step) == ("nonfinite", 5, 7)
    assert "at step 8 is nan" in status.message and "learning rate" in status.what_to_do
    assert status.last_good_checkpoint == str(good) and verify(good).step == 6
    assert sorted(rows_of(tmp_path)) == list(range(1, 8))
    goes_on(ranks, tmp_path, whole)


def test_a_disk_without_room_ends_the_run_and_leaves_the_last_good_checkpoint(ranks, whole, tmp_path: Path):
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "no room", 5) == 4
    status = read_status(tmp_path)
    good = tmp_path / "checkpoints" / folder_name(3)
    assert (status.reason, status.exit_code) == ("io", 4)
    assert "no room for a checkpoint" in status.message and "run.resume=auto" in status.what_to_do
    assert status.last_good_checkpoint == str(good) and verify(good).step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest", folder_name(3),
    ]  # fmt: skip
    goes_on(ranks, tmp_path, whole)


def test_a_save_that_fails_may_be_told_only(ranks, whole, tmp_path: Path):
    config = dataclasses.replace(in_folder(SMALL, tmp_path, 2), checkpoint=CheckpointConfig(on_failure="warn"))
    assert run(ranks, config, "no room", 5) == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", folder_name(9), folder_name(12)]
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_model_that_does_not_fit_has_an_exit_code_of_its_own(ranks, tmp_path: Path):
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "out of memory", 4) == 3
    status = read_status(tmp_path)
    assert status.exit_code == 3 and "does not fit" in status.message
    assert status.last_good_checkpoint == str(tmp_path / "checkpoints" / folder_name(3))


def test_a_damaged_checkpoint_is_passed_over(ranks, whole, tmp_path: Path):
    stopped = changed(SMALL, train={"steps": 9})
    assert run(ranks, in_folder(stopped, tmp_path, 2)) == 0
    before = rows_of(tmp_path)
    shard = next((tmp_path / "checkpoints" / folder_name(9)).glob("*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert ranks(2).run(train, in_folder(stopped, tmp_path, 2, "auto")) == [0, 0]
    assert rows_of(tmp_path) == before
    replayed = [row for row in (tmp_path / "metrics.jsonl").read_text().splitlines() if "replayed" in row]
    assert len(replayed) == 3, "from step 6"


def test_no_checkpoint_that_verifies_is_no_reason_to_start_afresh(ranks, whole, tmp_path: Path):
    assert run(ranks, in_folder(SMALL, tmp_path, 2)) == 0
    for shard in tmp_path.rglob("*.distcp"):
        shard.write_bytes(b"")
    before = hashes(tmp_path / "checkpoints")
    assert run(ranks, in_folder(SMALL, tmp_path, 2, "auto")) == 5
    status = read_status(tmp_path)
    assert status.reason == "checkpoint" and "no checkpoint in" in status.message
    assert hashes(tmp_path / "checkpoints") == before


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(ranks, whole, tmp_path: Path):
    wider = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, tie_embeddings=True))
    before = hashes(whole)
    folder = tmp_path / "other"
    claim_folder(in_folder(wider, folder, 2).run, to_mapping(wider)).release()  # the parent would have refused
    assert ranks(2).run(train, in_folder(wider, folder, 2, resume=str(whole))) == [5, 5]
    status = read_status(folder)
    assert (status.reason, status.exit_code) == ("checkpoint", 5)
    assert "is of another model" in status.message and "head.weight" in status.message
    assert hashes(whole) == before and not list((folder / "checkpoints").glob("step_*"))


def test_a_corpus_that_has_changed_is_refused_unless_it_is_allowed(ranks, whole, tmp_path: Path):
    other = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, stride=5))
    folder = tmp_path / "other"
    config = in_folder(other, folder, 2, resume=str(whole))
    claim_folder(in_folder(other, folder).run, to_mapping(config)).release()
    config = changed(config, train={"steps": 14})
    assert ranks(2).run(train, config) == [5, 5]
    status = read_status(folder)
    assert status.reason == "data" and "run.allow_changes=[data]" in status.message
    allowed = dataclasses.replace(config, run=dataclasses.replace(config.run, allow_changes=("data",)))
    assert ranks(2).run(train, allowed) == [0, 0]
    assert sorted(rows_of(folder)) == [13, 14]

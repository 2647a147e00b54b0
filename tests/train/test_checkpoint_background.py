"""Saving while training goes on: the state of the step that it was begun at, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moedist.config import to_mapping
from moedist.data.loader import Loader
from moedist.launch.folder import claim_folder
from moedist.mesh.collectives import all_sum
from moedist.train import trainer as trainer_module
from moedist.train.checkpoint import BackgroundSave, CheckpointError, DiskError, shards, verify
from moedist.train.checkpoint.manifest import folder_name, read_manifest
from moedist.train.config import CheckpointConfig, RunConfig
from moedist.train.run import run_rank
from moedist.train.status import read_status
from moedist.train.trainer import Trainer
from tests.ranks import Here
from tests.train import test_checkpoint_ranks, test_checkpoint_store
from tests.train.test_checkpoint_ranks import Experts
from tests.train.test_checkpoint_store import PHASES, holds, latest, state, steps
from tests.train.tiny import CONFIG, changed, digest_of, in_folder, no_measuring, rows_of

PATIENCE_S = 30.0


@contextlib.contextmanager
def gate() -> Iterator[threading.Event]:
    """Shards are written once it is set."""
    opened, write = threading.Event(), shards.SealingWriter.write_data

    def wait(self: Any, *args: Any) -> Any:
        assert opened.wait(PATIENCE_S), "the gate stayed closed"
        return write(self, *args)

    with mock.patch.object(shards.SealingWriter, "write_data", wait):
        yield opened


def contents(path: Path) -> str:
    """SHA-256 of all files but the manifest, and of what the manifest says."""
    manifest = read_manifest(path)
    said = repr([(name, seal) for name, seal in sorted(manifest.files.items())]) + repr(manifest.meta)
    return hashlib.sha256(said.encode()).hexdigest()


def test_it_holds_the_state_of_its_step(tmp_path: Path) -> None:
    """Bit for bit the files of a save that is waited for, though the state changes under it."""
    waited = test_checkpoint_store.open_store(tmp_path / "waited")
    store = test_checkpoint_store.open_store(tmp_path / "background")
    live = state(0)
    buffers = set()
    for step in (1, 2):
        for part, values in state(step).items():
            for name, value in values.items():
                target = live[part][name]
                target.copy_(value) if part == "model" else target["step"].copy_(value["step"])
        expected = waited.save(step, live, {"tokens": step}, {"cpu": torch.tensor([step])})
        with gate() as opened:
            saving = store.begin(step, live, {"tokens": step}, {"cpu": torch.tensor([step])})
            buffers.add(tuple(buffer.data_ptr() for buffer in store._staging._buffers.values()))
            live["model"]["head.weight"].zero_()
            live["optimizer"]["head.weight"]["step"].zero_()
            assert not saving.saved and not saving.failed and steps(tmp_path / "background") == list(range(1, step))
            opened.set()
            path = saving.wait(PATIENCE_S)
        assert saving.saved and latest(store.directory) == path and holds(path, step)
        assert contents(path) == contents(expected)
    assert len(buffers) == 1, "host memory is used again"


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_flight_it_leaves_the_last_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """F4. `latest` is looked at all the while."""
    test_checkpoint_store.open_store(tmp_path).save(1, state(1), {})
    test_checkpoint_store.open_store(tmp_path).save(2, state(2), {})
    hook, complete = PHASES[phase]
    child = os.fork()
    if child == 0:
        hook(monkeypatch)
        with contextlib.suppress(BaseException):
            test_checkpoint_store.open_store(tmp_path, keep=1).begin(3, state(3), {}).wait(PATIENCE_S)
        os._exit(0)
    ended, looks = 0, 0
    while not ended:
        with contextlib.suppress(CheckpointError):  # a folder may be moved between two looks
            verify(latest(tmp_path))
        looks += 1
        ended, status = os.waitpid(child, os.WNOHANG)
    assert os.WIFSIGNALED(status) and looks > 0, "the hook was not reached"
    verify(latest(tmp_path))
    store = test_checkpoint_store.open_store(tmp_path, keep=2)
    store.prepare()
    newest = store.newest()
    assert newest is not None and holds(newest, 3 if complete else 2)


def save_beside_collectives(here: Here, directory: Path) -> list[str]:
    """Each layout: a save in the background, training's own sums meanwhile; then the same state, waited for."""
    digests = []
    for ep in (1, 2):
        mesh, model = here.mesh_of(ep), Experts(here, ep, seed=ep)
        expected = model.digest()
        own = {"cpu": torch.tensor([here.rank], dtype=torch.uint8)}
        background = test_checkpoint_ranks.open_store(here, directory / f"background_{ep}")
        with gate() as opened:
            saving = background.begin(1, model.state(), {"ep": ep}, own)
            for count in range(200):
                if count == 100:
                    opened.set()
                assert all_sum(torch.tensor([count]), mesh.dp).item() == count * here.world
            model.step()
            path = saving.wait(PATIENCE_S)
        assert model.digest() != expected
        other = Experts(here, ep, seed=9)
        background.load(path, other.state(), own)
        assert other.digest() == expected
        waited = test_checkpoint_ranks.open_store(here, directory / f"waited_{ep}")
        digests += [contents(path), contents(waited.save(1, other.state(), {"ep": ep}, own))]
    return digests


def test_training_may_talk_meanwhile(ranks, tmp_path: Path) -> None:
    by_rank = ranks(2).run(save_beside_collectives, tmp_path)
    for digests in by_rank:
        assert digests[0] == digests[1] and digests[2] == digests[3] and digests[0] != digests[2]


def test_every_wait_is_bounded() -> None:
    forever = threading.Event()
    saving = BackgroundSave(7, lambda written: forever.wait(PATIENCE_S) and Path())  # type: ignore[arg-type,return-value]
    with pytest.raises(DiskError, match=r"the checkpoint of step 7 was not written within 0.01 s\. .*save_timeout_s"):
        saving.wait_written(0.01)
    with pytest.raises(RuntimeError, match="timed out: other ranks have not saved step 7 within 0.01 s"):
        saving.wait(0.01)
    forever.set()


# In a run

STEPS = 12
SMALL = dataclasses.replace(
    changed(CONFIG, train={"precision": "fp32", "steps": STEPS, "checkpoint_every": 3}),
    checkpoint=CheckpointConfig(background=True, keep=None),
)


def train(here: Here, config: RunConfig, fault: str | None = None, at: int = 0) -> int:
    """A run as a rank sees it; the save begun after step 6 is written once step ``at`` is done, and then the fault
    strikes."""
    step, loss, create = Trainer.step, trainer_module.token_loss, FileSystem.create_stream
    now = [0]

    def stepped(self: Trainer, loader: Loader) -> bool:
        now[0] = self.progress.step
        if now[0] == at and fault is not None:
            if fault == "stop":
                self.stop = SimpleNamespace(requested=here.rank == 1)  # type: ignore[assignment]
            if fault != "nan":
                opened.set()
            if fault == "no room":
                assert self.saving is not None and self.saving._ended.wait(PATIENCE_S)
        if now[0] == 4 and fault is not None:
            assert self.saving is None or self.saving._ended.wait(PATIENCE_S), "that of step 3"
            opened.clear()
        return step(self, loader)

    def lost(output: Any, target_BS: torch.Tensor) -> torch.Tensor:
        value = loss(output, target_BS)
        if now[0] == at and fault == "nan":
            opened.set()
            return value * float("nan") if here.rank == 1 else value
        return value

    def created(self: FileSystem, path: Path, mode: str) -> Any:
        if fault == "no room" and here.rank == 1 and folder_name(6) in str(path):
            raise OSError(28, "No space left on device", str(path))
        return create(self, path, mode)

    with no_measuring(), gate() as opened, contextlib.ExitStack() as stack:
        opened.set()
        stack.enter_context(mock.patch.object(Trainer, "step", stepped))
        stack.enter_context(mock.patch.object(trainer_module, "token_loss", lost))
        stack.enter_context(mock.patch.object(FileSystem, "create_stream", created))
        return run_rank(config, Path(config.run.dir or ""), here.mesh_of(config.mesh.ep))


def run(ranks: Any, config: RunConfig, *fault: Any) -> int:
    claim_folder(config.run, to_mapping(config)).release()
    first, second = ranks(2).run(train, config, *fault, limit_s=300)
    assert first == second
    return first


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for each of its saves."""
    folder = tmp_path_factory.mktemp("whole")
    config = dataclasses.replace(in_folder(SMALL, folder, 2), checkpoint=CheckpointConfig(keep=None))
    assert run(ranks, config) == 0
    return folder


def saved(folder: Path) -> list[int]:
    return steps(folder / "checkpoints")


def test_its_checkpoints_are_those_of_a_run_that_waits(ranks, whole: Path, tmp_path: Path) -> None:
    """Weights, moments, counters, data position: step 6 is written late, step 12 before the end."""
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "late", 8) == 0
    assert rows_of(tmp_path) == rows_of(whole) and saved(tmp_path) == saved(whole) == [3, 6, 9, 12]
    for step in saved(whole):
        one, other = (folder / "checkpoints" / folder_name(step) for folder in (tmp_path, whole))
        verify(one)
        assert digest_of(SMALL, one) == digest_of(SMALL, other)
        about, expected = read_manifest(one).meta, read_manifest(other).meta
        assert all(about[key] == expected[key] for key in ("step", "tokens", "next_sample", "data_fingerprint"))
    assert read_status(tmp_path).last_good_checkpoint.endswith(folder_name(12))


def test_a_failure_is_heard_at_the_next_step(ranks, whole: Path, tmp_path: Path) -> None:
    """On both ranks at once; on rank 1's disk the room had run out."""
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "no room", 7) == 4
    status = read_status(tmp_path)
    assert (status.reason, status.step) == ("io", 8) and "no room for a checkpoint" in status.message
    assert saved(tmp_path) == [3] and status.last_good_checkpoint.endswith(folder_name(3))
    assert not list((tmp_path / "checkpoints").glob(".step*"))
    assert run(ranks, in_folder(SMALL, tmp_path, 2, "auto")) == 0
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_failure_may_be_told_only(ranks, whole: Path, tmp_path: Path) -> None:
    warned = dataclasses.replace(
        in_folder(SMALL, tmp_path, 2), checkpoint=CheckpointConfig(background=True, keep=None, on_failure="warn")
    )
    assert run(ranks, warned, "no room", 7) == 0
    assert saved(tmp_path) == [3, 9, 12] and rows_of(tmp_path) == rows_of(whole)


@pytest.mark.parametrize("at", [6, 7])
def test_a_stop_lets_it_end_and_saves_its_own_step(ranks, whole: Path, tmp_path: Path, at: int) -> None:
    """At 6 the save in flight is that of the very step."""
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "stop", at) == 75
    assert saved(tmp_path) == sorted({3, 6, at})
    status = read_status(tmp_path)
    assert (status.reason, status.step) == ("preempted", at)
    assert status.last_good_checkpoint.endswith(folder_name(at))
    assert run(ranks, in_folder(SMALL, tmp_path, 2, "auto")) == 0
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_run_that_fails_lets_it_end(ranks, whole: Path, tmp_path: Path) -> None:
    """The checkpoint in flight is the newest that such a run will have."""
    assert run(ranks, in_folder(SMALL, tmp_path, 2), "nan", 7) == 5
    status = read_status(tmp_path)
    assert (status.reason, status.step) == ("nonfinite", 7)
    assert saved(tmp_path) == [3, 6] and status.last_good_checkpoint.endswith(folder_name(6))
    assert verify(tmp_path / "checkpoints" / folder_name(6)).step == 6

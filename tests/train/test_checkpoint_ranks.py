"""Several ranks, one checkpoint: all of it, into any layout, and one answer for all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moedist.mesh import Axis
from moedist.mesh.collectives import barrier
from moedist.mesh.slow import slow_axis
from moedist.train.checkpoint import CheckpointError, CheckpointStore, DiskError, NoRoomError, shards, verify
from tests.ranks import Here, RankError

NUM_EXPERTS = 12
IDLE = (3, 10, 11)


class Experts:
    """A model of 12 sharded experts and one dense weight, after two steps of AdamW; some experts had no tokens."""

    def __init__(self, here: Here, ep: int, seed: int):
        self.mesh = here.mesh_of(ep).device_mesh["ep"]
        self.generator = generator = torch.Generator().manual_seed(seed)
        self.experts = self._shard(torch.randn(NUM_EXPERTS, 3, 5, generator=generator))
        self.dense = torch.randn(5, generator=generator)
        self.optimizer = torch.optim.AdamW([self.experts, self.dense], lr=0.1)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        gradient = torch.randn(NUM_EXPERTS, 3, 5, generator=self.generator)
        gradient[IDLE, :] = 0
        self.experts.grad = self._shard(gradient)
        self.dense.grad = torch.randn(5, generator=self.generator)
        self.optimizer.step()

    def _shard(self, full: torch.Tensor) -> DTensor:
        return distribute_tensor(full, self.mesh, [Shard(0)])

    def state(self) -> dict[str, Any]:
        slots = {"experts": self.optimizer.state[self.experts], "dense": self.optimizer.state[self.dense]}
        return {"model": {"experts": self.experts, "dense": self.dense}, "optimizer": slots}

    def digest(self) -> str:
        """Of every bit of the whole state, gathered."""
        digest = hashlib.sha256()
        for name, tensors in sorted(self.state()["optimizer"].items()):
            for tensor in [self.state()["model"][name], *(tensors[key] for key in sorted(tensors))]:
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digest.update(full.contiguous().numpy().tobytes())
        return digest.hexdigest()


def open_store(here: Here, directory: Path, keep: int | None = None) -> CheckpointStore:
    return CheckpointStore(directory, slow_axis(here.mesh_of(1), timeout_s=30.0), keep, [].append)


def save_first(here: Here, directory: Path, ep: int) -> str:
    model = Experts(here, ep, seed=1)
    own = {"cpu": torch.tensor([here.rank], dtype=torch.uint8)}
    open_store(here, directory).save(1, model.state(), {"ep": ep}, own)
    return model.digest()


def pass_on(here: Here, directory: Path, ep: int, step: int) -> tuple[int, str, int]:
    """Loads the newest in this layout and saves it again from it."""
    model = Experts(here, ep, seed=100 + here.world)
    own = {"cpu": torch.tensor([99], dtype=torch.uint8)}
    store = open_store(here, directory)
    path = store.newest()
    assert path is not None
    meta = store.load(path, model.state(), own)
    store.save(step, model.state(), {"ep": ep}, own)
    return meta["ep"], model.digest(), int(own["cpu"])


@pytest.mark.pitfall("29", "30")
def test_experts_and_their_moments_pass_exactly_through_every_layout(ranks, tmp_path: Path) -> None:
    (digest, *others) = ranks(4).run(save_first, tmp_path, 4)
    assert set(others) == {digest}
    before = 4
    for step, (world, ep) in enumerate([(4, 2), (2, 2), (1, 1), (4, 1), (4, 4)], start=2):
        own = range(world) if (world, ep) == (4, 2) else [99] * world  # a rank's own, at the same number of ranks only
        assert ranks(world).run(pass_on, tmp_path, ep, step) == [(before, digest, mine) for mine in own], (world, ep)
        assert verify(tmp_path / f"step_{step:08d}").num_ranks == world
        before = ep


def test_swapped_shards_are_found(ranks, tmp_path: Path) -> None:
    ranks(2).run(save_first, tmp_path, 2)
    path = tmp_path / "step_00000001"
    one, two = path / "__0_0.distcp", path / "__1_0.distcp"
    assert one.stat().st_size > 0 and two.stat().st_size > 0, "a rank wrote nothing"
    one.rename(path / "aside")
    two.rename(one)
    (path / "aside").rename(two)
    with pytest.raises(CheckpointError, match=r"__[01]_0\.distcp has "):
        verify(path)
    messages = ranks(2).run(refusals, path)
    assert len(set(messages)) == 1 and "_0.distcp has " in messages[0]


def refusals(here: Here, path: Path) -> str:
    model = Experts(here, 2, seed=2)
    before = model.digest()
    with pytest.raises(CheckpointError) as caught:
        open_store(here, path.parent).load(path, model.state())
    assert model.digest() == before
    return str(caught.value)


def other_models(here: Here, directory: Path) -> tuple[str, str]:
    """A model of another size on every rank, and a state that is wrong on one rank alone."""
    store, model = open_store(here, directory), Experts(here, 2, seed=2)
    path = store.newest()
    assert path is not None
    larger = {"model": {"experts": model._shard(torch.zeros(16, 3, 5)), "dense": model.dense}}
    with pytest.raises(CheckpointError) as everywhere:
        store.load(path, larger)
    before = model.digest()
    state = model.state()
    if here.rank == 1:
        state["model"] = {"experts": model.experts, "dense": torch.zeros(6)}
    with pytest.raises(CheckpointError) as once:
        store.load(path, state)
    assert model.digest() == before
    return str(everywhere.value), str(once.value)


def test_a_checkpoint_of_another_model_is_refused_by_all(ranks, tmp_path: Path) -> None:
    ranks(2).run(save_first, tmp_path, 2)
    (first, second), (_, on_rank_1) = ranks(2).run(other_models, tmp_path)
    assert "Different: model.experts [12, 3, 5] float32, here [16, 3, 5] float32." in first
    assert second == f"rank 1 cannot use {tmp_path / 'step_00000001'}; its log says why"
    assert "Different: model.dense [5] float32, here [6] float32." in on_rank_1


def fail_on_rank_1(here: Here, directory: Path) -> list[tuple[str, str]]:
    """Rank 1's disk fails in three ways; then all is well again."""
    store, model = open_store(here, directory, keep=1), Experts(here, 2, seed=1)
    store.save(1, model.state(), {})
    heard = []
    create = FileSystem.create_stream
    for code in (errno.ENOSPC, errno.EIO):
        if here.rank == 1:

            def fail(self: FileSystem, path: Path, mode: str, code: int = code) -> Any:
                raise OSError(code, os.strerror(code), str(path))

            FileSystem.create_stream = fail  # type: ignore[method-assign]
        with pytest.raises(DiskError) as caught:
            store.save(2, model.state(), {})
        FileSystem.create_stream = create  # type: ignore[method-assign]
        heard.append((type(caught.value).__name__, str(caught.value)))
        # on rank 1 too: no rank is told of the failure before what was written is removed, so that all may try again
        assert [entry.name for entry in sorted(directory.iterdir())] == ["latest", "step_00000001"]
        verify(directory / "step_00000001")
        barrier(store.axis, torch.device("cpu"))  # no rank begins the next save while another looks
    original = shards.FileSeal.of
    if here.rank == 1:
        shards.FileSeal.of = None  # type: ignore
    with pytest.raises(CheckpointError) as caught_bug:
        store.save(2, model.state(), {})
    shards.FileSeal.of = original  # type: ignore[method-assign]
    heard.append((type(caught_bug.value).__name__, str(caught_bug.value)))
    store.save(2, model.state(), {})
    assert store.newest() == directory / "step_00000002"
    return heard


def test_a_failure_of_one_rank_is_a_failure_of_all(ranks, tmp_path: Path) -> None:
    first, second = ranks(2).run(fail_on_rank_1, tmp_path)
    assert first == second
    assert [kind for kind, _ in first] == [NoRoomError.__name__, DiskError.__name__, CheckpointError.__name__]
    assert f"no room for a checkpoint in {tmp_path}: it needs " in first[0][1]
    assert "Input/output error" in first[1][1] and "rank 1 could not write its part" in first[2][1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000002"]


def break_rank_0(here: Here, directory: Path) -> str:
    store = open_store(here, directory)
    store._clear_leftovers = lambda: [][0]  # type: ignore
    with pytest.raises(CheckpointError) as caught:
        store.prepare()
    return str(caught.value)


def test_a_bug_on_rank_0_leaves_nobody_waiting(ranks, tmp_path: Path) -> None:
    assert ranks(2).run(break_rank_0, tmp_path) == ["rank 0 failed: IndexError('list index out of range')"] * 2


def prepare_apart(here: Here, directory: Path) -> tuple[str, str]:
    """Ranks with disks of their own, and one whose disk is read-only."""
    with pytest.raises(DiskError) as apart:
        open_store(here, directory / str(here.rank)).prepare()
    if here.rank == 1:
        write = Path.write_bytes

        def refuse(self: Path, data: bytes) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

        Path.write_bytes = refuse  # type: ignore
    with pytest.raises(DiskError) as read_only:
        open_store(here, directory).prepare()
    if here.rank == 1:
        Path.write_bytes = write  # type: ignore[method-assign]
    return str(apart.value), str(read_only.value)


def test_a_disk_that_is_not_shared_or_not_writable_is_told_at_the_start(ranks, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (apart, lead), (also_apart, refused) = ranks(2).run(prepare_apart, tmp_path)
    assert apart == also_apart
    assert "rank 0 does not see what rank 1 wrote" in apart and "a disk that all nodes share" in apart
    assert "Read-only file system" in refused and "rank 1 cannot write to" in lead


def lose_rank_1(here: Here, directory: Path) -> None:
    store, model = open_store(here, directory), Experts(here, 2, seed=1)
    store.save(1, model.state(), {})
    if here.rank == 1:
        shards.FileSeal.of = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    store.save(2, model.state(), {})


def test_a_rank_that_dies_while_saving_frees_the_others(ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2: Traceback.*RuntimeError.*rank 1 of 2: died, exit code -9"):
        ranks(2).run(lose_rank_1, tmp_path)
    verify(tmp_path / "step_00000001")
    assert not (tmp_path / "step_00000002").exists()
    lines: list[str] = []
    store = CheckpointStore(tmp_path, Axis("slow"), report=lines.append)
    store.prepare()
    assert len(lines) == 1 and "left by a save that did not end" in lines[0] and not list(tmp_path.glob(".*"))
    assert store.newest() == tmp_path / "step_00000001"

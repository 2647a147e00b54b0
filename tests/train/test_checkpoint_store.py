"""Saving: whole or not at all, whatever breaks and whenever."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moedist.mesh import Axis
from moedist.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    DiskError,
    NoRoomError,
    read_meta,
    shards,
    store,
    verify,
)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(64, 3, generator=generator)
    return {"model": {"head.weight": weight}, "optimizer": {"head.weight": {"step": torch.tensor(float(step))}}}


def open_store(directory: Path, keep: int | None = None, lines: list[str] | None = None) -> CheckpointStore:
    return CheckpointStore(directory, Axis("slow"), keep, [].append if lines is None else lines.append)


def holds(path: Path, step: int) -> bool:
    """Whether the checkpoint verifies and loads as what was saved."""
    live = state(0)
    open_store(path.parent).load(path, live)
    weight, count = live["model"]["head.weight"], live["optimizer"]["head.weight"]["step"]
    return torch.equal(weight, state(step)["model"]["head.weight"]) and count == step


def latest(directory: Path) -> Path:
    return directory / (directory / "latest").read_text().strip()


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step_*"))


def test_a_state_comes_back_in_place(tmp_path: Path) -> None:
    saved = state(7)
    saved["model"] |= {
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "flag": torch.tensor(True),
        "count": torch.arange(3),
    }
    expected = {name: tensor.clone() for name, tensor in saved["model"].items()}
    where = {name: tensor.data_ptr() for name, tensor in saved["model"].items()}
    path = open_store(tmp_path / "run" / "checkpoints").save(
        7, saved, {"tokens": 1}, own={"cpu": torch.get_rng_state()}
    )
    assert path.name == "step_00000007" and latest(path.parent) == path

    for tensor in saved["model"].values():
        tensor.zero_()
    generator = torch.zeros_like(torch.get_rng_state())
    assert open_store(path.parent).load(path, saved, own={"cpu": generator}) == {"tokens": 1}
    for name, tensor in saved["model"].items():
        assert torch.equal(tensor, expected[name]) and tensor.data_ptr() == where[name]
    assert torch.equal(generator, torch.get_rng_state())


def test_parts_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(7, state(7), {})
    model = {"model": state(0)["model"]}
    open_store(tmp_path).load(path, model)
    assert torch.equal(model["model"]["head.weight"], state(7)["model"]["head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head.weight": torch.zeros(64, 4)},
            r"Different: model.head.weight \[64, 3\] float32, here \[64, 4\] float32",
        ),
        ({"head.weight": torch.zeros(64, 3).double()}, r"model.head.weight \[64, 3\] float32, here \[64, 3\] float64"),
        ({"tail": torch.zeros(2)}, r"Only in this run: model.tail \[2\] float32\. Give this run the model"),
        ({str(i): torch.zeros(2) for i in range(5)}, r"model.0 \[2\] float32; model.1 .*; model.2 .* and 2 more\."),
        (None, r"Only in the checkpoint: model.head.weight \[64, 3\] float32\."),
    ],
)
def test_a_checkpoint_of_another_model_fills_nothing(tmp_path: Path, change: dict | None, message: str) -> None:
    path = open_store(tmp_path).save(7, state(7), {})
    live = state(1)
    live["model"] = {} if change is None else live["model"] | change
    with pytest.raises(CheckpointError, match=rf"(?s)step_00000007 is of another model\..*{message}"):
        open_store(tmp_path).load(path, live)
    assert live["optimizer"]["head.weight"]["step"] == 1, "partly loaded"


def test_states_that_cannot_be_kept_are_the_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="optimizer.lr is a float; a checkpoint's state holds tensors alone"):
        open_store(tmp_path).save(1, {"optimizer": {"lr": 0.1}}, {})
    with pytest.raises(ValueError, match="the state names a.b.c twice"):
        open_store(tmp_path).save(1, {"a": {"b.c": torch.zeros(1), "b": {"c": torch.zeros(1)}}}, {})


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, "\ud800"])
def test_meta_that_is_no_json_is_refused_and_nothing_is_left(tmp_path: Path, bad: object) -> None:
    with pytest.raises(CheckpointError, match="rank 0 could not write its part of .*Error"):
        open_store(tmp_path).save(1, state(1), {"key": bad})
    assert not list(tmp_path.iterdir())


def test_meta_comes_back_as_json(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(1, state(1), {"at": {10: 1.5, 9: (None, True)}, "name": "\u00e9\n"})
    assert read_meta(path) == {"at": {"10": 1.5, "9": [None, True]}, "name": "\u00e9\n"}
    assert verify(path)


# Crashes


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the first shard reaches the disk."""
    write = shards.FileSeal.of

    def halve(path: Path) -> object:
        if path.suffix == ".distcp":
            os.truncate(path, path.stat().st_size // 2)
            die()
        return write(path)

    monkeypatch.setattr(shards.FileSeal, "of", halve)


def die_between_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old checkpoint of the step has lost its name, the new one has none yet."""
    rename = Path.rename

    def once(self: Path, target: Path) -> Path:
        return rename(self, target) if ".old-" in target.name or target.name == ".metadata" else die()  # type: ignore

    monkeypatch.setattr(Path, "rename", once)


PHASES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {
    "before shards": (lambda patch: patch.setattr(shards.SealingWriter, "write_data", die), False),
    "half of a shard": (die_in_shard, False),
    "before the index": (lambda patch: patch.setattr(shards.FileSystemWriter, "finish", die), False),
    "before the manifest": (lambda patch: patch.setattr(store, "write_manifest", die), False),
    "before the rename": (lambda patch: patch.setattr(CheckpointStore, "_move_in", die), True),
    "between the renames": (die_between_renames, True),
    "before latest": (lambda patch: patch.setattr(CheckpointStore, "_point_latest", die), True),
    "before retention": (lambda patch: patch.setattr(CheckpointStore, "_retain", die), True),
    "while removing": (lambda patch: patch.setattr(shutil, "rmtree", die), True),
}
"""Where a save can die, and whether the checkpoint is complete by then."""


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_crash_while_saving_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, again: bool
) -> None:
    """``again`` saves a step anew: its former checkpoint is the last good one."""
    open_store(tmp_path).save(1, state(1), {})
    open_store(tmp_path).save(2, state(2), {})
    step, content = (2, 20) if again else (3, 3)
    hook, complete = PHASES[phase]
    complete = complete and not (again and phase == "before the rename")  # two whole ones then; the named one stays
    child = os.fork()
    if child == 0:
        hook(monkeypatch)
        open_store(tmp_path, keep=1).save(step, state(content), {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the hook was not reached"
    if not (again and phase == "between the renames"):
        verify(latest(tmp_path))
    assert holds(tmp_path / "step_00000001", 1) or phase == "while removing"

    lines: list[str] = []
    reopened = open_store(tmp_path, keep=2, lines=lines)
    reopened.prepare()
    newest = reopened.newest()
    assert newest == tmp_path / f"step_{step if complete else 2:08d}"
    assert holds(newest, content if complete else 2)
    assert not list(tmp_path.glob(".*")), "leftovers"
    assert not [line for line in lines if "skipped" in line]
    reopened.save(4, state(4), {})
    assert holds(latest(tmp_path), 4) and steps(tmp_path)[-1] == 4 and len(steps(tmp_path)) == 2


def test_leftovers_are_told_and_good_checkpoints_are_not_among_them(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(1, state(1), {})
    (tmp_path / ".step_00000002.tmp-abc").mkdir()
    shutil.copytree(path, tmp_path / ".step_00000001.tmp-abc")
    (tmp_path / ".probe-abc-0").touch()
    (tmp_path / "notes.txt").touch()
    lines: list[str] = []
    open_store(tmp_path, lines=lines).prepare()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "notes.txt", "step_00000001"]
    assert len(lines) == 2 and all("left by a save that did not end" in line for line in lines)
    assert holds(path, 1)


# Retention


def test_latest_always_names_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after every change of a name or removal."""
    looks = []

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if (tmp_path / "latest").exists():
                looks.append(verify(latest(tmp_path)).step)
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in [(Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (os, "fsync")]:
        watch(owner, name)
    one = open_store(tmp_path, keep=1)
    for step in (1, 2, 3):
        one.save(step, state(step), {})
    assert looks == sorted(looks) and set(looks) == {1, 2, 3} and steps(tmp_path) == [3]


def test_only_verified_checkpoints_count_as_kept(tmp_path: Path) -> None:
    first = open_store(tmp_path, keep=2)
    for step in (1, 2, 3):
        first.save(step, state(step), {})
    assert steps(tmp_path) == [2, 3]
    os.truncate(tmp_path / "step_00000003" / "__0_0.distcp", 100)
    first.save(4, state(4), {})
    assert steps(tmp_path) == [2, 3, 4], "the good one was dropped for a damaged one"

    file = tmp_path / "step_00000004" / ".metadata"
    file.write_bytes(bytes(len(file.read_bytes())))
    resumed = open_store(tmp_path, keep=2)
    resumed.save(5, state(5), {})
    assert steps(tmp_path) == [2, 3, 4, 5]
    resumed.save(6, state(6), {})
    assert steps(tmp_path) == [3, 4, 5, 6]
    assert resumed.newest() == tmp_path / "step_00000006"


def test_the_one_just_saved_stays_where_later_steps_lie(tmp_path: Path) -> None:
    """A run that has gone back to an older step."""
    back = open_store(tmp_path, keep=2)
    for step in (200, 300, 150):
        back.save(step, state(step), {})
    assert steps(tmp_path) == [150, 300] and holds(latest(tmp_path), 150)


def test_without_a_limit_all_are_kept(tmp_path: Path) -> None:
    unlimited = open_store(tmp_path)
    for step in (9, 10, 100000000):
        unlimited.save(step, state(step), {})
    assert steps(tmp_path) == [9, 10, 100000000]
    assert unlimited.newest() == tmp_path / "step_100000000"


# Disks


def test_no_room_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open_store(tmp_path, keep=1)
    path = full.save(1, state(1), {})
    used = sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))  # type: ignore
    monkeypatch.setattr(shards.SealingWriter, "write_data", die)
    with pytest.raises(NoRoomError) as caught:
        full.save(2, state(2), {})
    assert (caught.value.path, caught.value.free) == (tmp_path, 100)
    assert used <= caught.value.need <= used + 4096
    assert f"{tmp_path}: it needs {caught.value.need} bytes and the disk has 100 bytes free" in str(caught.value)
    assert holds(latest(tmp_path), 1) and not list(tmp_path.glob(".step*"))


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own answer, by the device that is always full."""
    full = open_store(tmp_path, keep=1)
    full.save(1, state(1), {})
    create = FileSystem.create_stream
    monkeypatch.setattr(
        FileSystem, "create_stream", lambda self, path, mode: create(self, "/dev/full" if "w" in mode else path, mode)
    )
    with pytest.raises(NoRoomError) as caught:
        full.save(2, state(2), {})
    assert caught.value.need > 0 and caught.value.free > 0
    assert holds(latest(tmp_path), 1) and steps(tmp_path) == [1] and not list(tmp_path.glob(".step*"))
    monkeypatch.undo()
    full.save(2, state(2), {})
    assert holds(latest(tmp_path), 2) and steps(tmp_path) == [2]


@pytest.mark.parametrize("place", ["write_manifest", "sync_folder"])
def test_an_error_after_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    failing = open_store(tmp_path, keep=1)
    failing.save(1, state(1), {})

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, place, fail)
    with pytest.raises(DiskError, match=f"cannot write to {tmp_path}: .*Input/output error.*Check that its disk"):
        failing.save(2, state(2), {})
    assert not list(tmp_path.glob(".step*"))
    verify(latest(tmp_path))


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot write to .*file/checkpoints: .*Not a directory"):
        open_store(tmp_path / "file" / "checkpoints").prepare()

    def refuse(self: Path, data: bytes) -> int:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(DiskError, match=f"cannot write to {tmp_path}: .*Read-only file system.*or set run.dir"):
        open_store(tmp_path).prepare()


def test_a_folder_that_vanishes_is_not_made_anew(tmp_path: Path) -> None:
    """Under a lost mount lies a folder of the same name on another disk."""
    gone = open_store(tmp_path / "run" / "checkpoints")
    gone.save(1, state(1), {})
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(DiskError, match="cannot write to .*run/checkpoints: .*No such file"):
        gone.save(2, state(2), {})
    assert not (tmp_path / "run").exists()
    assert holds(tmp_path / "moved" / "checkpoints" / "step_00000001", 1)

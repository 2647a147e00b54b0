"""The checkpoints of a run: written whole or not at all, verified before they are read, the last good one never lost.

<run>/checkpoints/
    step_00000100/              a checkpoint: it has its name only once it is complete and on the disk
        __0_0.distcp, ...       the ranks' shards
        .metadata               which tensor lies where
        manifest.json           size and SHA-256 of every file; written last
    latest                      name of the newest, for people and scripts; the loader looks at the folders
    .step_00000200.tmp-3f2a9c   being written, or left by a crash: looked at by the next start
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from moedist.mesh import Axis
from moedist.mesh.collectives import all_max, broadcast_json, gather_json
from moedist.train.checkpoint.background import BackgroundSave, Staging
from moedist.train.checkpoint.errors import CheckpointError, DiskError, disk_errors
from moedist.train.checkpoint.manifest import (
    FileSeal,
    Manifest,
    check_file,
    check_sizes,
    folder_name,
    read_manifest,
    step_of,
    sync_folder,
    verify,
    write_manifest,
)
from moedist.train.checkpoint.shards import read_index, read_shards, write_shards
from moedist.train.checkpoint.state import check_state, describe, describe_saved, flatten

LATEST = "latest"

_warn = logging.getLogger(__name__).warning

T = TypeVar("T")


class CheckpointStore:
    """Saves and loads on all ranks together; every method is called by all of them and ends alike on all of them.

    Args:
        directory: the folder of checkpoints, on a disk that all ranks share.
        axis: all ranks, with time to wait (`moedist.mesh.slow.slow_axis`).
        keep: number of newest verified checkpoints to keep; None for all.
        report: takes lines for people (what was skipped, removed or rescued, and why); called on rank 0.
    """

    def __init__(
        self,
        directory: Path,
        axis: Axis,
        keep: int | None = None,
        report: Callable[[str], None] = _warn,
    ):
        self.directory = directory.absolute()
        self.axis = axis
        self.keep = keep
        self.report = report
        self._good: set[Path] = set()  # hashed by this process, when written or when read; what retention counts
        self._vouched: dict[Path, Manifest] = {}  # hashed just now, so that `load` need not read it all again
        self._launch: str | None = None
        self._staging = Staging()

    def prepare(self) -> None:
        """Makes the folder, shows that every rank can write to it, and clears what crashed saves have left.

        Called once before the first `save`, so that a disk that cannot be written stops a run at its start.

        Raises:
            DiskError: a rank cannot write to the folder, or the ranks do not share it.
        """
        self._launch = broadcast_json(secrets.token_hex(3), self.axis, torch.device("cpu"))
        self._on_rank_0(self._make_directory)
        probe = self.directory / f".probe-{self._launch}-"
        self._together("write to", lambda: self._write_probe(Path(f"{probe}{self.axis.rank}")))
        self._on_rank_0(lambda: self._collect_probes(probe))
        self._on_rank_0(self._clear_leftovers)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        own: Mapping[str, Tensor] | None = None,
        written: Callable[[], None] = lambda: None,
    ) -> Path:
        """Writes a checkpoint and makes it the newest; older ones beyond ``keep`` are removed.

        Everything goes to a hidden folder that gets its name by one rename. At every moment the checkpoints before it
        are whole. One of the same step is replaced by two renames; the next `prepare` mends a crash between them.

        Args:
            step: optimizer steps taken.
            state: nested mapping of tensors and DTensors by global names. A name that some ranks lack is of a tensor
                that the others hold whole.
            meta: JSON for the manifest; rank 0's counts.
            own: tensors of this rank alone (random number generators).
            written: called once this rank's part is written; what follows waits for the other ranks.

        Returns:
            The checkpoint's folder.

        Raises:
            DiskError, NoRoomError: on all ranks. What was written of it is removed.
            RuntimeError: a rank was lost meanwhile. What was written of it is removed by the next `prepare`.
        """
        return self._write(step, flatten({**state, **self._own(own)}), meta, written=written)

    def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        own: Mapping[str, Tensor] | None = None,
    ) -> BackgroundSave:
        """As `save`, in the background: returns once the state is copied to the host, so that it may change.

        The copy takes as much host memory as this rank's part of the state, kept for the next one. No other method of
        this store may be called before the save has been waited for.
        """
        flat = flatten({**state, **self._own(own)})
        copies = self._staging.copy(flat)
        return BackgroundSave(step, lambda written: self._write(step, flat, meta, copies, written))

    def _write(
        self,
        step: int,
        flat: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        copies: Mapping[str, Tensor] | None = None,
        written: Callable[[], None] = lambda: None,
    ) -> Path:
        if self._launch is None:
            self.prepare()
        path = self.directory / folder_name(step)
        folder = self._hidden(path, "tmp")

        def publish(files: dict[str, FileSeal]) -> None:
            write_manifest(folder, Manifest(step, self.axis.size, files, json.loads(json.dumps(meta))))
            self._move_in(folder, path)
            self._point_latest(path)

        try:
            write_shards(flat, folder, self.axis, publish, copies=copies, written=written)
        except CheckpointError:
            # Together: a rank that tried the same step again would write into a folder that rank 0 is still removing.
            self._on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise
        self._good.add(path)
        self._retain(path)
        self._vouched.clear()
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; those skipped on the way are reported.

        Returns:
            Its folder; None where there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints and none verifies. That is no reason to start afresh.
        """
        skipped = []
        for path in reversed(self._steps()):
            try:
                self.verify(path)
            except CheckpointError as error:
                skipped.append(str(error))
                self._tell(f"skipped: {error}")
            else:
                return path
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used: {'; '.join(skipped)}. Restore one from a copy, "
                f"or start a new run in another run.dir."
            )
        return None

    def verify(self, path: Path) -> Manifest:
        """Reads every byte of a checkpoint, each rank a part, and compares it with the manifest.

        Raises:
            CheckpointError: names a file that differs, and how.
        """
        path = path.absolute()
        self._good.discard(path)
        manifest = Manifest.parse(self._on_rank_0(lambda: read_manifest(path).render()))
        files = sorted(manifest.files.items())
        bad = -1
        for index in range(self.axis.rank, len(files), self.axis.size):
            name, seal = files[index]
            try:
                check_file(path / name, seal)
            except CheckpointError:
                bad = index
        bad = int(all_max(torch.tensor(bad), self.axis))
        if bad >= 0:
            name, seal = files[bad]
            self._on_rank_0(lambda: check_file(path / name, seal))
            raise CheckpointError(f"{path / name} reads differently on another rank; is {path} on a shared disk?")
        self._good.add(path)
        self._vouched = {path: manifest}
        return manifest

    def load(self, path: Path, state: Mapping[str, Any], own: Mapping[str, Tensor] | None = None) -> Mapping[str, Any]:
        """Fills live tensors in place from a checkpoint, whatever layout wrote it.

        Args:
            state: as for `save`; its top-level keys say which parts are wanted.
            own: this rank's own tensors; filled only where the checkpoint was written by as many ranks and holds
                them in the same shape, else left as they are.

        Returns:
            The ``meta`` that was saved.

        Raises:
            CheckpointError: damaged, hostile, or of another model; nothing has been filled then. Also where a file can
                no longer be read in the middle of it; the live state is then not to be used.
        """
        path = path.absolute()
        manifest = self._vouched.pop(path, None) or self.verify(path)
        tensors = flatten(state)
        everywhere = self._names_of_all(tensors)

        def check() -> Metadata:
            index = read_index(path, manifest)
            check_state(tensors, tuple(state), index, path, everywhere)
            return index

        index = self._together("use", check, path)
        if manifest.num_ranks == self.axis.size:
            mine = flatten(self._own(own)).items()
            tensors |= {key: tensor for key, tensor in mine if describe(tensor) == describe_saved(index, key)}
        self._together("read", lambda: read_shards(tensors, path, index), path)
        return manifest.meta

    def _names_of_all(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on any rank: some hold experts under names that others lack. Travels only where they differ."""
        digest = hashlib.sha256("\n".join(sorted(tensors)).encode()).digest()
        mine = torch.tensor(int.from_bytes(digest[:7], "big"))
        if int(all_max(mine.clone(), self.axis)) == -int(all_max(-mine, self.axis)):
            return set(tensors)
        return {name for names in gather_json(sorted(tensors), self.axis, torch.device("cpu")) for name in names}

    def _own(self, own: Mapping[str, Tensor] | None) -> dict[str, Any]:
        return {f"rank_{self.axis.rank:05d}": own or {}}

    def _hidden(self, path: Path, purpose: str) -> Path:
        return self.directory / f".{path.name}.{purpose}-{self._launch}"

    def _steps(self) -> list[Path]:
        """Folders that look like checkpoints, oldest first, as rank 0 sees them."""
        names = self._on_rank_0(lambda: [path.name for path in self.directory.glob("step_*")])
        steps = {step_of(path): path for path in (self.directory / name for name in names)}
        return [steps[step] for step in sorted(step for step in steps if step is not None)]

    # Writing, on rank 0

    def _make_directory(self) -> None:
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def _write_probe(self, probe: Path) -> None:
        with disk_errors(self.directory):
            probe.write_bytes(b"moedist")

    def _collect_probes(self, probe: Path) -> None:
        with disk_errors(self.directory):
            for rank in range(self.axis.size):
                try:
                    Path(f"{probe}{rank}").unlink()
                except FileNotFoundError:
                    raise DiskError(
                        f"rank 0 does not see what rank {rank} wrote to {self.directory}. Set run.dir to a folder on a "
                        f"disk that all nodes share."
                    ) from None

    def _clear_leftovers(self) -> None:
        # A crash can leave a hidden folder in any state. One that is complete (the crash fell between manifest and
        # rename) and whose place is empty is put there; all others go.
        with disk_errors(self.directory):
            for folder in sorted(self.directory.glob(".step_*"), reverse=True):  # .tmp- before the .old- it replaces
                place = self.directory / folder.name[1:].split(".")[0]
                if not place.exists() and _is_whole(folder):
                    self._move_in(folder, place)
                    self.report(f"completed {place}: a crash had left it without its name")
                else:
                    shutil.rmtree(folder)
                    self.report(f"removed {folder}, left by a save that did not end")
            for file in [*self.directory.glob(".probe-*"), *self.directory.glob(f".{LATEST}-*")]:
                file.unlink()

    def _move_in(self, folder: Path, path: Path) -> None:
        """Gives a complete folder its name."""
        old = self._hidden(path, "old")
        if path.exists():
            path.rename(old)
        folder.rename(path)
        sync_folder(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def _point_latest(self, path: Path) -> None:
        temporary = self.directory / f".{LATEST}-{self._launch}"
        with temporary.open("w") as file:
            file.write(f"{path.name}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / LATEST)
        sync_folder(self.directory)

    def _retain(self, saved: Path) -> None:
        """Removes the oldest verified checkpoints beyond ``keep``. Those that do not verify don't count, and stay."""
        if self.keep is None or len(self._steps()) <= self.keep:
            return
        good = []
        for path in [*(path for path in self._steps() if path != saved), saved]:  # whatever steps lie there already
            with contextlib.suppress(CheckpointError):
                if path not in self._good:
                    self.verify(path)
                self._on_rank_0(functools.partial(check_sizes, path))  # damage since, as far as it is cheap to see
                good.append(path)
        for path in good[: -self.keep]:
            self._good.discard(path)
            if self.axis.rank == 0:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        hidden = self._hidden(path, "old")
        try:
            path.rename(hidden)  # a crash while removing must not leave half a checkpoint under a good name
            shutil.rmtree(hidden)
        except OSError as error:
            self.report(f"could not remove {path}: {error}")

    # Agreement

    def _tell(self, line: str) -> None:
        if self.axis.rank == 0:
            self.report(line)

    def _on_rank_0(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from ``function``, JSON, on every rank; what it fails with likewise."""
        failure: Exception | None = None
        answer: dict[str, Any] = {}
        if self.axis.rank == 0:
            try:
                answer = {"value": function()}
            except Exception as error:  # whatever it is, the others must not wait for an answer
                failure = error
                text = str(error) if isinstance(error, CheckpointError) else f"rank 0 failed: {error!r}"
                answer = {"error": text, "disk": isinstance(error, DiskError)}
        answer = broadcast_json(answer, self.axis, torch.device("cpu"))
        if "error" in answer:
            raise (DiskError if answer["disk"] else CheckpointError)(answer["error"]) from failure
        return answer["value"]

    def _together(self, verb: str, function: Callable[[], T], path: Path | None = None) -> T:
        """Calls ``function`` on every rank; raises on every rank if it failed on one."""
        failure: Exception | None = None
        try:
            value = function()
        except Exception as error:
            failure = error
        rank = int(all_max(torch.tensor(-1 if failure is None else self.axis.rank), self.axis))
        if rank < 0:
            return value
        if isinstance(failure, CheckpointError):
            raise failure
        what = f"cannot {verb} {path or self.directory}"
        kind = DiskError if path is None else CheckpointError
        raise kind(f"{what}: {failure}" if failure else f"rank {rank} {what}; its log says why") from failure


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True

"""Tensors to files and back, by `torch.distributed.checkpoint` (DCP), with what it leaves out.

DCP splits a state over the ranks, writes each tensor once and reads it back into any other layout by global names
and offsets. What it lacks is added by its own points of extension: a look at the free space before anything is written
(`RoomPlanner`), the seal of every file (`SealingWriter`), and a reader of its pickled index that makes nothing but
descriptions of tensors (`read_index`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moedist.mesh import Axis
from moedist.train.checkpoint.errors import CheckpointError, NoRoomError, disk_errors
from moedist.train.checkpoint.manifest import FileSeal, Manifest

INDEX = ".metadata"
"""DCP's index: which tensor lies where in which file. A pickle."""

# DCP's warning that a process on its own is on its own. For good: a filter of one thread is a filter of all.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_TENSOR_OVERHEAD = 2048
"""Bytes that DCP spends on a tensor beside its elements: torch.save's archive (about 1500) and its index entry."""


class RoomPlanner(DefaultSavePlanner):
    """Says before the first byte is written whether the disk can hold the whole; hands every rank the size of it.

    Args:
        folder: where to.
        copies: this rank's part of each tensor, to be written in place of the state's own; None for those.
    """

    def __init__(self, folder: Path, copies: Mapping[str, Tensor] | None = None):
        super().__init__(flatten_state_dict=False)
        self.folder = folder
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor that is written under ``index``."""
        return super().lookup_object(index) if self.copies is None else self.copies[index.fqn]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Runs on rank 0; what it raises, DCP raises on every rank."""
        plans, metadata = super().create_global_plan(all_plans)
        need = _stored_size(metadata)
        free = shutil.disk_usage(self.folder.parent).free
        if free < need:
            raise NoRoomError(self.folder.parent, need, free)
        return [dataclasses.replace(plan, planner_data=need) for plan in plans], metadata


def _stored_size(metadata: Metadata) -> int:
    tensors = [item for item in metadata.state_dict_metadata.values() if isinstance(item, TensorStorageMetadata)]
    chunks = [(chunk, tensor.properties.dtype.itemsize) for tensor in tensors for chunk in tensor.chunks]
    return sum(math.prod(chunk.sizes) * itemsize + _TENSOR_OVERHEAD for chunk, itemsize in chunks)


@dataclasses.dataclass(frozen=True)
class _Sealed:
    """A file that a rank has written; travels to rank 0 among DCP's own results."""

    name: str
    seal: FileSeal


class SealingWriter(FileSystemWriter):
    """Writes shards and index, each synced and sealed; then rank 0 publishes the folder with all the seals.

    Sealing and publishing happen inside DCP's protocol, so that a failure on any rank, at any point up to the rename,
    is a failure on all of them.

    Args:
        folder: where to; made if missing, its parent is not (the parent may be the place of a lost mount).
        publish: called on rank 0 with the seals of all files.
        written: called on every rank once its shards are written.
    """

    def __init__(
        self,
        folder: Path,
        publish: Callable[[dict[str, FileSeal]], None],
        written: Callable[[], None] = lambda: None,
    ):
        super().__init__(folder, sync_files=True, thread_count=1)
        self.folder = folder
        self.publish = publish
        self.written = written
        self.need = 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the folder."""
        with disk_errors(self.folder.parent):
            self.folder.mkdir(exist_ok=True)
        return plan

    def storage_meta(self) -> StorageMeta:
        """Nothing: DCP would write the path of the temporary folder into the index."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and seals this rank's shards."""
        self.need = plan.planner_data
        with disk_errors(self.folder.parent, self.need):
            results: list[Any] = list(super().write_data(plan, planner).value())
            shards = sorted(self.folder.glob(f"{plan.storage_data.prefix}*"))
            results += [_Sealed(shard.name, FileSeal.of(shard)) for shard in shards]
        self.written()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs on rank 0 once all shards are written: the index, then whatever makes the folder a checkpoint."""
        seals = {item.name: item.seal for result in results for item in result if isinstance(item, _Sealed)}
        written = [[item for item in result if not isinstance(item, _Sealed)] for result in results]
        with disk_errors(self.folder.parent, self.need):
            super().finish(metadata, written)
            self.publish({**seals, INDEX: FileSeal.of(self.folder / INDEX)})


def write_shards(
    state: Mapping[str, Tensor],
    folder: Path,
    axis: Axis,
    publish: Callable[[dict[str, FileSeal]], None],
    *,
    copies: Mapping[str, Tensor] | None = None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Writes a flat state; returns or raises on all ranks of ``axis`` alike.

    Args:
        copies: see `RoomPlanner`; the state then tells names and layout alone.
        publish, written: see `SealingWriter`.

    Raises:
        DiskError: on every rank, the one that the first failing rank met.
        RuntimeError: a rank was lost.
    """
    try:
        save(
            dict(state),
            storage_writer=SealingWriter(folder, publish, written),
            planner=RoomPlanner(folder, copies),
            process_group=None if axis.group_name is None else axis.group,
            no_dist=axis.group_name is None,
        )
    except CheckpointException as failure:
        rank, cause = _first_failure(failure)
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(f"rank {rank} could not write its part of {folder}: {cause!r}") from failure


def read_shards(state: Mapping[str, Tensor], path: Path, index: Metadata) -> None:
    """Fills the tensors of a flat state in place, this rank's part of each; talks to no other rank.

    Args:
        index: from `read_index`; `check_state` has passed for it.

    Raises:
        CheckpointError: a file can no longer be read, or holds something else than tensors.
    """
    try:
        load(
            dict(state),
            storage_reader=_IndexedReader(path, index),
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    except CheckpointException as failure:
        raise CheckpointError(f"cannot read {path}: {_first_failure(failure)[1]}") from None


def _first_failure(failure: CheckpointException) -> tuple[int, BaseException]:
    """DCP's exception (no `Exception` to Python) holds what each failing rank met."""
    rank = min(failure.failures)
    return rank, failure.failures[rank][0]


class _IndexedReader(FileSystemReader):
    """DCP's reader with an index that was read before: its own way is to unpickle whatever lies there.

    The shards it reads by ``torch.load(weights_only=True)``.
    """

    def __init__(self, path: Path, index: Metadata):
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        return self.index


def read_index(path: Path, manifest: Manifest) -> Metadata:
    """DCP's index of a checkpoint, made from the very bytes that the manifest vouches for.

    Raises:
        CheckpointError: the bytes are not those, ask for any class but DCP's descriptions of tensors, or point outside
            the checkpoint.
    """
    seal = manifest.files.get(INDEX)
    data = (path / INDEX).read_bytes()
    if seal is None or seal != FileSeal(len(data), hashlib.sha256(data).hexdigest()):
        raise CheckpointError(f"{path / INDEX} is not the file that the manifest names")
    try:
        index = _IndexUnpickler(io.BytesIO(data)).load()
        _check_index(index, manifest)
    except Exception as error:  # crafted bytes can make the unpickler raise anything
        raise CheckpointError(f"{path / INDEX} is not an index of tensors: {error}") from None
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Makes descriptions of tensors and nothing else."""

    CLASSES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),  # looks a layout up by its name
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global that the pickle names."""
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 writes a member of an enum
            return _memory_format
        if (module, name) in self.CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _memory_format(kind: object, name: str) -> _MEM_FORMAT_ENCODING:
    """The member of that name; for nothing but torch's enum of memory formats."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}")
    return _MEM_FORMAT_ENCODING[name]


def _check_index(index: Metadata, manifest: Manifest) -> None:
    """Raises ValueError unless the index speaks of tensors alone, all inside the manifest's files."""
    if not isinstance(index, Metadata):
        raise ValueError(f"it holds a {type(index).__name__}")
    for key, tensor in index.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):  # DCP unpickles anything else without a check
            raise ValueError(f"{key!r} is not a tensor")
    for entry in index.storage_data.values():
        file = manifest.files.get(entry.relative_path)
        inside = file is not None and 0 <= entry.offset <= entry.offset + entry.length <= file.size
        if not inside or entry.transform_descriptors is not None:
            raise ValueError(f"it points at {entry.relative_path!r}, outside the checkpoint")
